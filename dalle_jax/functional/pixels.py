"""Pixels as pictures store them and as networks take them."""

import jax
import jax.numpy as jnp


def to_float(images: jax.Array) -> jax.Array:
  """uint8 in [0, 255] -> float32 in [-1, 1]."""
  return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(images: jax.Array) -> jax.Array:
  """float32, clipped to [-1, 1], -> uint8 in [0, 255]."""
  return jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8)


def resized(images: jax.Array, size: int) -> jax.Array:
  """Square pictures float32[B, H, W, 3] in [-1, 1] brought to `size` pixels a side."""
  if images.shape[1:3] == (size, size):
    return images
  return jnp.clip(jax.image.resize(images, (len(images), size, size, 3), 'cubic'), -1, 1)


def boards(true: jax.Array, drawn: jax.Array) -> jax.Array:
  """The frames of each story in a row, true ones above those drawn: two [B, F, H, W, 3] -> [B, 2 H, F W, 3]."""
  b, f, h, w, _ = true.shape
  return jnp.stack([true, drawn], 1).swapaxes(2, 3).reshape(b, 2 * h, f * w, 3)
