"""Image tokenizers, which turn images into codes and codes into images: a VQGAN, the dVAE of OpenAI, or the
DiscreteVAE of DALLE-pytorch, depending on the run."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax

from dalle_jax.models import discrete_vae, dvae, vqgan

TOKENIZERS = {'vqgan': vqgan, 'dvae': dvae, 'discrete_vae': discrete_vae}


class ImageTokenizer(Protocol):
  """The common interface of all of them; call `encode` and `decode_codes` through `apply`."""

  num_codes: int
  apply: Any

  def grid(self, image_size: int) -> tuple[int, int]:
    """Rows and columns of codes of a square image. Raises ValueError if the factor does not divide its size."""

  def encode(self, images: jax.Array) -> jax.Array:
    """float32[B, H, W, 3] in [-1, 1] -> codes int32[B, h, w]."""

  def decode_codes(self, codes: jax.Array) -> jax.Array:
    """int32[B, h, w] in [0, num_codes) -> float32[B, H, W, 3], about [-1, 1]."""


def of_run(config: Mapping[str, Any]) -> ImageTokenizer:
  """The network of a run, from its config; a VQGAN if that names no objective. Raises ValueError for other runs."""
  kind = config.get('objective', 'vqgan')
  if kind not in TOKENIZERS:
    raise ValueError(
      f'config.frozen.vqgan is a run of {kind!r}; expected an image tokenizer, one of {", ".join(TOKENIZERS)}.'
    )
  return TOKENIZERS[kind].build(**config['model'])
