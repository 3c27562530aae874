"""The captions of a story as one text a frame, in which a special token marks the caption of that frame.

So a text encoder that knows nothing of stories gives each frame a vector that knows the whole story (StoryGANc,
Maharana et al., 2022, section 3.5: RoBERTa or CLIP).

Axis legend: B stories, T captions, N tokens a caption, M tokens a told story, R = B * T.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.layers.basic import Embed, LayerNorm, boxed, normal_init
from dalle_jax.layers.transformer import Stack
from dalle_jax.models import clip, roberta
from dalle_jax.models.pooling import masked_mean


@dataclasses.dataclass(frozen=True)
class SpecialIds:
  """Which ids are words, and those around them.

  Attributes:
    count: how many ids there are but for the paddings that each position has for itself.
    marker: the id that marks a caption.
    pad, start, end: as in `config.tokenizer`.
  """

  count: int
  marker: int
  pad: int = -1
  start: int = -1
  end: int = -1

  def among(self, text: jax.Array) -> jax.Array:
    """bool of the shape of `text`: neither padding nor start nor end."""
    return (text < self.count) & (text != self.pad) & (text != self.start) & (text != self.end)


def mark_captions(text: jax.Array, words: SpecialIds, length: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Captions int32[B, T, N] -> told stories int32[R, M], the positions that are no padding and those of the caption
  told, marker included, bool[R, M].

  Row (b, t) has the words of all captions of story b in order, the marker before those of caption t, paddings behind.
  `length`: M, to fit which captions are cut to as many tokens as leave room for all; 0: that of all captions.
  """
  if length:
    each = (length - 1 - (words.start >= 0) - (words.end >= 0)) // text.shape[1]
    text = text[:, :, : each + (words.start >= 0)]  # the start of a caption is no word, and left out
  b, t, n = text.shape
  known = jnp.concatenate([text.reshape(b, t * n), jnp.full((b, 1), words.marker, text.dtype)], 1)
  seen = jnp.concatenate([words.among(known[:, :-1]), jnp.ones((b, 1), bool)], 1)
  order = np.stack([np.insert(np.arange(t * n), i * n, t * n) for i in range(t)])  # (T, T N + 1)
  own = (order // n == np.arange(t)[:, None]) | (order == t * n)
  rows = lambda x: x.reshape(b * t, -1)
  ids, seen, own = rows(known[:, order]), rows(seen[:, order]), rows(jnp.broadcast_to(own, (b, *own.shape)))
  first = jnp.argsort(~seen, axis=1, stable=True)  # words move to the front
  ids, seen, own = (jnp.take_along_axis(x, first, 1) for x in (ids, seen, own))
  if words.start >= 0:
    put = lambda x, value: jnp.concatenate([jnp.full((len(x), 1), value, x.dtype), x], 1)
    ids, seen, own = put(ids, words.start), put(seen, True), put(own, False)
  if words.end >= 0:
    ids, seen, own = (jnp.pad(x, ((0, 0), (0, 1))) for x in (ids, seen, own))
  most = length or ids.shape[1]
  fit = lambda x: jnp.pad(x[:, :most], ((0, 0), (0, max(0, most - x.shape[1]))))
  ids, seen, own = fit(ids), fit(seen), fit(own & seen)
  if words.end >= 0:
    last = seen.sum(1)[:, None] == jnp.arange(most)
    ids, seen = jnp.where(last, words.end, ids), seen | last
  padding = words.count + jnp.arange(most) if words.pad < 0 else words.pad
  return jnp.where(seen, ids, padding), seen, own


class CaptionEncoder(nn.Module):
  """A small transformer that learns with what uses it, for where there are no pretrained weights.

  Its ids are those of the captions and, behind them, the marker.
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
    ids, seen, own = mark_captions(text, SpecialIds(count, self.text_vocab, self.pad))
    shape = (self.frames * self.text_length + 1, self.width)
    positions = self.param('positions', boxed(normal_init(0.02), (None, 'embed')), shape, jnp.float32)
    x = Embed(self.text_vocab + 1, self.width, dtype=self.dtype, name='embed')(jnp.where(seen, ids, 0))
    x = x + positions[: x.shape[1]].astype(self.dtype)
    x, _ = Stack(self.layers, self.heads, dtype=self.dtype, name='encoder')(x, seen[:, None])
    x = masked_mean(LayerNorm(name='norm_out')(x), own)
    return x.reshape(*text.shape[:2], -1)


@dataclasses.dataclass(frozen=True)
class Tower:
  """A frozen text encoder, by which captions become vectors: the run of a CLIP or a RoBERTa.

  Attributes:
    each: the most words of a caption that are read; fewer where the encoder has no room for those of a whole story.
    width: of the vectors.
  """

  model: clip.CLIP | roberta.RoBERTa
  words: SpecialIds
  each: int
  width: int

  @classmethod
  def of_run(cls, kind: str, config: Mapping[str, Any], each: int) -> 'Tower':
    """Raises ValueError for a CLIP without a start of text, which is what marks captions there; in a RoBERTa it is
    the last id, <mask>.
    """
    c = config['tokenizer']
    special = {name: c.get(name, -1) for name in ('pad', 'start', 'end')}
    if kind == 'roberta':
      model = roberta.of_run(config)
      return cls(model, SpecialIds(model.vocab_size, model.vocab_size - 1, **special), each, model.width)
    tower = clip.of_run(config)
    if special['start'] < 0:
      raise ValueError(
        'this CLIP has no start of text, by which the caption of a frame could be marked; use captions="own".'
      )
    return cls(tower, SpecialIds(c['vocab_size'], special['start'], **special), each, tower.embed_dim)

  def __call__(self, params: Any, text: jax.Array) -> jax.Array:
    """int32[B, T, N] -> float32[B, T, width]: what RoBERTa makes of the caption's words, what CLIP makes of the story.

    Not differentiated: the tower is frozen.
    """
    b, t, n = text.shape
    if isinstance(self.model, clip.CLIP):
      ids, _, _ = mark_captions(text, self.words, self.model.text_length)
      x = self.model.apply({'params': params}, ids, method='encode_text') * self.width**0.5  # entries of size 1
    else:
      ids, _, own = mark_captions(text, self.words, min(self.model.length, t * min(self.each, n) + 3))
      x = masked_mean(self.model.apply({'params': params}, ids)[0], own)
    return jax.lax.stop_gradient(x.reshape(b, t, -1))
