"""The step of a diffusion as a vector that networks read."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.layers.basic import Dense


def waves(t: jax.Array, width: int) -> jax.Array:
  """Cosines, then sines, of t[B] at wavelengths 2 pi to about 20,000 pi: float32[B, width], width even."""
  half = width // 2
  angle = t.astype(jnp.float32)[:, None] * 1e4 ** (-jnp.arange(half, dtype=jnp.float32) / half)
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


class TimeEmbed(nn.Module):
  """int32[B] -> [B, features]: `waves` of `width` through two linear maps."""

  width: int
  features: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, t: jax.Array) -> jax.Array:
    """Raises ValueError for an odd width."""
    if self.width % 2:
      raise ValueError(f'the waves of a step of diffusion need an even width, not {self.width}; change the channels.')
    x = waves(t, self.width).astype(self.dtype)
    x = jax.nn.swish(Dense(self.features, ('embed', None), dtype=self.dtype, name='in')(x))
    return Dense(self.features, ('embed', None), dtype=self.dtype, name='out')(x)
