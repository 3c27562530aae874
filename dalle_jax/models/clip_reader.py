"""Text and image embeddings of a frozen CLIP, the conditioning of unCLIP's networks.

"Hierarchical Text-Conditional Image Generation with CLIP Latents", Ramesh et al., 2022 (unCLIP), section 2.
Axis legend: B rows, N text tokens, E embed_dim of the CLIP, W width of its text tower.
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
  """A caption as encoded by CLIP's text tower.

  Attributes:
    embed: float32[B, E], the text embedding.
    hidden: [B, N, W], the hidden states after the last layer.
    mask: bool[B, N], the tokens that are not paddings; start and end of text are included.
  """

  embed: jax.Array
  hidden: jax.Array
  mask: jax.Array

  @classmethod
  def blank(cls, sizes: Mapping[str, int], rows: int = 1) -> 'Caption':
    """A dummy caption for a network's `init`; `sizes` as in `ClipReader.sizes`."""
    n = sizes['text_length']
    hidden = jnp.zeros((rows, n, sizes['text_width']))
    return cls(jnp.zeros((rows, sizes['embed_dim'])), hidden, jnp.ones((rows, n), bool))


@dataclasses.dataclass(frozen=True)
class ClipReader:
  """A CLIP with the special ids of its tokenizer.

  Attributes:
    vocab: size of the vocabulary, not counting the per-position padding ids above it.
    pad, start, end: as in `config.tokenizer`; -1 for none.
    raw: whether embeddings are as CLIP projects them (Karlo); otherwise they are scaled to length sqrt(E), so that
      their entries are about 1.
  """

  model: clip.CLIP
  vocab: int
  pad: int = -1
  start: int = -1
  end: int = -1
  raw: bool = False

  @classmethod
  def of_run(cls, config: Mapping[str, Any], raw: bool = False, dtype: Any = jnp.float32) -> 'ClipReader':
    """The reader of a run, from its config, computing in `dtype`. Raises ValueError for a run that is not a CLIP."""
    if config.get('objective', 'clip') != 'clip':
      raise ValueError(f'config.frozen.clip is a run of {config["objective"]!r}; expected a run of the objective clip.')
    c = config['tokenizer']
    special = {name: c.get(name, -1) for name in ('pad', 'start', 'end')}
    return cls(clip.of_run(config).clone(dtype=jnp.dtype(dtype)), c['vocab_size'], **special, raw=raw)

  @property
  def sizes(self) -> dict[str, int]:
    """Fields of the networks that read this CLIP."""
    m = self.model
    return dict(embed_dim=m.embed_dim, text_width=m.text_width, text_length=m.text_length)

  @property
  def empty_ids(self) -> np.ndarray:
    """The ids of the empty caption '', int32[N], the unconditional input for classifier-free guidance."""
    n = self.model.text_length
    ids = np.arange(self.vocab, self.vocab + n) if self.pad < 0 else np.full(n, self.pad)
    special = [i for i in (self.start, self.end) if i >= 0]
    ids[: len(special)] = special
    return ids.astype(np.int32)

  def token_mask(self, ids: jax.Array) -> jax.Array:
    """Which ids int32[B, N] are not paddings, bool[B, N]; if the padding is the end of text, the first one counts."""
    if self.pad < 0:
      return ids < self.vocab
    if self.pad != self.end:
      return ids != self.pad
    ends = ids == self.end
    return jnp.cumsum(ends, 1) - ends == 0

  def encode_text(self, params: Any, ids: jax.Array) -> Caption:
    """Encode captions int32[B, N], without gradients."""
    embed, hidden = self.model.apply({'params': params}, ids, method='text_features')
    return jax.lax.stop_gradient(Caption(self.scaled(embed), hidden, self.token_mask(ids)))

  def encode_image(self, params: Any, images: jax.Array) -> jax.Array:
    """Square images float32[B, H, W, 3] in [-1, 1], of any size -> float32[B, E], without gradients.

    Raises ValueError for a CLIP without an image tower.
    """
    sized = resized(images, self.model.side)
    return jax.lax.stop_gradient(self.scaled(self.model.apply({'params': params}, sized, method='image_features')))

  def scaled(self, x: jax.Array) -> jax.Array:
    """Embeddings scaled to this reader's length: sqrt(E), or as they are if `raw`."""
    x = x.astype(jnp.float32)
    return x if self.raw else normalize(x) * self.model.embed_dim**0.5


def of_run(
  build: Callable[..., Any], config: Mapping[str, Any], clip_config: Mapping[str, Any]
) -> tuple[Any, ClipReader]:
  """A network conditioned on a CLIP and the reader of that CLIP, from the configs of both runs.

  `build` is that of the network's module.
  """
  model = build(**config['model'])
  reader = ClipReader.of_run(clip_config, model.raw, model.dtype)
  return build(**{**config['model'], **reader.sizes}), reader
