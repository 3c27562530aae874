"""DALL-E: one autoregressive transformer over text and image tokens (Ramesh et al., 2021, section 2.2).

Axis legend: B batch, T text_length, I image tokens (h * w), P the prefix [start of text] + text (T + 1; T in a layout
without a start), D d_model, N = P + I - 1 input positions: the last image token is only predicted, never an input.
Position p predicts token p + 1, so the last text position predicts the first image token. A model built on this one may
prepend E `extra` vectors to the start of text, and let the positions that predict image tokens cross-attend to a source
(`layers.cross`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.layers.attention import KVCache, Stream
from dalle_jax.layers.basic import LayerNorm, constrain, embedding_lookup, normal_init, param, product
from dalle_jax.layers.cross import Context
from dalle_jax.layers.patterns import Pattern, layer_kinds
from dalle_jax.layers.rotary import Rotary
from dalle_jax.layers.transformer import GATED, Stack
from dalle_jax.models import variants
from dalle_jax.models.image_tokenizer import ImageTokenizer
from dalle_jax.models.pooling import masked_mean
from dalle_jax.models.text_image import TextImage

VARIANTS = {
  'test': dict(
    text_vocab=40, text_length=6, image_vocab=16, grid=(4, 4), d_model=16, depth=4, heads=2, conv_kernel=3,
    dtype=jnp.float32,
  ),
  'quickstart': dict(
    text_vocab=536, text_length=24, image_vocab=512, grid=(9, 9), d_model=128, depth=4, heads=4, attention='full',
    unroll=4, dtype=jnp.float32,
  ),
  'mini': dict(
    text_vocab=2080, text_length=24, image_vocab=1024, grid=(8, 8), d_model=192, depth=4, heads=6, attention='full',
    unroll=4, dtype=jnp.float32,
  ),
  # 256 + 1,024 tokens; the sizes of the GPT family, and '12b', that of the paper.
  'small': dict(d_model=768, depth=12, heads=12),
  '300m': dict(d_model=1024, depth=24, heads=16, remat='dots'),
  '1.3b': dict(d_model=2048, depth=24, heads=16, remat='dots'),
  '12b': dict(d_model=3968, depth=64, heads=62, head='tied', period=4, remat='full'),
  # Public models, whose weights `convert` imports.
  'mindalle': dict(
    text_vocab=16_384, text_length=64, image_vocab=16_384, grid=(16, 16), d_model=1536, depth=42, heads=24,
    attention='full', image_positions='learned', layout='no_start', pad=0, period=3, remat='dots',
  ),
  'rudalle': dict(
    text_vocab=16_384 + 128, text_length=128, image_vocab=8192, d_model=2048, depth=24, heads=16, layout='no_start',
    attention=','.join(['row', 'column', 'row', 'row'] * 5 + ['row', 'column', 'row', 'conv']), norms='sandwich',
    head='norm', activation='gelu_tanh', remat='dots',
  ),
  'dalle_pytorch': dict(
    d_model=512, depth=2, heads=8, attention='full', conv_kernel=5, activation='geglu', head='bias',
  ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Layout:
  """What precedes the image tokens.

  Attributes:
    start: whether a learnt start vector comes first and predicts the first text token; without it, nothing does.
    shift: offset of the image tokens in the attention masks from where they are in the sequence.
  """

  start: bool = True
  shift: int = 0


LAYOUTS = {
  'start': Layout(),
  'no_start': Layout(start=False),  # minDALL-E, ru-DALLE: the text has a start token of its own where it needs one
  'shifted': Layout(shift=-1),  # ru-DALLE v2: has a start, but its masks were built as if it had none
}


@dataclasses.dataclass(frozen=True)
class Head:
  """How features become logits.

  Attributes:
    tied: whether the heads are the embeddings of text and image.
    bias: whether they have biases.
    norm: whether an additional LayerNorm comes first.
  """

  tied: bool = False
  bias: bool = False
  norm: bool = False


HEADS = {
  'linear': Head(),
  'tied': Head(tied=True),
  'bias': Head(bias=True),  # DALLE-pytorch
  'tied_bias': Head(tied=True, bias=True),  # DALLE-pytorch, share_input_output_emb
  'norm': Head(bias=True, norm=True),  # ru-DALLE
}


class DALLE(TextImage, nn.Module):
  """The transformer with its embeddings and heads.

  Attributes:
    text_vocab, text_length, pad, grid: see `TextImage`.
    image_vocab: number of image codes.
    layout: what precedes the image tokens, see `LAYOUTS`.
    attention: attention kind of each layer, see `layers.patterns.layer_kinds`.
    image_positions: 'axial', the sum of a row and a column embedding; 'learned', one embedding per position; or
      'rotary', no embeddings, of text neither, but `layers.rotary`.
    head: how features become logits, see `HEADS`.
    divide_max: divides the features by their maximum before the last LayerNorm (DALLE-pytorch, stable=True), which so
      has a smaller or larger epsilon in effect.
    norms, period, remat, unroll, kernel, head_dim, shift_tokens, reversible: see `layers.transformer.Stack`.
  """

  title = 'DALL-E'
  text_vocab: int = 16_384 + 256
  text_length: int = 256
  image_vocab: int = 8192
  grid: tuple[int, int] = (32, 32)
  d_model: int = 768
  depth: int = 12
  heads: int = 12
  attention: str = 'paper'
  conv_kernel: int = 11
  image_positions: str = 'axial'
  layout: str = 'start'
  pad: int = -1
  head: str = 'linear'
  norms: str = 'pre'
  activation: str = 'gelu'
  period: int = 1
  remat: str = 'none'
  unroll: int = 1
  kernel: str = 'auto'
  head_dim: int = 0
  shift_tokens: bool = False
  reversible: bool = False
  divide_max: bool = False
  dtype: jnp.dtype = jnp.bfloat16

  @property
  def prefix(self) -> int:
    return self.text_length + LAYOUTS[self.layout].start

  @property
  def length(self) -> int:
    """N, the number of input positions."""
    return self.prefix + self.image_length - 1

  def rotary_angles(self) -> jax.Array:
    """Angles of rotary positions, float32[P + I, R] in radians."""
    head_dim = self.head_dim or self.d_model // self.heads
    return Rotary(0, self.prefix, self.grid).angles(head_dim, self.length + 1)

  def setup(self):
    if self.layout not in LAYOUTS:
      raise ValueError(f'layout {self.layout!r} is unknown; expected one of {", ".join(LAYOUTS)}.')
    if LAYOUTS[self.layout].shift and self.image_positions == 'rotary':
      raise ValueError(f'layout {self.layout!r} has no rotary positions; use image_positions axial or learned.')
    if self.head not in HEADS:
      raise ValueError(f'head {self.head!r} is unknown; expected one of {", ".join(HEADS)}.')
    d, init = self.d_model, normal_init(0.02)
    table = lambda name, size, axes: param(self, name, init, axes, (*size, d))
    if LAYOUTS[self.layout].start:
      self.start = table('start', (), ('embed',))
    self.text_embed = table('text_embed', (self.text_vocab,), ('vocab', 'embed'))
    self.image_embed = table('image_embed', (self.image_vocab,), ('vocab', 'embed'))
    if self.image_positions != 'rotary':
      self.text_positions = table('text_positions', (self.prefix,), (None, 'embed'))
    if self.image_positions == 'axial':
      self.row_positions = table('row_positions', (self.grid[0],), (None, 'embed'))
      self.column_positions = table('column_positions', (self.grid[1],), (None, 'embed'))
    elif self.image_positions == 'learned':
      self.image_position = table('image_position', (self.image_length,), (None, 'embed'))
    elif self.image_positions != 'rotary':
      raise ValueError(f'image_positions {self.image_positions!r} is unknown; expected axial, learned or rotary.')
    self.blocks = Stack(
      self.depth, self.heads, self.activation, self.dtype, self.period, self.remat, self.unroll, self.norms,
      kernel=self.kernel, head_dim=self.head_dim, shift_tokens=self.shift_tokens, reversible=self.reversible,
    )  # fmt: skip
    self.norm_out = LayerNorm(dtype=self.dtype)
    if HEADS[self.head].tied:
      self.text_head, self.image_head = self.text_embed, self.image_embed
    else:
      self.text_head = table('text_head', (self.text_vocab,), ('vocab', 'embed'))
      self.image_head = table('image_head', (self.image_vocab,), ('vocab', 'embed'))
    if HEADS[self.head].norm:
      self.norm_head = LayerNorm(dtype=self.dtype)
    self.text_bias = self.image_bias = None
    if HEADS[self.head].bias:
      bias = lambda name, size: param(self, name, nn.initializers.zeros, ('vocab',), (size,))
      self.text_bias, self.image_bias = bias('text_bias', self.text_vocab), bias('image_bias', self.image_vocab)

  def __call__(
    self, text: jax.Array, image: jax.Array, extra: jax.Array | None = None, context: Context | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """Teacher-forced logits: text int32[B, T], image int32[B, I] -> float32[B, T, text_vocab], [B, I, image_vocab].

    Row t of each predicts token t. Without a start the first text token is not predicted, and there are T - 1 rows of
    text. `extra` [B, E, D] is prepended to the start of text. Raises ValueError for other lengths.
    """
    self.check(text, image, (self.image_length,))
    x = self.features(text, image[:, :-1], extra, context)
    t = self.prefix - 1
    return self.text_logits(x[:, :t]), self.image_logits(x[:, t:])

  def features(
    self, text: jax.Array, image: jax.Array, extra: jax.Array | None = None, context: Context | None = None
  ) -> jax.Array:
    """Input of the heads, [B, P + k, D], for text int32[B, T] and the first k image tokens int32[B, k]."""
    x, first = self._stream(text, image, extra)
    x, _ = self._run(x, first, None, context)
    return self._read(x[:, first:])

  def text_logits(self, x: jax.Array) -> jax.Array:
    """Features [..., D] -> float32[..., text_vocab]."""
    return self._logits(x, self.text_head, self.text_bias)

  def image_logits(self, x: jax.Array) -> jax.Array:
    """Features [..., D] -> float32[..., image_vocab]."""
    return self._logits(x, self.image_head, self.image_bias)

  def next_text_logits(self, text: jax.Array, t: jax.Array) -> jax.Array:
    """The logits of text token t, int32[], from the tokens before it in text int32[B, T]: float32[B, text_vocab]."""
    x, first = self._stream(text, jnp.zeros((len(text), 0), jnp.int32), None)
    x, _ = self._run(x, first, KVCache(), None)  # by the path that takes parameters laid out for decoding
    return self.text_logits(self._read(jnp.take(x, t - 1 + LAYOUTS[self.layout].start, axis=1)))

  def prefill(
    self,
    text: jax.Array,
    image: jax.Array,
    extra: jax.Array | None = None,
    context: tuple[Context, ...] | None = None,
  ) -> tuple[jax.Array, KVCache]:
    """Encode text int32[B, T] and the first k < I image tokens int32[B, k] into a new cache, after `extra` [B, E, D].

    Returns the logits of image token k, float32[B, image_vocab], and the cache.
    """
    self.check(text, image, range(self.image_length))
    x, first = self._stream(text, image, extra)
    x, cache = self._run(x, first, KVCache(), context)
    return self.image_logits(self._read(x[:, -1])), cache

  def step(
    self,
    token: jax.Array,
    index: jax.Array,
    cache: KVCache,
    context: tuple[Context, ...] | None = None,
  ) -> tuple[jax.Array, KVCache]:
    """Logits of the image token after the one at `index`, `token` int32[B]: float32[B, image_vocab], and the new cache.

    `context` is that of the prefill; `cache` that of the prefill or of the last step, extended to have room for the
    token (`KVCache.extend`).
    """
    x = self._embed_image(token[:, None], index)
    shift = LAYOUTS[self.layout].shift
    patterns, kinds = self._patterns(cache.prefix - self.prefix - shift)
    stream = Stream(patterns, index - shift, self._rotary(cache.prefix - self.prefix))
    x, cache = self.blocks(x, None, stream, kinds, cache, context, np.ones(1, bool))
    return self.image_logits(self._read(x[:, 0])), cache

  def embed_source(self, tokens: jax.Array) -> jax.Array:
    """Input embeddings of all tokens of an image, with positions if they are learnt: int32[B, I] -> [B, I, D]."""
    return self._embed_image(tokens, 0)

  def embed_caption(self, text: jax.Array) -> jax.Array:
    """Mean word embedding without paddings, int32[B, T] -> float32[B, D]; zeros for an empty caption."""
    return masked_mean(embedding_lookup(self.text_embed, text), self.is_word(text))

  def _stream(self, text: jax.Array, image: jax.Array, extra: jax.Array | None) -> tuple[jax.Array, int]:
    """The input sequence, [B, E + P + k, D], and E."""
    parts = [self._embed_text(text), self._embed_image(image, 0)]
    if extra is not None:
      parts.insert(0, extra.astype(self.dtype))
    return jnp.concatenate(parts, 1), 0 if extra is None else extra.shape[1]

  def _run(
    self, x: jax.Array, first: int, cache: KVCache | None, context: Context | tuple[Context, ...] | None
  ) -> tuple[jax.Array, KVCache | None]:
    """Run the blocks on the first n positions of the sequence, x[B, n, D], of which `first` are extra vectors."""
    patterns, kinds = self._patterns(first)
    attending = np.arange(x.shape[1]) >= first + self.prefix - 1  # the positions that predict image tokens
    stream = Stream(patterns, rotary=self._rotary(first))
    return self.blocks(x, None, stream, kinds, cache, context, attending)

  def _embed_text(self, text: jax.Array) -> jax.Array:
    """int32[B, T] -> [B, P, D]."""
    x = embedding_lookup(self.text_embed, text)
    if LAYOUTS[self.layout].start:
      x = jnp.concatenate([jnp.broadcast_to(self.start, (len(x), 1, self.d_model)), x], 1)
    x = x if self.image_positions == 'rotary' else x + self.text_positions
    return x.astype(self.dtype)

  def _embed_image(self, tokens: jax.Array, first: jax.Array | int) -> jax.Array:
    """Image tokens number first, first + 1, ..., int32[B, n] -> [B, n, D]."""
    x = embedding_lookup(self.image_embed, tokens)
    i = first + jnp.arange(tokens.shape[1])
    if self.image_positions == 'axial':
      position = jnp.take(self.row_positions, i // self.grid[1], axis=0)
      position += jnp.take(self.column_positions, i % self.grid[1], axis=0)
    elif self.image_positions == 'learned':
      position = jnp.take(self.image_position, i, axis=0)
    else:
      position = 0.0
    return (x + position).astype(self.dtype)

  def _patterns(self, first: int) -> tuple[tuple[Pattern, ...], list[int]]:
    """The distinct attention patterns, for E = `first`, and for each layer the index of its pattern."""
    kinds = layer_kinds(self.attention, self.depth)
    present = sorted(set(kinds))
    before = first + self.prefix + LAYOUTS[self.layout].shift
    patterns = tuple(Pattern(kind, before, self.grid, self.conv_kernel) for kind in present)
    return patterns, [present.index(kind) for kind in kinds]

  def _rotary(self, first: int) -> Rotary | None:
    return Rotary(first, first + self.prefix, self.grid) if self.image_positions == 'rotary' else None

  def _read(self, x: jax.Array) -> jax.Array:
    if self.divide_max:
      x = x / jax.lax.stop_gradient(x.max(-1, keepdims=True))
    x = self.norm_out(x)
    return self.norm_head(x) if HEADS[self.head].norm else x

  def _logits(self, x: jax.Array, head: jax.Array, bias: jax.Array | None) -> jax.Array:
    """[..., D] -> float32[..., vocab]."""
    y = product(x, head.astype(self.dtype).T, dtype=jnp.float32)
    y = y if bias is None else y + bias
    return constrain(y, ('batch', *(None,) * (y.ndim - 2), 'vocab'))


def sizes(config: Mapping[str, Any], images: ImageTokenizer) -> dict[str, Any]:
  """The fields that follow from the tokenizer of a config, and from the image tokenizer at its image size.

  Raises ValueError if `config.model` has another value for one of them.
  """
  size = config['data']['image_size']
  found = {**variants.text_sizes(config['tokenizer']), 'image_vocab': images.num_codes, 'grid': images.grid(size)}
  for name, value in found.items():
    given = config['model'].get(name, value)
    if (tuple(given) if isinstance(given, list) else given) != value:
      raise ValueError(
        f'config.model.{name} is {given}, but the tokenizers and images of {size} pixels give {value}; use the '
        'tokenizers and the image size that the model was made for, or leave the field out of a new one.'
      )
  return found


def grow_vocabulary(params: Any, words: int, count: int, rng: jax.Array) -> Any:
  """Grow the text vocabulary of a DALL-E from `words` by `count` new ids; per-position padding ids move up.

  The embedding of a new word is a random vector with the standard deviation of the old ones; its row of the head is the
  mean of the old ones, so that it is predicted no more often than an average word.
  """

  def insert(table: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.concatenate([table[:words], new.astype(table.dtype), table[words:]])

  table = params['text_embed']
  fresh = jax.random.normal(rng, (count, table.shape[1])) * table[:words].std()
  grown = {**params, 'text_embed': insert(table, fresh)}
  for name in ('text_head', 'text_bias'):
    if name in params:
      head = params[name]
      grown[name] = insert(head, jnp.broadcast_to(head[:words].mean(0), (count, *head.shape[1:])))
  return grown


def adopt(model: DALLE, players: Mapping[str, Any], config: Mapping[str, Any], rng: jax.Array) -> dict[str, Any]:
  """Parameters by player of a run, with those of its 'dalle' fitted to `model`, whose vocabulary may be larger.

  Raises ValueError if the vocabulary of `model` is smaller, or if the run has no DALL-E.
  """
  if 'dalle' not in players:
    raise ValueError(f'config.init.path is a run of {", ".join(players)}; expected a run with a DALL-E.')
  words, known = model.words, config['tokenizer']['vocab_size']
  if words < known:
    raise ValueError(
      f'the run in config.init.path has {known} text tokens, this one only {words}; leave config.tokenizer.path empty.'
    )
  if words == known:
    return dict(players)
  return {**players, 'dalle': grow_vocabulary(players['dalle'], known, words - known, rng)}


def flops(model: DALLE, batch: int) -> float:
  """Model FLOPs of one update of `batch` sequences (forward and backward, no causal discount, no rematerialisation)."""
  n, d = model.length, model.d_model
  inner = model.heads * (model.head_dim or d // model.heads)
  mlp = 4 * (3 if model.activation in GATED else 2)
  layer = 2 * n * d * (4 * inner + mlp * d) + 4 * n * n * inner  # forward: products with parameters; scores and values
  heads = 2 * d * (model.text_length * model.text_vocab + model.image_length * model.image_vocab)
  return 3.0 * batch * (model.depth * layer + heads)


def build(variant: str, **overrides) -> DALLE:
  """The network of `VARIANTS[variant]` with fields overridden. Raises ValueError for an unknown variant or field."""
  return variants.build(DALLE, VARIANTS, variant, overrides)
