"""StoryDALL-E: a trained DALL-E that continues stories ("StoryDALL-E", Maharana et al., ECCV 2022, 3.2 and 3.3).

Two modules are added to the DALL-E, whose parameters keep their names, so that retro-fitting is a strict merge of the
pretrained tree with `new='story/.*'`. The story encoder prepends one vector to the tokens of each caption, and by
cross-attention the positions that predict image tokens attend to the source frame.

Axis legend: B stories, T frames to generate, N text_length, I image tokens, D d_model, S sentence_dim, R = B * T rows,
E vectors prepended to a caption.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dalle_jax.layers.attention import Attention, KVCache
from dalle_jax.layers.basic import Dense, LayerNorm, normal_init, param, sinusoid
from dalle_jax.layers.cross import Context, CrossAttention
from dalle_jax.layers.transformer import Block
from dalle_jax.models import clip, dalle, variants

VARIANTS = dalle.VARIANTS  # of the DALL-E; fields of the added modules are given in addition to them
PROMPT_DROPOUT = 0.2
TOKEN_SCALE = 0.1  # initial scale of the story token, which makes it about as long as a word embedding of a DALL-E


def identity_init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
  """The identity as a kernel from width to width, where either side may be split into heads."""
  split = next(i for i in range(1, len(shape)) if math.prod(shape[:i]) == math.prod(shape[i:]))
  return jnp.eye(math.prod(shape[:split]), dtype=dtype).reshape(shape)


class Prompt(nn.Module):
  """Prompt tuning: `length` learnt vectors [length, width], embedding -> Dense -> tanh -> Dense (section 3.4)."""

  length: int
  width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, rng: jax.Array | None) -> jax.Array:
    """Returns float[length, width], with dropout if `rng` is given."""
    x = param(self, 'embedding', normal_init(1.0), (None, 'embed'), (self.length, self.width))
    dense = lambda name: Dense(
      self.width, ('embed', None), dtype=self.dtype, kernel_init=normal_init(self.width**-0.5), name=name
    )
    x = dense('out')(jnp.tanh(dense('in')(x)))
    return nn.Dropout(PROMPT_DROPOUT)(x, deterministic=rng is None, rng=rng)


class StoryEncoder(nn.Module):
  """S_global = f_self(S + S_pos): one block in which every caption attends to all captions (section 3.2)."""

  width: int
  heads: int
  own: bool  # whether sentence embeddings are means of the DALL-E's own word embeddings
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, sentences: jax.Array) -> jax.Array:
    """float[B, T, S] -> [B, T, D]."""
    x = LayerNorm(dtype=self.dtype, name='norm_in')(sentences)  # word embeddings are small, positions are not
    # The identity keeps the mean of word embeddings in their space, with which the DALL-E is familiar.
    init = identity_init if self.own else normal_init(sentences.shape[-1] ** -0.5)
    x = Dense(self.width, (None, 'embed'), dtype=self.dtype, kernel_init=init, name='linear')(x)
    x = x + sinusoid(jnp.arange(x.shape[1]), self.width).astype(self.dtype)
    # Identities as values and output let attention pass on what it reads from the start, words of other captions.
    y = LayerNorm(dtype=self.dtype, name='norm_1')(x)
    inner = normal_init(self.width**-0.5)
    attention = Attention(self.heads, self.dtype, inner, identity_init, identity_init, name='attention')
    x = x + attention(y)[0]
    y = LayerNorm(dtype=self.dtype, name='norm_2')(x)
    y = Dense(4 * self.width, ('embed', 'mlp'), dtype=self.dtype, kernel_init=inner, name='mlp_in')(y)
    outer = normal_init((8 * self.width) ** -0.5)
    x = x + Dense(self.width, ('mlp', 'embed'), dtype=self.dtype, kernel_init=outer, name='mlp_out')(jax.nn.gelu(y))
    scale = param(self, 'scale', nn.initializers.constant(TOKEN_SCALE), (), ())
    return x * scale.astype(self.dtype)


class ReleasedStoryEncoder(nn.Module):
  """Story encoder of the released StoryDALL-E. Unlike the paper's, it has no positions and is causal over captions."""

  width: int
  heads: int
  activation: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, sentences: jax.Array) -> jax.Array:
    """float[B, T, S] -> [B, T, D]."""
    init, t = normal_init(sentences.shape[-1] ** -0.5), sentences.shape[1]
    x = Dense(self.width, (None, 'embed'), dtype=self.dtype, kernel_init=init, name='linear')(sentences)
    return Block(1, self.heads, self.activation, self.dtype, name='block')(x, np.tri(t, dtype=bool))[0]


