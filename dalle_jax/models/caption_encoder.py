"""Marked stories: all captions of a story as one text per frame, with a marker token before the caption of that frame.

A text encoder that knows nothing of stories thus gives each frame a vector that depends on the whole story (StoryGANc,
Maharana et al., 2022, section 3.5: RoBERTa or CLIP).

Axis legend: B stories, T captions, N tokens per caption, M tokens per marked story, R = B * T.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.layers.basic import Embed, LayerNorm, normal_init, param
from dalle_jax.layers.transformer import Stack
from dalle_jax.models import clip, roberta
from dalle_jax.models.pooling import masked_mean


@dataclasses.dataclass(frozen=True)
class SpecialIds:
  """The special ids of a vocabulary.

  Attributes:
    count: size of the vocabulary, not counting the per-position padding ids above it.
    marker: the id that marks a caption.
    pad, start, end: as in `config.tokenizer`; -1 for none.
  """

  count: int
  marker: int
  pad: int = -1
  start: int = -1
  end: int = -1

  def is_word(self, text: jax.Array) -> jax.Array:
    """Which ids are neither padding nor start nor end, bool of the shape of `text`."""
    return (text < self.count) & (text != self.pad) & (text != self.start) & (text != self.end)


def mark_captions(text: jax.Array, special: SpecialIds, length: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Turn captions int32[B, T, N] into marked stories, one row for each caption.

  Row (b, t) holds the words of all captions of story b in order, the marker before those of caption t, and paddings at
  the end. For a story of two captions "a b" and "c d" in rows of 8 tokens, where `s` is the start, `e` the end, `m` the
  marker and `.` a padding:

            caption 0 marked    caption 1 marked
    ids     s m a b c d e .     s a b m c d e .
    mask    x x x x x x x .     x x x x x x x .
    own     . x x x . . . .     . . . x x x . .

  Without a start or an end in the vocabulary, `s` or `e` is left out.

  Args:
    text: the captions, each with its own start, end and paddings.
    special: the special ids of the text encoder's vocabulary.
    length: M; captions are cut to equal lengths that make the story fit. 0: as long as all captions together.

  Returns:
    ids int32[R, M]; mask bool[R, M], the positions that are not paddings; and own bool[R, M], those of the marker and
    of the caption behind it.
  """
  if length:
    text = _cut(text, special, length)
  ids, mask, own = _wrap(*_join(text, special), special, length)
  positions = jnp.arange(ids.shape[1])
  padding = special.count + positions if special.pad < 0 else special.pad
  return jnp.where(mask, ids, padding), mask, own


def _cut(text: jax.Array, special: SpecialIds, length: int) -> jax.Array:
  """Cut captions so that together, with the marker, a start and an end, they have at most `length` tokens."""
  has_start, has_end = special.start >= 0, special.end >= 0
  words = (length - 1 - int(has_start) - int(has_end)) // text.shape[1]
  return text[:, :, : words + 1] if has_start else text[:, :, :words]  # a caption's own start is dropped later


def _join(text: jax.Array, special: SpecialIds) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Captions [B, T, N] -> ids, mask and own [R, T * N + 1], where all that is not a word has moved to the end."""
  b, t, n = text.shape
  marker = t * n  # its index: behind the tokens of the story
  # Row i lists the tokens of the story in order, with the marker before caption i.
  order = np.stack([np.insert(np.arange(t * n), i * n, marker) for i in range(t)])  # (T, T N + 1)
  own = (order == marker) | (order // n == np.arange(t)[:, None])
  story = jnp.concatenate([text.reshape(b, t * n), jnp.full((b, 1), special.marker, text.dtype)], 1)
  ids = story[:, order]  # (B, T, T N + 1)
  mask = special.is_word(ids) | (order == marker)
  ids, mask, own = (x.reshape(b * t, -1) for x in (ids, mask, jnp.broadcast_to(own, ids.shape)))
  words_first = jnp.argsort(~mask, axis=1, stable=True)
  ids, mask, own = (jnp.take_along_axis(x, words_first, 1) for x in (ids, mask, own))
  return ids, mask, own & mask


def _wrap(
  ids: jax.Array, mask: jax.Array, own: jax.Array, special: SpecialIds, length: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Put the start before and the end behind the words, and cut or pad rows to `length` tokens (0: all)."""
  before, after = int(special.start >= 0), int(special.end >= 0)
  ids, mask, own = (jnp.pad(x, ((0, 0), (before, after))) for x in (ids, mask, own))
  if before:
    ids, mask = ids.at[:, 0].set(special.start), mask.at[:, 0].set(True)
  size = length or ids.shape[1]
  missing = max(0, size - ids.shape[1])
  ids, mask, own = (jnp.pad(x[:, :size], ((0, 0), (0, missing))) for x in (ids, mask, own))
  if after:
    is_end = jnp.arange(size) == mask.sum(1, keepdims=True)
    ids, mask = jnp.where(is_end, special.end, ids), mask | is_end
  return ids, mask, own


