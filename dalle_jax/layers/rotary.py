"""Rotary positions of a stream of text and image tokens (RoFormer, Su et al., 2021), as DALLE-pytorch has them.

Axis legend: B batch, T positions, H heads, K head_dim, R rotated features.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

BASE = 10_000.0  # of the wavelengths of text positions
HIGHEST = 5.0  # highest frequency along an image axis, in half turns
IMAGE_AS_TEXT = 8192  # the text position of all image tokens: far from any text
TEXT_AS_IMAGE = -10.0  # the row and column of all text; those of image tokens are in [-1, 1]


@dataclasses.dataclass(frozen=True)
class Rotary:
  """Positions of a stream: `extra` vectors, text up to position `prefix`, then a `grid` of image tokens.

  A third of the features of a head (rounded down to an even number) is rotated by the text position, a third by the
  image row and a third by the column. The text begins at position 0, whatever comes before it.
  """

  extra: int
  prefix: int
  grid: tuple[int, int]

  def angles(self, head_dim: int, n: int, index: jax.Array | None = None) -> jax.Array:
    """Angles of the first n positions, float32[n, R] in radians, or of image token `index` int32[], float32[1, R].

    Positions after the image have the angles of its last token.
    """
    table = _table(self, head_dim)
    if index is None:
      return jnp.asarray(table[np.minimum(np.arange(n), len(table) - 1)])
    return jax.lax.dynamic_slice_in_dim(jnp.asarray(table), self.prefix + index, 1)


@functools.lru_cache(maxsize=16)
def _table(rotary: Rotary, head_dim: int) -> np.ndarray:
  """Angles of all positions, float32[prefix + h * w, R]; computed in float64, as those of image tokens are large."""
  size = head_dim // 3
  count, (h, w) = size // 2, rotary.grid
  text = BASE ** (-np.arange(count) * 2 / size)
  image = np.linspace(1.0, HIGHEST, count) * math.pi
  rows, columns = (np.linspace(-1, 1, n) for n in (h, w))
  before = np.ones(rotary.prefix)
  positions = (
    (np.concatenate([np.arange(rotary.prefix) - rotary.extra, np.full(h * w, IMAGE_AS_TEXT)]), text),
    (np.concatenate([TEXT_AS_IMAGE * before, np.repeat(rows, w)]), image),
    (np.concatenate([TEXT_AS_IMAGE * before, np.tile(columns, h)]), image),
  )
  # Rounded before the product, as the angles of public checkpoints were computed in float32.
  angles = [np.outer(np.float32(p), np.float32(frequencies)) for p, frequencies in positions]
  return np.repeat(np.concatenate(angles, 1), 2, axis=1)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
  """Rotates neighbouring pairs of the first R features of x[B, T, H, K] by angles[T, R], in float32."""
  size = angles.shape[-1]
  turned, rest = x[..., :size].astype(jnp.float32), x[..., size:]
  odd, even = turned[..., 1::2], turned[..., ::2]
  quarter = jnp.stack([-odd, even], -1).reshape(turned.shape)
  turned = turned * jnp.cos(angles)[:, None] + quarter * jnp.sin(angles)[:, None]
  return jnp.concatenate([turned.astype(x.dtype), rest], -1)
