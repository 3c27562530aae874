"""Embedding of diffusion timesteps."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.layers.basic import Dense, sinusoid


class TimeEmbed(nn.Module):
  """int32[B] -> [B, features]: a sinusoidal embedding of `width` through two linear layers."""

  width: int
  features: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, t: jax.Array) -> jax.Array:
    """Raises ValueError for an odd width."""
    x = jnp.roll(sinusoid(t, self.width), self.width // 2, axis=-1).astype(self.dtype)  # cosines first
    x = jax.nn.swish(Dense(self.features, ('embed', None), dtype=self.dtype, name='in')(x))
    return Dense(self.features, ('embed', None), dtype=self.dtype, name='out')(x)
