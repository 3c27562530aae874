"""Pooling and normalisation of vectors, shared by the text encoders."""

import jax
import jax.numpy as jnp


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Mean of x[B, N, D] over the positions in `mask`, bool[B, N]: [B, D]; zeros for a row whose mask is empty."""
  mask = mask[..., None]
  return jnp.where(mask, x, 0).sum(1) / jnp.maximum(mask.sum(1), 1)


def normalize(x: jax.Array) -> jax.Array:
  """Vectors [..., D] scaled to unit length."""
  return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)
