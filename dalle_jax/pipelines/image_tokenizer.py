"""Images to image tokens and back by a trained VQGAN or dVAE: `ImageTokenizer.load('runs/mine/vqgan')`."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dalle_jax.data import ops
from dalle_jax.functional.pixels import to_float, to_uint8
from dalle_jax.models import image_tokenizer
from dalle_jax.pipelines.rerank import in_batches
from dalle_jax.training import checkpoint, sharding


class ImageTokenizer:
  """A trained image tokenizer for images of one size.

  Attributes:
    network: a network of `models.image_tokenizer.TOKENIZERS`.
    image_size: side of the images in pixels.
    grid: rows and columns of image tokens.
    num_codes: tokens are in [0, num_codes).
    frozen: paths of the frozen runs that it was trained with, by name.
  """

  BATCH = 64  # images per call, by default

  def __init__(self, run: checkpoint.Run, image_size: int = 0, mesh: Mesh | None = None, rules: sharding.Rules = ()):
    """`image_size` is by default the size of training.

    Raises ValueError for a size that the network does not support.
    """
    self.config, self.step, self.frozen = run.config, run.step, run.frozen
    self.mesh, self.rules = mesh, rules
    self.network = image_tokenizer.of_run(run.config)
    self.image_size = image_size or run.config['data']['image_size']
    self.grid, self.num_codes = self.network.grid(self.image_size), int(self.network.num_codes)
    self.params = run.network('vqgan')
    program = functools.partial(sharding.program, mesh=mesh, rules=rules)
    self._encode = program(encode_images, self.network)
    self._decode = program(decode_codes, self.network, self.grid)

  @classmethod
  def load(
    cls,
    path: str | Path,
    *,
    image_size: int = 0,
    mesh: Mesh | None = None,
    rules: sharding.Rules = (),
    step: int | None = None,
  ) -> 'ImageTokenizer':
    """Loads a run as `generator.Generator.load` does; `image_size`, if given, replaces the size of training.

    Raises FileNotFoundError when there is no checkpoint (of that `step`), ValueError when a run is of another kind.
    """
    run = checkpoint.load_run(path, mesh=mesh, rules=rules, step=step)
    if run.config.get('objective') not in image_tokenizer.TOKENIZERS:
      kinds = ', '.join(image_tokenizer.TOKENIZERS)
      raise ValueError(f'{path} is a run of {run.config.get("objective")!r}; expected an image tokenizer: {kinds}.')
    return cls(run, image_size, mesh, rules)

  def encode(self, images: np.ndarray | Sequence[Any], batch_size: int = BATCH) -> np.ndarray:
    """Images uint8[B, H, W, 3] of the image size -> image tokens int32[B, I], row by row; `batch_size` images per call.

    `images` may also be a list of images of any size and kind (paths, bytes, PIL images, arrays), which are cropped.
    """
    if isinstance(images, (list, tuple)) and images:
      images = np.stack([ops.open_image(x, self.image_size, f'image {i}') for i, x in enumerate(images)])
    ops.check_images(images, self.image_size)
    with sharding.within(self.mesh, self.rules):
      return in_batches(lambda x: self._encode(self.params, x), images, batch_size)

  def decode(self, tokens: np.ndarray, batch_size: int = BATCH) -> np.ndarray:
    """Image tokens int32[B, I] -> uint8[B, H, W, 3]. Raises ValueError for other shapes or tokens."""
    tokens, length = np.asarray(tokens), self.grid[0] * self.grid[1]
    if tokens.ndim != 2 or tokens.shape[1] != length or not len(tokens) or tokens.dtype.kind not in 'iu':
      raise ValueError(f'image tokens are {tokens.dtype}{list(tokens.shape)}; expected int32[B, {length}].')
    if not 0 <= tokens.min() <= tokens.max() < self.num_codes:
      raise ValueError(f'image tokens range from {tokens.min()} to {tokens.max()}; expected 0 to {self.num_codes - 1}.')
    with sharding.within(self.mesh, self.rules):
      return in_batches(lambda x: self._decode(self.params, x), tokens.astype(np.int32), batch_size)

  def reconstruct(self, images: np.ndarray | Sequence[Any]) -> np.ndarray:
    """Images, as `encode` takes them, encoded to image tokens and decoded again: uint8[B, H, W, 3]."""
    return self.decode(self.encode(images))


# --- Under jit


def encode_images(network: image_tokenizer.ImageTokenizer, params: Any, images: jax.Array) -> jax.Array:
  """Images uint8[B, H, W, 3] -> image tokens int32[B, I]."""
  codes = network.apply({'params': params}, to_float(images), method='encode')
  return codes.reshape(len(images), -1)


def decode_codes(
  network: image_tokenizer.ImageTokenizer, grid: tuple[int, int], params: Any, tokens: jax.Array
) -> jax.Array:
  """Image tokens int32[B, I] -> images uint8[B, H, W, 3]."""
  return to_uint8(network.apply({'params': params}, tokens.reshape(-1, *grid), method='decode_codes'))