class Additions(nn.Module):
  """The modules added to a DALL-E. Fields as in StoryDALLE; `layers` is the number of blocks with cross-attention."""

  layers: int
  heads: int
  width: int
  story_encoder: str
  prompt: int
  own: bool
  activation: str
  dtype: jnp.dtype
  grid: tuple[int, int] | None  # rows and columns of the source, if its embeddings are without positions

  @nn.compact
  def __call__(
    self, sentences: jax.Array, source: jax.Array, rng: jax.Array | None
  ) -> tuple[jax.Array, Context | None]:
    """Vectors to prepend to each caption, [R, E, D], and keys and values of the sources for each block, or None.

    Args:
      sentences: sentence embeddings, float[B, T, S].
      source: embedded tokens of the source frames, float[B, I, D].
      rng: for the dropout of the prompt; None in evaluation.
    """
    b, t, _ = sentences.shape
    extra = [jnp.zeros((b * t, 0, self.width), self.dtype)]
    if self.prompt:
      x = Prompt(self.prompt, self.width, self.dtype, name='prompt')(rng)
      extra.append(jnp.broadcast_to(x, (b * t, *x.shape)))
    if self.story_encoder == 'global':
      x = StoryEncoder(self.width, self.heads, self.own, self.dtype, name='encoder')(sentences)
      extra.append(x.reshape(b * t, 1, self.width))
    elif self.story_encoder == 'released':
      x = ReleasedStoryEncoder(self.width, self.heads, self.activation, self.dtype, name='encoder')(sentences)
      extra.append(x.reshape(b * t, 1, self.width))
    context = None
    if self.layers:
      source = LayerNorm(dtype=self.dtype, name='norm_source')(source)
      if self.grid:
        source = source + axial_sinusoid(self.grid, self.width).astype(self.dtype)
      context = CrossAttention(self.layers, self.heads, self.dtype, name='cross')(source)
    return jnp.concatenate(extra, 1), context


