"""Convolutional blocks of VQGANs (Esser et al., 2021, appendix) and of U-Nets (Dhariwal and Nichol, 2021); NHWC.

Parameter names follow the public VQGAN (norm1, conv1, nin_shortcut, proj_out, ...), so that its weights can
be imported. Parameters are float32; computation is in `dtype`, norms and softmax in float32.
"""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.layers import kernels
from dalle_jax.layers.basic import Conv, Dense, GroupNorm, Init, constrain, num_shards

SHIFTS = ('add', 'scale')
RESAMPLES = ('', 'down', 'up')


class ResBlock(nn.Module):
  """Residual block of twice (GroupNorm, swish, conv): `[B, H, W, C] -> [B, H, W, features]`.

  Attributes:
    groups, eps: of the norms.
    resample: 'down' average-pools by 2 after the first swish and in the shortcut; 'up' upsamples by 2 (nearest).
    out_init: of the last kernel.
    shift: how the time embedding enters: 'add' adds it before the second norm, 'scale' scales and shifts after it.
  """

  features: int
  dtype: jnp.dtype = jnp.float32
  groups: int = 32
  eps: float = 1e-6
  resample: str = ''
  shift: str = 'add'
  out_init: Init = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
    """`time` is a time embedding [B, D]. Raises ValueError for an unknown shift or resample."""
    if self.shift not in SHIFTS:
      raise ValueError(f'ResBlock shift {self.shift!r} is unknown; there are {", ".join(SHIFTS)}.')
    if self.resample not in RESAMPLES:
      raise ValueError(f'ResBlock resample {self.resample!r} is unknown; there are "", down and up.')
    h = jax.nn.swish(GroupNorm(self.groups, self.eps, self.dtype, name='norm1')(x))
    if self.resample == 'down':
      h, x = average_pool(h), average_pool(x)
    up = self.resample == 'up'
    h = Conv(self.features, upsample=up, dtype=self.dtype, name='conv1')(h)
    x = upsample_nearest(x) if up else x
    norm = GroupNorm(self.groups, self.eps, self.dtype, name='norm2')
    if time is None:
      h = norm(h)
    elif self.shift == 'add':
      h = norm(h + self._project_time(time, 1)[0])
    else:
      scale, shift = self._project_time(time, 2)
      h = norm(h) * (1 + scale) + shift
    h = Conv(self.features, dtype=self.dtype, kernel_init=self.out_init, name='conv2')(jax.nn.swish(h))
    if x.shape[-1] != self.features:
      x = Conv(self.features, 1, dtype=self.dtype, name='nin_shortcut')(x)
    return x + h

  def _project_time(self, time: jax.Array, count: int) -> list[jax.Array]:
    dense = Dense(count * self.features, ('conv_in', 'conv_out'), dtype=self.dtype, name='time')
    return jnp.split(dense(jax.nn.swish(time))[:, None, None], count, -1)


class AttnBlock(nn.Module):
  """Residual self-attention over all positions of `[B, H, W, C]`, jointly with attention to a context if there is one.

  Attributes:
    groups, eps: of the norm.
    head_dim: channels a head; 0: one head has all.
    out_init: of the last kernel.
  """

  dtype: jnp.dtype = jnp.float32
  groups: int = 32
  eps: float = 1e-6
  head_dim: int = 0
  out_init: Init = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array | None = None, mask: jax.Array | None = None) -> jax.Array:
    """`context` is [B, N, D], of which the positions in `mask`, bool[B, N], are visible.

    Raises ValueError when the channels are not divisible into heads.
    """
    b, h, w, c = x.shape
    if c % (size := self.head_dim or c):
      raise ValueError(f'AttnBlock: {c} channels are not divisible into heads of {size}; change either.')
    heads = lambda y: y.reshape(b, -1, c // size, size)
    keys = lambda y: heads(y).swapaxes(1, 2)
    y = GroupNorm(self.groups, self.eps, self.dtype, name='norm')(x)
    q, k, v = (Conv(c, 1, dtype=self.dtype, name=name)(y) for name in 'qkv')
    parts = [(keys(k), keys(v), None)]
    if context is not None:
      project = lambda name: keys(Dense(c, ('conv_in', 'conv_out'), dtype=self.dtype, name=name)(context))
      visible = None if mask is None else mask[:, None, None]
      parts.append((project('k_context'), project('v_context'), visible))
    y = kernels.attend(heads(q), *parts).astype(self.dtype).reshape(b, h, w, c)
    return x + Conv(c, 1, dtype=self.dtype, kernel_init=self.out_init, name='proj_out')(y)


def shard_height(x: jax.Array) -> jax.Array:
  """Shards [B, H, W, C] over batch and height, but not height if channels are: XLA (jax 0.10) gets both wrong."""
  return constrain(x, ('batch', None if num_shards('conv_out') > 1 else 'height', None, None))


def average_pool(x: jax.Array) -> jax.Array:
  """2 x 2 average pooling of [B, H, W, C]. Raises ValueError for an odd height or width."""
  b, h, w, c = x.shape
  if h % 2 or w % 2:
    raise ValueError(f'a map of {h} x {w} cannot be halved; change the image size or the number of levels.')
  return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def upsample_nearest(x: jax.Array) -> jax.Array:
  """Nearest-neighbour upsampling of [B, H, W, C] by 2."""
  return x.repeat(2, axis=1).repeat(2, axis=2)


class Downsample(nn.Module):
  """Halves height and width by a strided convolution, padded only at the bottom and the right."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return Conv(x.shape[-1], stride=2, padding=((0, 1), (0, 1)), dtype=self.dtype, name='conv')(x)


class Upsample(nn.Module):
  """Doubles height and width by nearest-neighbour upsampling and a convolution."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return Conv(x.shape[-1], dtype=self.dtype, upsample=True, name='conv')(x)


def space_to_depth(x: jax.Array, patch: int) -> jax.Array:
  """`[B, H, W, C] -> [B, H / patch, W / patch, patch * patch * C]`."""
  return einops.rearrange(x, 'b (h i) (w j) c -> b h w (i j c)', i=patch, j=patch)


def depth_to_space(x: jax.Array, patch: int) -> jax.Array:
  """The inverse of `space_to_depth`."""
  return einops.rearrange(x, 'b h w (i j c) -> b (h i) (w j) c', i=patch, j=patch)
