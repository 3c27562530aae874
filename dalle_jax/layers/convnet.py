"""Convolutional blocks of VQGAN encoders and decoders (Esser et al., 2021, appendix); NHWC throughout.

Names of parameters follow the public implementation (norm1, conv1, nin_shortcut, proj_out, ...), so that its weights
can be read in. Parameters are float32; computation is in `dtype`, norms and softmax in float32.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.layers.basic import Conv, GroupNorm


class ResBlock(nn.Module):
  """GroupNorm, swish, conv, twice, around a shortcut: `[B, H, W, C] -> [B, H, W, features]`."""

  features: int
  dtype: jnp.dtype = jnp.float32
  groups: int = 32  # of the norms

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    h = jax.nn.swish(GroupNorm(self.groups, dtype=self.dtype, name='norm1')(x))
    h = Conv(self.features, dtype=self.dtype, name='conv1')(h)
    h = jax.nn.swish(GroupNorm(self.groups, dtype=self.dtype, name='norm2')(h))
    h = Conv(self.features, dtype=self.dtype, name='conv2')(h)
    if x.shape[-1] != self.features:
      x = Conv(self.features, 1, dtype=self.dtype, name='nin_shortcut')(x)
    return x + h


class AttnBlock(nn.Module):
  """Residual attention of one head among all positions of `[B, H, W, C]`."""

  dtype: jnp.dtype = jnp.float32
  groups: int = 32  # of the norm

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    b, h, w, c = x.shape
    y = GroupNorm(self.groups, dtype=self.dtype, name='norm')(x)
    q, k, v = (Conv(c, 1, dtype=self.dtype, name=name)(y).reshape(b, h * w, c) for name in 'qkv')
    scores = jnp.einsum('bqc,bkc->bqk', q, k, preferred_element_type=jnp.float32) * c**-0.5
    weights = jax.nn.softmax(scores).astype(self.dtype)
    y = jnp.einsum('bqk,bkc->bqc', weights, v).reshape(b, h, w, c)
    return x + Conv(c, 1, dtype=self.dtype, name='proj_out')(y)


class Downsample(nn.Module):
  """Halves height and width by a strided convolution, padded at the bottom and the right alone."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return Conv(x.shape[-1], stride=2, padding=((0, 1), (0, 1)), dtype=self.dtype, name='conv')(x)


class Upsample(nn.Module):
  """Doubles height and width: nearest neighbour, then a convolution."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return Conv(x.shape[-1], dtype=self.dtype, name='conv')(x.repeat(2, axis=1).repeat(2, axis=2))


def space_to_depth(x: jax.Array, patch: int) -> jax.Array:
  """`[B, H, W, C] -> [B, H / patch, W / patch, patch * patch * C]`."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, h // patch, w // patch, patch * patch * c)


def depth_to_space(x: jax.Array, patch: int) -> jax.Array:
  """The inverse of `space_to_depth`."""
  b, h, w, c = x.shape
  x = x.reshape(b, h, w, patch, patch, c // patch**2).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, h * patch, w * patch, c // patch**2)
