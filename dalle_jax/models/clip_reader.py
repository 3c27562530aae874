"""What the networks of unCLIP read of captions and pictures, by a frozen CLIP.

"Hierarchical Text-Conditional Image Generation with CLIP Latents", Ramesh et al., 2022 (unCLIP), section 2.
Axis legend: B rows, N text tokens, E the space of CLIP, W width of its text tower.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dalle_jax.functional.pixels import resized
from dalle_jax.models import clip
from dalle_jax.models.pooling import normalize


class Caption(struct.PyTreeNode):
  """A caption as CLIP knows it.

  Attributes:
    embed: float32[B, E].
    hidden: [B, N, W], each token after the last layer.
    mask: bool[B, N], the tokens that are no padding, those around the words among them.
  """

  embed: jax.Array
  hidden: jax.Array
  mask: jax.Array

  @classmethod
  def blank(cls, sizes: Mapping[str, int], rows: int = 1) -> 'Caption':
    """Of the `ClipReader.sizes` that a network has, to make its parameters with."""
    n = sizes['text_length']
    hidden = jnp.zeros((rows, n, sizes['text_width']))
    return cls(jnp.zeros((rows, sizes['embed_dim'])), hidden, jnp.ones((rows, n), bool))


@dataclasses.dataclass(frozen=True)
class ClipReader:
  """A CLIP with its words. Embeddings are of length sqrt(E), so that entries are about 1, or, with `raw`, as projected.

  Attributes:
    vocab: how many ids there are but for the paddings that each position has for itself.
    pad, start, end: as in `config.tokenizer`.
  """

  model: clip.CLIP
  vocab: int
  pad: int = -1
  start: int = -1
  end: int = -1
  raw: bool = False

  @classmethod
  def of_run(cls, config: Mapping[str, Any], raw: bool = False, dtype: Any = jnp.float32) -> 'ClipReader':
    """That of a run from its config, computing in `dtype`. Raises ValueError for a run of another kind."""
    if config.get('objective', 'clip') != 'clip':
      raise ValueError(f'config.frozen.clip is a run of {config["objective"]!r}; expected one of the objective clip.')
    c = config['tokenizer']
    special = {name: c.get(name, -1) for name in ('pad', 'start', 'end')}
    return cls(clip.of_run(config).clone(dtype=dtype), c['vocab_size'], **special, raw=raw)

  @property
  def sizes(self) -> dict[str, int]:
    """The fields of the networks that follow from it."""
    m = self.model
    return dict(embed_dim=m.embed_dim, text_width=m.text_width, text_length=m.text_length)

  @property
  def empty_ids(self) -> np.ndarray:
    """The ids of '', int32[N]: what stands for no caption."""
    n = self.model.text_length
    ids = np.arange(self.vocab, self.vocab + n) if self.pad < 0 else np.full(n, self.pad)
    around = [i for i in (self.start, self.end) if i >= 0]
    ids[: len(around)] = around
    return ids.astype(np.int32)

  def token_mask(self, ids: jax.Array) -> jax.Array:
    """Which of int32[B, N] are no padding; where that is the end of text, the first one counts."""
    if self.pad < 0:
      return ids < self.vocab
    if self.pad != self.end:
      return ids != self.pad
    ends = ids == self.end
    return jnp.cumsum(ends, 1) - ends == 0

  def encode_text(self, params: Any, ids: jax.Array) -> Caption:
    """Captions int32[B, N]; not differentiated, as CLIP is frozen."""
    embed, hidden = self.model.apply({'params': params}, ids, method='text_features')
    return jax.lax.stop_gradient(Caption(self.scaled(embed), hidden, self.token_mask(ids)))

  def encode_image(self, params: Any, images: jax.Array) -> jax.Array:
    """Square pictures float32[B, H, W, 3] in [-1, 1], of any size -> float32[B, E]; not differentiated.

    Raises ValueError for a CLIP without a tower for pictures.
    """
    sized = resized(images, self.model.side)
    return jax.lax.stop_gradient(self.scaled(self.model.apply({'params': params}, sized, method='image_features')))

  def scaled(self, x: jax.Array) -> jax.Array:
    """Embeddings of any length at that of this reader."""
    x = x.astype(jnp.float32)
    return x if self.raw else normalize(x) * self.model.embed_dim**0.5


def of_run(
  build: Callable[..., Any], config: Mapping[str, Any], clip_config: Mapping[str, Any]
) -> tuple[Any, ClipReader]:
  """A network that reads a CLIP, from the config of its run and that of the CLIP; `build` is of the network's file."""
  model = build(**config['model'])
  reader = ClipReader.of_run(clip_config, model.raw, model.dtype)
  return build(**{**config['model'], **reader.sizes}), reader
