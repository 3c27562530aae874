"""StoryDALL-E: a trained DALL-E continues a story ("StoryDALL-E", Maharana et al., ECCV 2022, sections 3.2 and 3.3).

Two parts are added beside the DALL-E, whose own parameters keep their names, so that retro-fitting is a strict merge of
the pretrained tree with `new='story/.*'`. The story encoder puts one vector before each caption's tokens; by
cross-attention the positions that predict image tokens look at the source frame.

Axis legend: B stories, T frames to be generated, N text_length, I image tokens, D d_model, S sentence_dim, R = B * T.
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
from dalle_jax.layers.basic import Dense, LayerNorm, boxed, normal_init, sinusoid
from dalle_jax.layers.cross import Context, CrossAttention
from dalle_jax.layers.transformer import Block
from dalle_jax.models import clip, dalle, variants

VARIANTS = dalle.VARIANTS  # of the DALL-E; the fields of what is added come beside them
PROMPT_DROPOUT = 0.2
TOKEN_SCALE = 0.1  # at the start, of the story token, so that it is about as long as a word of a trained DALL-E


def identity_init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
  """The identity between the axes of width before and after; heads are parts of the width."""
  split = next(i for i in range(1, len(shape)) if math.prod(shape[:i]) == math.prod(shape[i:]))
  return jnp.eye(math.prod(shape[:split]), dtype=dtype).reshape(shape)


class Prompt(nn.Module):
  """`length` learnt vectors [length, width]: embedding -> Dense -> tanh -> Dense (section 3.4)."""

  length: int
  width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, rng: jax.Array | None) -> jax.Array:
    """With `rng`, dropout acts."""
    init = boxed(normal_init(1.0), (None, 'embed'))
    x = self.param('embedding', init, (self.length, self.width), jnp.float32)
    dense = lambda name: Dense(
      self.width, ('embed', None), dtype=self.dtype, kernel_init=normal_init(self.width**-0.5), name=name
    )
    x = dense('out')(jnp.tanh(dense('in')(x)))
    return nn.Dropout(PROMPT_DROPOUT)(x, deterministic=rng is None, rng=rng)


class StoryEncoder(nn.Module):
  """S_global = f_self(S + S_pos): one block in which every caption sees all (section 3.2)."""

  width: int
  heads: int
  own: bool  # whether sentences are means of the DALL-E's word embeddings
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, sentences: jax.Array) -> jax.Array:
    """float[B, T, S] -> [B, T, D]."""
    x = LayerNorm(dtype=self.dtype, name='norm_in')(sentences)  # the embeddings of words are small, positions are not
    # The mean of word embeddings stays in their space, where the DALL-E already knows what words look like.
    init = identity_init if self.own else normal_init(sentences.shape[-1] ** -0.5)
    x = Dense(self.width, (None, 'embed'), dtype=self.dtype, kernel_init=init, name='linear')(x)
    x = x + sinusoid(jnp.arange(x.shape[1]), self.width).astype(self.dtype)
    # One block, whose attention hands on what it reads from the start: words of other captions look like words.
    y = LayerNorm(dtype=self.dtype, name='norm_1')(x)
    inner = normal_init(self.width**-0.5)
    attention = Attention(self.heads, self.dtype, inner, identity_init, identity_init, name='attention')
    x = x + attention(y)[0]
    y = LayerNorm(dtype=self.dtype, name='norm_2')(x)
    y = Dense(4 * self.width, ('embed', 'mlp'), dtype=self.dtype, kernel_init=inner, name='mlp_in')(y)
    outer = normal_init((8 * self.width) ** -0.5)
    x = x + Dense(self.width, ('mlp', 'embed'), dtype=self.dtype, kernel_init=outer, name='mlp_out')(jax.nn.gelu(y))
    scale = self.param('scale', boxed(nn.initializers.constant(TOKEN_SCALE), ()), (), jnp.float32)
    return x * scale.astype(self.dtype)


class ReleasedStoryEncoder(nn.Module):
  """That of the released StoryDALL-E, which is not the paper's: no positions, and a caption sees earlier ones alone."""

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
  """What is put beside a DALL-E; fields as in StoryDALLE, `layers` is how many blocks look at the source."""

  layers: int
  heads: int
  width: int
  story_encoder: str
  prompt: int
  own: bool
  activation: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, sentences: jax.Array, source: jax.Array, rng: jax.Array | None
  ) -> tuple[jax.Array, Context | None]:
    """What goes before each caption, [R, E, D], and what blocks find in the sources [B, I, D]."""
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
      context = CrossAttention(self.layers, self.heads, self.dtype, name='cross')(source)
    return jnp.concatenate(extra, 1), context


class StoryCache(struct.PyTreeNode):
  """The cache of R rows, and what their blocks find in the source frame."""

  kv: KVCache
  context: tuple[Context, ...] | None  # of each block that looks

  def extend(self, n: int) -> 'StoryCache':
    return self.replace(kv=self.kv.extend(n))

  @property
  def copies(self) -> int:
    return 1  # every frame is a row

  def repeat(self, n: int) -> 'StoryCache':
    return self.replace(kv=self.kv.repeat(n))