class CaptionEncoder(nn.Module):
  """A small transformer over marked stories, trained with the model that uses it, for want of pretrained weights.

  Its ids are those of the captions, followed by the marker.
  """

  text_vocab: int
  pad: int
  text_length: int
  frames: int
  width: int
  layers: int
  heads: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, text: jax.Array) -> jax.Array:
    """int32[B, T, N] -> float32[B, T, width]."""
    count = self.text_vocab - (self.text_length if self.pad < 0 else 0)
    ids, mask, own = mark_captions(text, SpecialIds(count, self.text_vocab, self.pad))
    shape = (self.frames * self.text_length + 1, self.width)
    positions = param(self, 'positions', normal_init(0.02), (None, 'embed'), shape)
    x = Embed(self.text_vocab + 1, self.width, dtype=self.dtype, name='embed')(jnp.where(mask, ids, 0))
    x = x + positions[: x.shape[1]].astype(self.dtype)
    x, _ = Stack(self.layers, self.heads, dtype=self.dtype, name='encoder')(x, mask[:, None])
    x = masked_mean(LayerNorm(name='norm_out')(x), own)
    return x.reshape(*text.shape[:2], -1)


@dataclasses.dataclass(frozen=True)
class Tower:
  """A frozen text encoder, a CLIP or a RoBERTa, that turns the captions of a story into vectors.

  Attributes:
    special: the special ids of its vocabulary.
    each: the most words of a caption that it reads; fewer if the words of a whole story do not fit into its length.
    width: size of the vectors.
  """

  model: clip.CLIP | roberta.RoBERTa
  special: SpecialIds
  each: int
  width: int

  @classmethod
  def of_run(cls, kind: str, config: Mapping[str, Any], each: int) -> 'Tower':
    """The encoder of a run, from its config.

    The marker is the start of text in a CLIP and the last id, <mask>, in a RoBERTa. Raises ValueError for a CLIP
    without a start of text.
    """
    c = config['tokenizer']
    ids = {name: c.get(name, -1) for name in ('pad', 'start', 'end')}
    if kind == 'roberta':
      model = roberta.of_run(config)
      return cls(model, SpecialIds(model.vocab_size, model.vocab_size - 1, **ids), each, model.width)
    tower = clip.of_run(config)
    if ids['start'] < 0:
      raise ValueError(
        'this CLIP has no start of text to mark the caption of a frame with; set config.model.captions="own".'
      )
    return cls(tower, SpecialIds(c['vocab_size'], ids['start'], **ids), each, tower.embed_dim)

  def __call__(self, params: Any, text: jax.Array) -> jax.Array:
    """int32[B, T, N] -> float32[B, T, width], without gradients.

    A RoBERTa gives the mean of its hidden states over the marked caption, a CLIP its embedding of the marked story.
    """
    b, t, n = text.shape
    if isinstance(self.model, clip.CLIP):
      ids, _, _ = mark_captions(text, self.special, self.model.text_length)
      x = self.model.apply({'params': params}, ids, method='encode_text') * self.width**0.5  # entries of about 1
    else:
      ids, _, own = mark_captions(text, self.special, min(self.model.length, t * min(self.each, n) + 3))
      x = masked_mean(self.model.apply({'params': params}, ids)[0], own)
    return jax.lax.stop_gradient(x.reshape(b, t, -1))
