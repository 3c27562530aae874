"""DALL-E mini: an encoder of captions and a decoder of image tokens (Dayma et al., 2021, borisdayma/dalle-mini).

BART (Lewis et al., 2020) without biases, with the norms of NormFormer (Shleifer et al., 2021) and gated MLPs ("GLU
Variants Improve Transformer", Shazeer, 2020). Biases of self-attention, which the original lacks, start at zero.

Axis legend: B captions, T text_length, I image tokens (h * w), D d_model, H heads, K head_dim, R rows of a decoding
step, of which R / B consecutive ones belong to each caption. The decoder reads a start token and all image tokens but
the last; its position p predicts image token p.
"""

import operator
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dalle_jax.layers import kernels
from dalle_jax.layers.attention import CACHE_AXES, Attention, KVCache, Pair, Stream
from dalle_jax.layers.basic import (
  Dense,
  Einsum,
  LayerNorm,
  constrain,
  embedding_lookup,
  normal_init,
  param,
  product,
  recomputed,
)
from dalle_jax.layers.patterns import Pattern
from dalle_jax.layers.transformer import gelu, residual
from dalle_jax.models import variants
from dalle_jax.models.text_image import TextImage

VARIANTS = {
  'test': dict(
    text_vocab=40, text_length=6, image_vocab=16, grid=(4, 4), d_model=16, depth=2, heads=2, mlp=24, dtype=jnp.float32
  ),
  # Public models, whose weights `convert` imports.
  'mini': dict(),
  'mega': dict(text_vocab=50_272, image_spare=32, d_model=2048, depth=24, heads=32, mlp=4096, remat='full'),
}
EPS = 1e-5  # of every LayerNorm
REMATS = ('none', 'full')


class Cache(struct.PyTreeNode):
  """What decoding keeps of R rows of image tokens and of their B captions.

  Attributes:
    seen: bool[B, T], the positions of each caption that cross-attention may see.
    text: keys and values of the encoded captions for every layer, [B, H, T, K].
    image: keys and values of R rows; its prefix is the start token.
  """

  seen: jax.Array
  text: tuple[Pair, ...]
  image: KVCache

  def extend(self, n: int) -> 'Cache':
    """Makes room for n more image tokens."""
    return self.replace(image=self.image.extend(n))

  @property
  def copies(self) -> int:
    return self.image.copies

  def repeat(self, n: int) -> 'Cache':
    """Repeats every row n times; the rows of a caption share its keys and values."""
    return self.replace(image=self.image.repeat(n))


