"""The DiscreteVAE of DALLE-pytorch, an image tokenizer: strided convolutions, whose codes are the argmax of logits."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.layers.basic import Conv, param
from dalle_jax.models import variants

VARIANTS = {'test': dict(width=4, levels=2, blocks=1, code_dim=4, num_codes=16), 'dalle_pytorch': dict()}


class ResBlock(nn.Module):
  """x + f(x), where f is three convolutions with ReLUs between them."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = x
    for i, kernel in enumerate((3, 3, 1)):
      y = jax.nn.relu(y) if i else y
      y = Conv(x.shape[-1], kernel, dtype=self.dtype, name=f'conv_{i}')(y)
    return x + y


class UpConv(nn.Module):
  """Transposed convolution, 4 x 4, to twice the height and width."""

  features: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    axes, init = (None, None, 'conv_in', 'conv_out'), nn.initializers.lecun_normal()
    kernel = param(self, 'kernel', init, axes, (4, 4, x.shape[-1], self.features))
    bias = param(self, 'bias', nn.initializers.zeros, axes[-1:], (self.features,))
    # Every output pixel is reached by 2 x 2 of the kernel; a padding of 2 keeps the image centred.
    y = jax.lax.conv_transpose(x, kernel.astype(self.dtype), (2, 2), ((2, 2), (2, 2)))
    return y + bias.astype(self.dtype)


class DiscreteVAE(nn.Module):
  """Encoder, codebook and decoder.

  Attributes:
    width: channels of all levels.
    levels: convolutions with stride 2; an image has (size / 2^levels)^2 codes.
    blocks: residual blocks of the encoder, and of the decoder.
    code_dim: size of a code's embedding.
  """

  width: int = 64
  levels: int = 3
  blocks: int = 0
  code_dim: int = 512
  num_codes: int = 512
  dtype: jnp.dtype = jnp.float32

  def grid(self, image_size: int) -> tuple[int, int]:
    """Rows and columns of codes of a square image. Raises ValueError if the factor does not divide its size."""
    factor = 2**self.levels
    if image_size % factor:
      raise ValueError(f'this DiscreteVAE needs image sizes divisible by {factor}, not {image_size}.')
    return image_size // factor, image_size // factor

  def setup(self):
    conv = lambda features, size=1, stride=1, padding='SAME': Conv(features, size, stride, padding, dtype=self.dtype)
    self.codebook = param(
      self, 'codebook', nn.initializers.normal(1.0), ('vocab', 'embed'), (self.num_codes, self.code_dim)
    )
    self.down = [conv(self.width, 4, 2, ((1, 1), (1, 1))) for _ in range(self.levels)]
    self.encoder_blocks = [ResBlock(self.dtype) for _ in range(self.blocks)]
    self.encoder_out = conv(self.num_codes)
    self.decoder_in = conv(self.width) if self.blocks else None
    self.decoder_blocks = [ResBlock(self.dtype) for _ in range(self.blocks)]
    self.up = [UpConv(self.width, self.dtype) for _ in range(self.levels)]
    self.decoder_out = conv(3)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Reconstruct images float32[B, H, W, 3] in [-1, 1]. Raises ValueError if the factor does not divide their size."""
    return self.decode_codes(self.encode(images))

  def encode(self, images: jax.Array) -> jax.Array:
    """float32[B, H, W, 3] in [-1, 1] -> codes int32[B, h, w]. Raises ValueError as `__call__` does."""
    return self.logits(images).argmax(-1).astype(jnp.int32)

  def logits(self, images: jax.Array) -> jax.Array:
    """float32[B, H, W, 3] in [-1, 1] -> float32[B, h, w, num_codes]."""
    for size in images.shape[1:3]:
      self.grid(size)
    x = images.astype(self.dtype)
    for layer in self.down:
      x = jax.nn.relu(layer(x))
    for block in self.encoder_blocks:
      x = block(x)
    return self.encoder_out(x).astype(jnp.float32)

  def decode_codes(self, codes: jax.Array) -> jax.Array:
    """int32[B, h, w] in [0, num_codes) -> float32[B, H, W, 3], about [-1, 1]."""
    x = self.codebook[codes].astype(self.dtype)
    x = self.decoder_in(x) if self.blocks else x
    for block in self.decoder_blocks:
      x = block(x)
    for layer in self.up:
      x = jax.nn.relu(layer(x))
    return self.decoder_out(x).astype(jnp.float32)


def build(variant: str, **overrides) -> DiscreteVAE:
  """The network of `VARIANTS[variant]` with fields overridden. Raises ValueError for an unknown variant or field."""
  return variants.build(DiscreteVAE, VARIANTS, variant, overrides)