class StoryDALLE(nn.Module):
  """A DALL-E (parameters 'dalle') and what is added to it ('story').

  Attributes:
    retro: blocks retro, 2 retro, 3 retro, ... look at the source frame (1: all; 3: as the released model); 0: none.
      `dalle.period` must be a multiple of it.
    story_encoder: what makes the story token, which stands before each caption: 'global' (the paper's), 'released'
      (that of the public weights, where all that stands before a caption also has the first positions of text), or ''
      for no such token.
    prompt: learnt vectors before that, for prompt tuning; 0: none.
    sentences: where the embeddings of captions come from: 'own', the mean of the DALL-E's word embeddings; 'clip', the
      text tower of a CLIP; 'data', vectors of the data set.
    sentence_dim: S; 0 with 'own'.
    frames: the most frames after the source.
  """

  dalle: dalle.DALLE
  retro: int = 1
  story_encoder: str = 'global'
  prompt: int = 0
  sentences: str = 'own'
  sentence_dim: int = 0
  frames: int = 4

  def setup(self):
    if self.retro and self.dalle.depth % self.retro:
      raise ValueError(f'model.retro {self.retro} does not divide the {self.dalle.depth} layers; change either.')
    layers, d = self.dalle.depth // self.retro if self.retro else 0, self.dalle
    own = self.sentences == 'own'
    self.story = Additions(layers, d.heads, d.d_model, self.story_encoder, self.prompt, own, d.activation, d.dtype)

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
      text: int32[B, T, N], what the sentence embeddings are made of by default.
      image: int32[B, T, I], what goes in.
      source: int32[B, I], the tokens of the source frame.
      sentences: float32[B, T, S]; None for the model's own.
      read: int32[B, T, N], the captions as they go in; `text` by default.
      rng: for the dropout of the prompt; None in evaluation.
    """
    extra, context = self.conditioning(text, source, sentences, rng)
    rows = lambda x: x.reshape(-1, x.shape[-1])
    return self.dalle(rows(text if read is None else read), rows(image), extra, context)

  def conditioning(
    self, text: jax.Array, source: jax.Array, sentences: jax.Array | None = None, rng: jax.Array | None = None
  ) -> tuple[jax.Array, Context | None]:
    """What goes before each caption, [R, E, D], and keys and values of each source, the same for all its frames."""
    b, t, n = text.shape
    if t > self.frames:
      raise ValueError(f'a story has {t} frames after the source, the model takes {self.frames}; set model.frames.')
    if sentences is None:
      sentences = self.dalle.embed_caption(text.reshape(b * t, n)).reshape(b, t, -1)
    extra, context = self.story(sentences, self.dalle.embed_source(source), rng)
    if self.story_encoder == 'released':
      extra = extra + self.dalle.text_positions[: extra.shape[1]].astype(extra.dtype)
    return extra, context

  def prefill(
    self, text: jax.Array, image: jax.Array, extra: jax.Array, context: Context | None
  ) -> tuple[jax.Array, StoryCache]:
    """Reads text int32[R, N] and the first image tokens int32[R, k] after `extra`."""
    each = context and context.layers()
    logits, kv = self.dalle.prefill(text, image, extra, each)
    return logits, StoryCache(kv, each)

  def step(self, token: jax.Array, index: jax.Array, cache: StoryCache) -> tuple[jax.Array, StoryCache]:
    """As `DALLE.step`."""
    logits, kv = self.dalle.step(token, index, cache.kv, cache.context)
    return logits, cache.replace(kv=kv)


def sampler(
  model: StoryDALLE, params: Any, text: jax.Array, source: jax.Array, sentences: jax.Array | None
) -> Callable[..., Any]:
  """An `apply` for `functional.decoding.sample` with the captions of these stories as its rows, int32[R, N].

  With guidance a second half of rows follows, which differ in the caption alone. Arguments as of `StoryDALLE.look`.
  """
  extra, context = model.apply({'params': params}, text, source, sentences, method='conditioning')

  def apply(*args, method: str):
    if method == 'prefill':
      halves = len(args[0]) // len(extra)
      args = (*args, jnp.tile(extra, (halves, 1, 1)), context and context.tile(halves))
    return model.apply({'params': params}, *args, method=method)

  return apply


def embed_sentences(tower: clip.CLIP, params: Any, text: jax.Array) -> jax.Array:
  """The captions of stories by the text tower of a CLIP: int32[B, T, M] -> float32[B, T, embed_dim]."""
  vectors = tower.apply({'params': params}, text.reshape(-1, text.shape[-1]), method='encode_text')
  return vectors.reshape(*text.shape[:2], -1)


def build(variant: str, **overrides) -> StoryDALLE:
  """The DALL-E of `VARIANTS[variant]` with additions; `overrides` are fields of either.

  Raises ValueError for an unknown variant or field, or sentence embeddings that do not fit.
  """
  own = {f.name for f in dataclasses.fields(StoryDALLE)} - {'dalle', 'parent', 'name'}
  mine = {k: v for k, v in overrides.items() if k in own}
  base = dalle.build(variant, **{k: v for k, v in overrides.items() if k not in own})
  model = variants.build(StoryDALLE, {variant: {'dalle': base}}, variant, mine)
  if model.story_encoder not in ('global', 'released', ''):
    raise ValueError(f'model.story_encoder {model.story_encoder!r} is unknown; there are global, released and "".')
  if model.sentences not in ('own', 'clip', 'data'):
    raise ValueError(f'model.sentences {model.sentences!r} is unknown; there are own, clip and data.')
  return model
