"""Conversions between uint8 images and the float images of networks."""

import einops
import jax
import jax.numpy as jnp


def to_float(images: jax.Array) -> jax.Array:
  """uint8 in [0, 255] -> float32 in [-1, 1]."""
  return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(images: jax.Array) -> jax.Array:
  """float32, clipped to [-1, 1], -> uint8 in [0, 255]."""
  return jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8)


def resized(images: jax.Array, size: int) -> jax.Array:
  """Resizes square images float32[B, H, W, 3] in [-1, 1] to `size` pixels a side."""
  if images.shape[1:3] == (size, size):
    return images
  return jnp.clip(jax.image.resize(images, (len(images), size, size, 3), 'cubic'), -1, 1)


def boards(true: jax.Array, generated: jax.Array) -> jax.Array:
  """Storyboards with true frames above generated ones: two [B, F, H, W, 3] -> [B, 2 H, F W, 3]."""
  return einops.rearrange([true, generated], 'two b f h w c -> b (two h) (f w) c')