class CrossAttention(nn.Module):
  """Attention of rows x[R, S, D] to encoded captions [B, T, D], each of which belongs to R / B consecutive rows."""

  width: int
  heads: int
  dtype: jnp.dtype

  def setup(self):
    shape, axes = (self.width, self.heads, self.width // self.heads), ('embed', 'heads', 'head_dim')
    einsum = lambda shape, axes: Einsum(shape, axes, dtype=self.dtype, kernel_init=normal_init(self.width**-0.5))
    self.query, self.key, self.value = (einsum(shape, axes) for _ in range(3))
    self.out = einsum((*shape[1:], shape[0]), (*axes[1:], axes[0]))

  def keys(self, text: jax.Array) -> Pair:
    """Keys and values [B, H, T, K] of encoded captions [B, T, D]."""
    k, v = (constrain(project('BTD,DHK->BTHK', text).swapaxes(1, 2), CACHE_AXES) for project in (self.key, self.value))
    return k, v

  def __call__(self, x: jax.Array, text: Pair, seen: jax.Array) -> jax.Array:
    """`text` is what `keys` returns, `seen` bool[B, T]."""
    q = self.query('RSD,DHK->RSHK', x)
    # The rows of a caption become one axis of queries, so that its keys and values are read once.
    y = kernels.attend(q.reshape(len(seen), -1, *q.shape[2:]), (*text, seen[:, None, None]))
    return self.out('RSHK,HKD->RSD', y.reshape(q.shape))


class Block(nn.Module):
  """Self-attention, in the decoder cross-attention to the caption, and a gated MLP; fields as in `Stack`."""

  depth: int
  heads: int
  mlp: int
  dtype: jnp.dtype
  kernel: str

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    seen: jax.Array,
    text: jax.Array | None = None,
    stream: Stream | None = None,
    cache: Cache | None = None,
    layer: int = 0,
  ) -> tuple[jax.Array, Cache | None]:
    x = constrain(x, ('batch', 'seq', 'embed'))
    d = x.shape[-1]
    inner, outer = normal_init(d**-0.5), normal_init((2 * self.depth * d) ** -0.5)
    around = {norms: residual(norms, EPS, self.dtype) for norms in ('pre', 'sandwich')}
    cross = CrossAttention(d, self.heads, self.dtype, name='cross') if stream is not None else None
    caches = []

    def attend(y: jax.Array) -> jax.Array:
      attention = Attention(self.heads, self.dtype, inner, inner, kernel=self.kernel, name='attention')
      mask, own = (seen[:, None], None) if stream is None else (None, cache and cache.image)
      y, new = attention(y, mask, stream, 0, own, layer)
      caches.append(new)
      return y

    def gated(y: jax.Array) -> jax.Array:
      wide = lambda name: Dense(
        self.mlp, ('embed', 'mlp'), use_bias=False, dtype=self.dtype, kernel_init=inner, name=name
      )(y)
      y = recomputed(lambda gate, value: gelu(gate) * value)(wide('mlp_gate'), wide('mlp_in'))
      y = LayerNorm(EPS, self.dtype, name='norm_mlp')(y)
      return Dense(d, ('mlp', 'embed'), use_bias=False, dtype=self.dtype, kernel_init=outer, name='mlp_out')(y)

    x = around['sandwich'](x, 'norm_1', attend)
    if cross is not None:
      pair = cache.text[layer] if text is None else cross.keys(text)
      x = around['sandwich'](x, 'norm_cross', lambda y: cross(y, pair, seen))
      if cache is not None:
        cache = cache.replace(image=caches[0], text=cache.text if text is None else (*cache.text, pair))
    return around['pre'](x, 'norm_2', gated), cache


