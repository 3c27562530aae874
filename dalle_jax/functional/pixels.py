"""Pixels as pictures store them and as networks take them."""

import jax
import jax.numpy as jnp


def to_float(images: jax.Array) -> jax.Array:
  """uint8 in [0, 255] -> float32 in [-1, 1]."""
  return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(images: jax.Array) -> jax.Array:
  """float32, clipped to [-1, 1], -> uint8 in [0, 255]."""
  return jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8)
