"""VQGAN: an image tokenizer, images to a grid of codes and back ("Taming Transformers", Esser et al., 2021, 3.1)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct

from dalle_jax.layers.basic import Conv, GroupNorm
from dalle_jax.layers.convnet import (
  AttnBlock,
  Downsample,
  ResBlock,
  Upsample,
  depth_to_space,
  shard_height,
  space_to_depth,
)
from dalle_jax.layers.quantize import GumbelQuantizer, NearestQuantizer, Quantized
from dalle_jax.models import variants

VARIANTS = {
  'test': dict(
    image_size=16, ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), z_channels=8, code_dim=8, num_codes=16
  ),
  # f = 4 by the stem only, 9 x 9 codes for a 36 x 36 image. Each code is a function of its own 4 x 4 pixels, so that
  # shapes are encoded in the same way in every colour.
  'quickstart': dict(
    image_size=36, patch=4, tile=4, ch=64, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), norm_groups=4,
    z_channels=64, code_dim=32, num_codes=512,
  ),
  'small': dict(
    image_size=64, patch=4, ch=64, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), z_channels=128,
    code_dim=64, num_codes=1024,
  ),
  # Public models, 256 x 256 images: f8 Gumbel (32 x 32 codes), f16 (16 x 16 codes).
  'f8_8192': dict(quantizer='gumbel'),
  'f16_1024': dict(ch_mult=(1, 1, 2, 2, 4), attn_resolutions=(16,), num_codes=1024),
  'f16_16384': dict(ch_mult=(1, 1, 2, 2, 4), attn_resolutions=(16,), num_codes=16384),
}  # fmt: skip


class VQGANOutput(struct.PyTreeNode):
  """A reconstruction, and the intermediate results that training needs.

  Attributes:
    recon: float32[B, H, W, 3], about [-1, 1].
    quantized: codes, vectors and losses of the bottleneck.
    features: [B, H / patch, W / patch, C], the input of the last convolution (`to_pixels`).
  """

  recon: jax.Array
  quantized: Quantized
  features: jax.Array


class Encoder(nn.Module):
  """Images [B, H, W, 3] -> [B, h, w, z_channels]. Fields as in VQGAN."""

  ch: int
  ch_mult: tuple[int, ...]
  num_res_blocks: int
  attn_levels: tuple[bool, ...]
  norm_groups: int
  z_channels: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = Conv(self.ch, dtype=self.dtype, name='conv_in')(x)
    for level, mult in enumerate(self.ch_mult):
      for i in range(self.num_res_blocks):
        x = ResBlock(self.ch * mult, self.dtype, self.norm_groups, name=f'down_{level}_block_{i}')(x)
        if self.attn_levels[level]:
          x = AttnBlock(self.dtype, self.norm_groups, name=f'down_{level}_attn_{i}')(x)
      if level + 1 < len(self.ch_mult):
        x = Downsample(self.dtype, name=f'down_{level}_downsample')(x)
      x = shard_height(x)
    x = middle(x, self.dtype, self.norm_groups)
    x = jax.nn.swish(GroupNorm(self.norm_groups, dtype=self.dtype, name='norm_out')(x))
    return Conv(self.z_channels, dtype=self.dtype, name='conv_out')(x)


class Decoder(nn.Module):
  """[B, h, w, z_channels] -> [B, H, W, ch * ch_mult[0]], without the last convolution. Fields as in VQGAN.

  Levels are numbered from the full resolution, as in the encoder.
  """

  ch: int
  ch_mult: tuple[int, ...]
  num_res_blocks: int
  attn_levels: tuple[bool, ...]
  norm_groups: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = Conv(self.ch * self.ch_mult[-1], dtype=self.dtype, name='conv_in')(x)
    x = middle(x, self.dtype, self.norm_groups)
    for level, mult in reversed(list(enumerate(self.ch_mult))):
      for i in range(self.num_res_blocks + 1):
        x = ResBlock(self.ch * mult, self.dtype, self.norm_groups, name=f'up_{level}_block_{i}')(x)
        if self.attn_levels[level]:
          x = AttnBlock(self.dtype, self.norm_groups, name=f'up_{level}_attn_{i}')(x)
      if level:
        x = Upsample(self.dtype, name=f'up_{level}_upsample')(x)
      x = shard_height(x)
    return jax.nn.swish(GroupNorm(self.norm_groups, dtype=self.dtype, name='norm_out')(x))


def middle(x: jax.Array, dtype: jnp.dtype, groups: int) -> jax.Array:
  """Two residual blocks around attention, at the lowest resolution; called inside the `__call__` of a module."""
  x = ResBlock(x.shape[-1], dtype, groups, name='mid_block_1')(x)
  x = AttnBlock(dtype, groups, name='mid_attn_1')(x)
  return ResBlock(x.shape[-1], dtype, groups, name='mid_block_2')(x)


class VQGAN(nn.Module):
  """Encoder, codebook and decoder; the downsampling factor is `patch * 2 ** (len(ch_mult) - 1)`.

  Attributes:
    image_size: image size that `attn_resolutions` refer to; images may have any size that the factor divides.
    patch: squares of patch x patch pixels become channels before the first convolution and pixels again after the
      last: a stem that is cheap on small machines. 1 is the published network.
    tile: if not 0, the encoder encodes squares of tile x tile pixels separately, so that a code depends only on its own
      tile. If images consist of parts, equal parts then have equal codes, which a transformer learns several times as
      fast and can recombine; the decoder still decodes the whole image.
    norm_groups: of every GroupNorm. A tile of one code has no pixels to average over: use groups of many channels.
    quantizer: 'nearest' or 'gumbel'.
    normalize_codes: whether nearest neighbours are taken on the unit sphere.
    pixels: the range in which the network itself has pixel values: 'signed', [-1, 1], or 'unit', [0, 1]. Images are
      in [-1, 1] in either case.
    decoder_only: whether there is no encoder, as in weights that are published for generation only.
  """

  image_size: int = 256
  patch: int = 1
  tile: int = 0
  ch: int = 128
  ch_mult: tuple[int, ...] = (1, 1, 2, 4)
  num_res_blocks: int = 2
  attn_resolutions: tuple[int, ...] = (32,)
  norm_groups: int = 32
  z_channels: int = 256
  code_dim: int = 256
  num_codes: int = 8192
  quantizer: str = 'nearest'
  normalize_codes: bool = False
  pixels: str = 'signed'
  decoder_only: bool = False
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    if self.pixels not in ('signed', 'unit'):
      raise ValueError(f'VQGAN pixels {self.pixels!r} is unknown; expected signed or unit.')
    resolutions = [self.image_size // self.patch // 2**level for level in range(len(self.ch_mult))]
    levels = tuple(r in self.attn_resolutions for r in resolutions)
    shared = (self.ch, self.ch_mult, self.num_res_blocks, levels, self.norm_groups)
    if not self.decoder_only:
      self.encoder = Encoder(*shared, self.z_channels, self.dtype)
      self.quant_conv = Conv(self.code_dim, 1, dtype=self.dtype)
    self.decoder = Decoder(*shared, self.dtype)
    self.conv_out = Conv(3 * self.patch**2, dtype=self.dtype)
    self.post_quant_conv = Conv(self.z_channels, 1, dtype=self.dtype)
    if self.quantizer == 'nearest':
      self.quantize = NearestQuantizer(self.num_codes, self.code_dim, self.normalize_codes)
    elif self.quantizer == 'gumbel':
      self.quantize = GumbelQuantizer(self.num_codes, self.code_dim)
    else:
      raise ValueError(f'VQGAN quantizer {self.quantizer!r} is unknown; expected nearest or gumbel.')

  @property
  def factor(self) -> int:
    return self.patch * 2 ** (len(self.ch_mult) - 1)

  def grid(self, image_size: int) -> tuple[int, int]:
    """Rows and columns of codes of a square image. Raises ValueError if the factor does not divide its size."""
    if image_size % self.factor:
      nearest = max(1, round(image_size / self.factor)) * self.factor
      raise ValueError(
        f'VQGAN needs image sizes divisible by {self.factor}, not {image_size}; the nearest is {nearest}.'
      )
    return image_size // self.factor, image_size // self.factor

  def __call__(
    self, images: jax.Array, rng: jax.Array | None = None, temperature: float | jax.Array = 1.0
  ) -> VQGANOutput:
    """Reconstruct images float32[B, H, W, 3] in [-1, 1].

    `rng` and `temperature` are for the Gumbel quantizer, which samples codes in training; without `rng` it takes the
    most probable ones. Raises ValueError for sizes that the downsampling factor does not divide, and for a network
    without an encoder.
    """
    quantized = self.quantize(self._encode(images), rng, temperature)
    features = self.decoder(self.post_quant_conv(quantized.vectors))
    return VQGANOutput(self.to_pixels(features), quantized, features)

  def encode(self, images: jax.Array) -> jax.Array:
    """float32[B, H, W, 3] in [-1, 1] -> codes int32[B, h, w]. Raises ValueError as `__call__` does."""
    return self.quantize(self._encode(images)).codes

  def decode_codes(self, codes: jax.Array) -> jax.Array:
    """int32[B, h, w] in [0, num_codes) -> float32[B, H, W, 3], about [-1, 1]."""
    return self.to_pixels(self.decoder(self.post_quant_conv(self.quantize.lookup(codes))))

  def to_pixels(self, features: jax.Array) -> jax.Array:
    """The last convolution; gradients at its kernel set the adaptive weight of the GAN loss."""
    pixels = depth_to_space(self.conv_out(features).astype(jnp.float32), self.patch)
    return 2 * pixels - 1 if self.pixels == 'unit' else pixels

  def _encode(self, images: jax.Array) -> jax.Array:
    if self.decoder_only:
      raise ValueError(
        'this VQGAN has only a decoder, so it cannot encode images; convert the model again with --vqgan RUN, the run '
        'of a whole VQGAN with the same codes.'
      )
    images = (images + 1) / 2 if self.pixels == 'unit' else images
    for size in images.shape[1:3]:
      self.grid(size)
      if self.tile and (size % self.tile or self.tile % self.factor):
        raise ValueError(f'VQGAN tile {self.tile} must divide {size} pixels and be a multiple of {self.factor}.')
    if not self.tile:
      return self.quant_conv(self.encoder(space_to_depth(images, self.patch)))
    t, (rows, columns) = self.tile, (size // self.tile for size in images.shape[1:3])
    tiles = rearrange(images, 'b (y h) (x w) c -> (b y x) h w c', h=t, w=t)
    z = self.quant_conv(self.encoder(space_to_depth(tiles, self.patch)))
    return rearrange(z, '(b y x) h w c -> b (y h) (x w) c', y=rows, x=columns)


def build(variant: str, **overrides) -> VQGAN:
  """The network of `VARIANTS[variant]` with fields overridden. Raises ValueError for an unknown variant or field."""
  return variants.build(VQGAN, VARIANTS, variant, overrides)