class Stack(nn.Module):
  """`depth` blocks over [B, S, D], scanned, so that parameters are [depth, ...]; without a scan if there is a cache.

  Attributes:
    mlp: width of the MLPs.
    remat: what the backward pass recomputes: 'none', or 'full': everything but the inputs of each block.
    kernel: of self-attention, see `layers.kernels.stream_attention`.
  """

  depth: int
  heads: int
  mlp: int
  dtype: jnp.dtype
  remat: str
  kernel: str

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    seen: jax.Array,
    text: jax.Array | None = None,
    stream: Stream | None = None,
    cache: Cache | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """Runs all blocks on x; returns their output and, if there is one, the new cache.

    Args:
      seen: bool[B, T], the positions of the caption that may be seen.
      text: [B, T, D], the encoded captions, for the decoder; None in a step, when the cache has their keys and values.
      stream: describes the input of the decoder; None in the encoder.
    """
    fields = self.depth, self.heads, self.mlp, self.dtype, self.kernel
    if cache is not None:
      params = self.variables['params']['blocks']  # those that the scan made
      for i in range(self.depth):
        own = params[i] if isinstance(params, tuple) else jax.tree.map(operator.itemgetter(i), params)
        x, cache = Block(*fields, parent=None).apply({'params': own}, x, seen, text, stream, cache, i)
      return x, cache
    scan = nn.scan(
      nn.remat(Block, prevent_cse=False) if self.remat == 'full' else Block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=nn.broadcast,
      length=self.depth,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    return scan(*fields, name='blocks')(x, seen, text, stream)


class DALLEMini(TextImage, nn.Module):
  """Encoder and decoder with their embeddings and the head.

  Attributes:
    text_vocab, text_length, pad, grid: see `TextImage`.
    text_spare: rows of the text embedding that no id uses.
    bos, eos: the ids before and after every caption; -1 for none.
    image_vocab: number of image codes, which the logits are for.
    image_spare: rows of the image embedding and of the head in addition to these.
    start_token: the row of the image embedding that the decoder starts with; -1: the last one.
    depth: blocks of the encoder, and of the decoder.
    mlp, remat, kernel: see `Stack`.
  """

  title = 'DALL-E mini'
  text_vocab: int = 50_264
  text_spare: int = 0
  text_length: int = 64
  pad: int = 1
  bos: int = 0
  eos: int = 2
  image_vocab: int = 16_384
  image_spare: int = 1
  start_token: int = -1
  grid: tuple[int, int] = (16, 16)
  d_model: int = 1024
  depth: int = 12
  heads: int = 16
  mlp: int = 2730
  remat: str = 'none'
  kernel: str = 'auto'
  dtype: jnp.dtype = jnp.bfloat16

  @property
  def length(self) -> int:
    """Input positions of encoder and decoder."""
    return self.text_length + self.image_length

  @property
  def padding(self) -> np.ndarray:
    """The ids of the empty caption, int32[T], which guidance contrasts a caption with."""
    ids, around = super().padding, [i for i in (self.bos, self.eos) if i >= 0]
    ids[: len(around)] = around
    return ids

  def setup(self):
    if self.d_model % self.heads:
      raise ValueError(f'a width of {self.d_model} is not divisible by {self.heads} heads; change either.')
    if self.remat not in REMATS:
      raise ValueError(f'remat {self.remat!r} is unknown; there are {", ".join(REMATS)}.')
    words, codes = self.text_vocab + self.text_spare, self.image_vocab + self.image_spare
    if self.start_token >= codes:
      raise ValueError(f'start_token is {self.start_token}; the image embedding has only {codes} rows.')
    self.start = self.start_token if self.start_token >= 0 else codes - 1
    table = lambda name, rows, axis: param(self, name, normal_init(0.02), (axis, 'embed'), (rows, self.d_model))
    self.text_embed, self.image_embed = table('text_embed', words, 'vocab'), table('image_embed', codes, 'vocab')
    self.text_positions = table('text_positions', self.text_length, None)
    self.image_positions = table('image_positions', self.image_length, None)
    self.image_head = table('image_head', codes, 'vocab')
    norm = lambda: LayerNorm(EPS, self.dtype)
    self.norm_text_in, self.norm_text_out, self.norm_image_in, self.norm_image_out = (norm() for _ in range(4))
    stack = lambda: Stack(self.depth, self.heads, self.mlp, self.dtype, self.remat, self.kernel)
    self.encoder, self.blocks = stack(), stack()

  def __call__(self, text: jax.Array, image: jax.Array) -> jax.Array:
    """Teacher-forced logits: text int32[B, T], image int32[B, I] -> float32[B, I, image_vocab].

    Row i predicts image token i. Raises ValueError for other lengths.
    """
    self.check(text, image, (self.image_length,))
    return self._logits(self.features(text, image[:, :-1]))

  def features(self, text: jax.Array, image: jax.Array) -> jax.Array:
    """Input of the head, [B, k + 1, D], for text int32[B, T] and the first k image tokens int32[B, k]."""
    x, _ = self.blocks(self._embed_start(image), self._seen(text), self.encode(text), Stream(self._patterns))
    return self.norm_image_out(x)

  def encode(self, text: jax.Array) -> jax.Array:
    """Encoded captions, int32[B, T] -> [B, T, D]."""
    x = embedding_lookup(self.text_embed, text) + self.text_positions
    x, _ = self.encoder(self.norm_text_in(x), self._seen(text))
    return self.norm_text_out(x)

  def prefill(self, text: jax.Array, image: jax.Array) -> tuple[jax.Array, Cache]:
    """Encode text int32[B, T] and the first k < I image tokens int32[B, k] into a new cache.

    Returns the logits of image token k, float32[B, image_vocab], and the cache.
    """
    self.check(text, image, range(self.image_length))
    seen = self._seen(text)
    cache = Cache(seen, (), KVCache())
    x, cache = self.blocks(self._embed_start(image), seen, self.encode(text), Stream(self._patterns), cache)
    return self._logits(self.norm_image_out(x[:, -1])), cache

  def step(self, token: jax.Array, index: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Logits of the image token after the one at `index`, `token` int32[R]: float32[R, image_vocab], and the new cache.

    `cache` is that of the prefill or of the last step, extended to have room for the token (`Cache.extend`).
    """
    x = self._embed_image(token[:, None], index + 1)
    x, cache = self.blocks(x, cache.seen, None, Stream(self._patterns, index), cache)
    return self._logits(self.norm_image_out(x[:, 0])), cache

  @property
  def _patterns(self) -> tuple[Pattern, ...]:
    """The decoder's input as a stream: the start token is the prefix, and every position sees all before it."""
    return (Pattern('full', 1, self.grid),)

  def _seen(self, text: jax.Array) -> jax.Array:
    """The positions that are not padding, bool[B, T]; the first one always is seen, as attention needs a key."""
    return self.is_word(text) | (jnp.arange(self.text_length) == 0)

  def _embed_start(self, image: jax.Array) -> jax.Array:
    """The start token and the first k image tokens, int32[B, k] -> [B, k + 1, D]."""
    return self._embed_image(jnp.pad(image, ((0, 0), (1, 0)), constant_values=self.start), 0)

  def _embed_image(self, tokens: jax.Array, first: jax.Array | int) -> jax.Array:
    """Tokens at the positions first, first + 1, ... of the decoder, int32[B, n] -> [B, n, D]."""
    positions = jnp.take(self.image_positions, first + jnp.arange(tokens.shape[1]), axis=0)
    return self.norm_image_in(embedding_lookup(self.image_embed, tokens) + positions)

  def _logits(self, x: jax.Array) -> jax.Array:
    """Features [..., D] -> float32[..., image_vocab]."""
    y = product(x, self.image_head.astype(self.dtype).T, dtype=jnp.float32)[..., : self.image_vocab]
    return constrain(y, ('batch', *(None,) * (y.ndim - 2), 'vocab'))


def caption_ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
  """The fields that follow from `config.tokenizer`, in addition to those of `models.dalle.sizes`."""
  return {'bos': tokenizer.get('start', -1), 'eos': tokenizer.get('end', -1)}


def flops(model: DALLEMini, batch: int) -> float:
  """Model FLOPs of one update of `batch` pairs (forward and backward, no causal discount, no rematerialisation)."""
  t, n, d = model.text_length, model.image_length, model.d_model
  gated = 6 * d * model.mlp  # a position's three products in the MLP, as in the rest forward
  encoder = t * (8 * d * d + gated) + 4 * t * t * d
  decoder = n * (12 * d * d + gated) + 4 * t * d * d + 4 * n * (n + t) * d  # queries and output of both attentions
  head = 2 * n * d * (model.image_vocab + model.image_spare)
  return 3.0 * batch * (model.depth * (encoder + decoder) + head)


def build(variant: str, **overrides) -> DALLEMini:
  """The network of `VARIANTS[variant]` with fields overridden.

  Raises ValueError for an unknown variant or field, and for sizes that are too small.
  """
  model = variants.build(DALLEMini, VARIANTS, variant, overrides)
  least = 1 + (model.bos >= 0) + (model.eos >= 0)
  if model.text_length < least:
    raise ValueError(
      f'DALLEMini.text_length is {model.text_length}; expected {least} or more, as bos and eos count; set '
      'config.tokenizer.length.'
    )
  return model
