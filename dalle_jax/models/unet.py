"""The U-Net of diffusion models ("Diffusion Models Beat GANs on Image Synthesis", Dhariwal and Nichol, 2021, 3)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.layers.basic import Conv, GroupNorm, param
from dalle_jax.layers.convnet import AttnBlock, ResBlock, depth_to_space, shard_height, space_to_depth
from dalle_jax.layers.timesteps import TimeEmbed

REMATS = ('none', 'full')


class UNet(nn.Module):
  """Images [B, H, W, C] and diffusion timesteps -> predictions for each pixel, [B, H, W, outputs].

  Attributes:
    channels: channels of each level; each level has half the resolution of the one before.
    num_res_blocks: residual blocks of a level on the way down; on the way up there is one more.
    attention: the levels with attention, counted from 0, the full resolution. If there is any, the middle has it, too.
    head_dim: channels per head.
    patch: squares of patch x patch pixels become channels before the first convolution and pixels again after the last,
      which is cheap on small machines. 1 is the published network.
    positions: whether a learnt embedding of each position is added after the first convolution, so that captions can
      refer to positions; images then have a fixed size. Published networks have none, and infer positions only from
      the padding at the edges.
    shift: how the timestep embedding enters a block, see `layers.convnet.ResBlock`.
    norm_groups, eps: of every GroupNorm.
    remat: what the backward pass recomputes: 'none', or 'full', everything but the inputs of each block.
  """

  outputs: int
  channels: tuple[int, ...]
  num_res_blocks: int
  attention: tuple[int, ...] = ()
  head_dim: int = 64
  patch: int = 1
  positions: bool = False
  shift: str = 'scale'
  norm_groups: int = 32
  eps: float = 1e-5
  remat: str = 'none'
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    t: jax.Array,
    extra: jax.Array | None = None,
    context: jax.Array | None = None,
    context_mask: jax.Array | None = None,
  ) -> jax.Array:
    """The prediction, float32[B, H, W, outputs].

    Args:
      x: the noisy images, [B, H, W, C].
      t: their timesteps, int32[B].
      extra: conditioning vectors that are added to the timestep embedding, [B, 4 * channels[0]].
      context: tokens [B, N, D] that attention blocks attend to in addition to the image.
      context_mask: bool[B, N], the tokens of `context` that may be attended to; by default all.

    Raises ValueError if a level cannot be halved, or for unknown fields.
    """
    if self.remat not in REMATS:
      raise ValueError(f'UNet remat {self.remat!r} is unknown; expected one of {", ".join(REMATS)}.')
    if unknown := [i for i in self.attention if not 0 <= i < len(self.channels)]:
      raise ValueError(f'UNet attention has levels {unknown}; expected 0 to {len(self.channels) - 1}.')
    rematerialised = nn.remat if self.remat == 'full' else lambda module: module
    res_block, attn_block = rematerialised(ResBlock), rematerialised(AttnBlock)
    # At initialisation each block adds nothing, as in that paper's code.
    norms = dict(dtype=self.dtype, groups=self.norm_groups, eps=self.eps, out_init=nn.initializers.zeros)
    time = TimeEmbed(self.channels[0], 4 * self.channels[0], self.dtype, name='time')(t)
    time = time if extra is None else time + extra.astype(time.dtype)

    def block(x: jax.Array, features: int, name: str, resample: str = '') -> jax.Array:
      x = res_block(features, **norms, resample=resample, shift=self.shift, name=name)(x, time)
      return shard_height(x)

    def attend(x: jax.Array, name: str) -> jax.Array:
      return attn_block(**norms, head_dim=self.head_dim, name=name)(x, context, context_mask)

    if x.shape[1] % self.patch or x.shape[2] % self.patch:
      raise ValueError(f'UNet patch {self.patch} does not divide images of {x.shape[1]} x {x.shape[2]} pixels.')
    x = Conv(self.channels[0], dtype=self.dtype, name='conv_in')(space_to_depth(x, self.patch))
    if self.positions:
      axes = (None, None, 'conv_out')
      x = x + param(self, 'positions', nn.initializers.normal(0.1), axes, x.shape[1:]).astype(x.dtype)
    last, skips = len(self.channels) - 1, [x]
    for level, features in enumerate(self.channels):
      for i in range(self.num_res_blocks):
        x = block(x, features, f'down_{level}_block_{i}')
        if level in self.attention:
          x = attend(x, f'down_{level}_attn_{i}')
        skips.append(x)
      if level < last:
        x = block(x, features, f'down_{level}_downsample', 'down')
        skips.append(x)
    x = block(x, self.channels[-1], 'mid_block_0')
    if self.attention:
      x = attend(x, 'mid_attn')
    x = block(x, self.channels[-1], 'mid_block_1')
    for level, features in reversed(list(enumerate(self.channels))):
      for i in range(self.num_res_blocks + 1):
        x = block(jnp.concatenate([x, skips.pop()], -1), features, f'up_{level}_block_{i}')
        if level in self.attention:
          x = attend(x, f'up_{level}_attn_{i}')
      if level:
        x = block(x, features, f'up_{level}_upsample', 'up')
    # In float32, like the prediction, and 0 at initialisation.
    x = jax.nn.swish(GroupNorm(self.norm_groups, self.eps, name='norm_out')(x))
    x = Conv(self.outputs * self.patch**2, kernel_init=nn.initializers.zeros, name='conv_out')(x)
    return depth_to_space(x, self.patch)