def axial_sinusoid(grid: tuple[int, int], width: int) -> jax.Array:
  """Sinusoidal positions of image tokens, [I, width]: half of the features for the row, half for the column."""
  index = jnp.arange(grid[0] * grid[1])
  return jnp.concatenate([sinusoid(at, width // 2) for at in (index // grid[1], index % grid[1])], 1)


class StoryCache(struct.PyTreeNode):
  """The key-value cache of R rows, and the keys and values of their source frames."""

  kv: KVCache
  context: tuple[Context, ...] | None  # one for each block with cross-attention

  def extend(self, n: int) -> 'StoryCache':
    return self.replace(kv=self.kv.extend(n))

  @property
  def copies(self) -> int:
    return 1  # there are always several rows: every frame is one

  def repeat(self, n: int) -> 'StoryCache':
    return self.replace(kv=self.kv.repeat(n))


class StoryDALLE(nn.Module):
  """A DALL-E (parameters 'dalle') with cross-attention to a source frame and a story encoder ('story').

  Attributes:
    retro: blocks retro, 2 retro, 3 retro, ... cross-attend to the source frame (1: all; 3: as in the released model);
      0: none. `dalle.period` must be a multiple of it.
    story_encoder: module that computes the story token, which is prepended to each caption: 'global' (the paper's),
      'released' (that of the public weights, where the first text positions are added to the prepended vectors), or ''
      for no story token.
    prompt: number of learnt vectors before the story token, for prompt tuning; 0: none.
    sentences: source of the sentence embeddings of captions: 'own', the mean of the DALL-E's word embeddings; 'clip',
      the text tower of a CLIP; 'data', vectors of the data set.
    sentence_dim: S; 0 with 'own'.
    frames: maximum number of frames after the source.
  """

  dalle: dalle.DALLE
  retro: int = 1
  story_encoder: str = 'global'
  prompt: int = 0
  sentences: str = 'own'
  sentence_dim: int = 0
  frames: int = 4

  def setup(self):
    if self.retro < 0 or (self.retro and self.dalle.depth % self.retro):
      raise ValueError(f'model.retro {self.retro} does not divide the {self.dalle.depth} layers; change one of them.')
    layers, d = self.dalle.depth // self.retro if self.retro else 0, self.dalle
    own, grid = self.sentences == 'own', d.grid if d.image_positions == 'rotary' else None
    heads = math.gcd(d.heads, d.d_model)  # with `head_dim` the heads of a DALL-E need not divide its width
    self.story = Additions(layers, heads, d.d_model, self.story_encoder, self.prompt, own, d.activation, d.dtype, grid)

  def __call__(
    self,
    text: jax.Array,
    image: jax.Array,
    source: jax.Array,
    sentences: jax.Array | None = None,
    read: jax.Array | None = None,
    rng: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Teacher-forced logits of the tokens of every frame, float32[R, N, text_vocab] and [R, I, image_vocab].

    Args:
      text: int32[B, T, N], the captions, from which the model's own sentence embeddings are computed.
      image: int32[B, T, I], input image tokens of the frames.
      source: int32[B, I], image tokens of the source frame.
      sentences: float32[B, T, S], sentence embeddings; None for the model's own.
      read: int32[B, T, N], the captions as input of the DALL-E, if some are dropped there; by default `text`.
      rng: for the dropout of the prompt; None in evaluation.
    """
    extra, context = self.conditioning(text, source, sentences, rng)
    rows = lambda x: x.reshape(-1, x.shape[-1])
    return self.dalle(rows(text if read is None else read), rows(image), extra, context)

  def conditioning(
    self, text: jax.Array, source: jax.Array, sentences: jax.Array | None = None, rng: jax.Array | None = None
  ) -> tuple[jax.Array, Context | None]:
    """Vectors to prepend to each caption, [R, E, D], and keys and values of each source, shared by all its frames.

    Arguments as in `__call__`. Raises ValueError for more frames than `frames`.
    """
    b, t, n = text.shape
    if t > self.frames:
      raise ValueError(
        f'a story has {t} frames after the source, the model takes at most {self.frames}; set model.frames.'
      )
    if sentences is None:
      sentences = self.dalle.embed_caption(text.reshape(b * t, n)).reshape(b, t, -1)
    extra, context = self.story(sentences, self.dalle.embed_source(source), rng)
    if self.story_encoder == 'released' and self.dalle.image_positions != 'rotary':
      extra = extra + self.dalle.text_positions[: extra.shape[1]].astype(extra.dtype)
    return extra, context

  def prefill(
    self, text: jax.Array, image: jax.Array, extra: jax.Array, context: Context | None
  ) -> tuple[jax.Array, StoryCache]:
    """As `DALLE.prefill`, for text int32[R, N], the first image tokens int32[R, k] and what `conditioning` returns."""
    layers = None if context is None else context.layers()
    logits, kv = self.dalle.prefill(text, image, extra, layers)
    return logits, StoryCache(kv, layers)

  def step(self, token: jax.Array, index: jax.Array, cache: StoryCache) -> tuple[jax.Array, StoryCache]:
    """As `DALLE.step`."""
    logits, kv = self.dalle.step(token, index, cache.kv, cache.context)
    return logits, cache.replace(kv=kv)


def sampler(
  model: StoryDALLE, params: Any, text: jax.Array, source: jax.Array, sentences: jax.Array | None
) -> Callable[..., Any]:
  """An `apply` for `functional.decoding.sample`, whose rows are the captions of these stories, int32[R, N].

  With classifier-free guidance the rows are doubled, and the second half differs only in the caption. Arguments as in
  `StoryDALLE.conditioning`.
  """
  extra, context = model.apply({'params': params}, text, source, sentences, method='conditioning')

  def apply(*args, method: str):
    if method == 'prefill':
      copies = len(args[0]) // len(extra)
      args = (*args, jnp.tile(extra, (copies, 1, 1)), None if context is None else context.tile(copies))
    return model.apply({'params': params}, *args, method=method)

  return apply


def embed_sentences(tower: clip.CLIP, params: Any, text: jax.Array) -> jax.Array:
  """Sentence embeddings of captions by the text tower of a CLIP: int32[B, T, M] -> float32[B, T, embed_dim]."""
  vectors = tower.apply({'params': params}, text.reshape(-1, text.shape[-1]), method='encode_text')
  return vectors.reshape(*text.shape[:2], -1)


def build(variant: str, **overrides) -> StoryDALLE:
  """The DALL-E of `VARIANTS[variant]` with the added modules; `overrides` are fields of DALLE or of StoryDALLE.

  Raises ValueError for an unknown variant or field, or for an unknown `story_encoder` or `sentences`.
  """
  added = {f.name for f in dataclasses.fields(StoryDALLE)} - {'dalle', 'parent', 'name'}
  base = dalle.build(variant, **{k: v for k, v in overrides.items() if k not in added})
  fields = {k: v for k, v in overrides.items() if k in added}
  model = variants.build(StoryDALLE, {variant: {'dalle': base}}, variant, fields)
  if model.story_encoder not in ('global', 'released', ''):
    raise ValueError(f'model.story_encoder {model.story_encoder!r} is unknown; expected global, released or "".')
  if model.sentences not in ('own', 'clip', 'data'):
    raise ValueError(f'model.sentences {model.sentences!r} is unknown; expected own, clip or data.')
  return model
