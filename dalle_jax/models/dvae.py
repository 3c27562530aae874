"""The discrete VAE of the DALL-E paper, whose codes are the argmax of logits (Ramesh et al., 2021, section 2.1).

The architecture is that of the released networks: four groups of bottleneck blocks without norms, with max-pooling
between the groups of the encoder and nearest-neighbour upsampling between those of the decoder; f = 8.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.layers.basic import Conv
from dalle_jax.layers.convnet import upsample_nearest
from dalle_jax.models import variants

GROUPS = 4
FACTOR = 2 ** (GROUPS - 1)
EPS = 0.1  # logit-Laplace distribution: pixels are mapped to [EPS, 1 - EPS] (appendix A.3)

VARIANTS = {'test': dict(width=4, blocks=1, decoder_input=4, num_codes=16), 'openai': dict()}


class Bottleneck(nn.Module):
  """x + gain * f(x), where f is four convolutions with kernels of these sizes, each after a ReLU."""

  features: int
  kernels: tuple[int, int, int, int]
  gain: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = x
    for i, kernel in enumerate(self.kernels, 1):
      width = self.features if i == len(self.kernels) else self.features // 4
      y = Conv(width, kernel, dtype=self.dtype, name=f'conv_{i}')(jax.nn.relu(y))
    if x.shape[-1] != self.features:
      x = Conv(self.features, 1, dtype=self.dtype, name='id_path')(x)
    return x + self.gain * y


class DVAE(nn.Module):
  """Encoder and decoder.

  Attributes:
    width: channels of the first group of the encoder; the others have 2, 4 and 8 times as many.
    blocks: number of blocks in each group.
    decoder_width, decoder_blocks: the same for the decoder; 0: as in the encoder.
    decoder_input: channels of the decoder's input, the embedded codes.
  """

  width: int = 256
  blocks: int = 2
  decoder_width: int = 0
  decoder_blocks: int = 0
  decoder_input: int = 128
  num_codes: int = 8192
  dtype: jnp.dtype = jnp.float32

  def grid(self, image_size: int) -> tuple[int, int]:
    """Rows and columns of codes of a square image. Raises ValueError if 8 does not divide its size."""
    if image_size % FACTOR:
      raise ValueError(f'a dVAE needs image sizes divisible by {FACTOR}, not {image_size}.')
    return image_size // FACTOR, image_size // FACTOR

  def setup(self):
    width, blocks, conv = self.width, self.blocks, lambda features, size: Conv(features, size, dtype=self.dtype)
    self.encoder_in, self.encoder_out = conv(width, 7), conv(self.num_codes, 1)
    gain = (GROUPS * blocks) ** -2
    self.encoder = [
      [Bottleneck(width * 2**g, (3, 3, 3, 1), gain, self.dtype) for _ in range(blocks)] for g in range(GROUPS)
    ]
    width, blocks = self.decoder_width or width, self.decoder_blocks or blocks
    gain = (GROUPS * blocks) ** -2
    self.decoder_in, self.decoder_out = conv(self.decoder_input, 1), conv(6, 1)
    self.decoder = [
      [Bottleneck(width * 2**g, (1, 3, 3, 3), gain, self.dtype) for _ in range(blocks)] for g in reversed(range(GROUPS))
    ]

  def __call__(self, images: jax.Array) -> jax.Array:
    """Reconstruct images float32[B, H, W, 3] in [-1, 1]. Raises ValueError for sizes that 8 does not divide."""
    return self.decode_codes(self.encode(images))

  def encode(self, images: jax.Array) -> jax.Array:
    """float32[B, H, W, 3] in [-1, 1] -> codes int32[B, h, w]. Raises ValueError as `__call__` does."""
    return self.logits(images).argmax(-1).astype(jnp.int32)

  def logits(self, images: jax.Array) -> jax.Array:
    """float32[B, H, W, 3] in [-1, 1] -> float32[B, h, w, num_codes]."""
    for size in images.shape[1:3]:
      self.grid(size)
    x = self.encoder_in((1 - 2 * EPS) * (images + 1) / 2 + EPS)
    for i, group in enumerate(self.encoder):
      x = x if i == 0 else nn.max_pool(x, (2, 2), (2, 2))
      for block in group:
        x = block(x)
    return self.encoder_out(jax.nn.relu(x)).astype(jnp.float32)

  def decode_codes(self, codes: jax.Array) -> jax.Array:
    """int32[B, h, w] in [0, num_codes) -> float32[B, H, W, 3] in [-1, 1]."""
    mean = jax.nn.sigmoid(self.statistics(codes)[..., :3])
    return 2 * jnp.clip((mean - EPS) / (1 - 2 * EPS), 0, 1) - 1

  def statistics(self, codes: jax.Array) -> jax.Array:
    """int32[B, h, w] -> float32[B, H, W, 6], location and log scale of each pixel and channel."""
    x = self.decoder_in(jax.nn.one_hot(codes, self.num_codes, dtype=self.dtype))
    for i, group in enumerate(self.decoder):
      x = x if i == 0 else upsample_nearest(x)
      for block in group:
        x = block(x)
    return self.decoder_out(jax.nn.relu(x)).astype(jnp.float32)


def build(variant: str, **overrides) -> DVAE:
  """The network of `VARIANTS[variant]` with fields overridden. Raises ValueError for an unknown variant or field."""
  return variants.build(DVAE, VARIANTS, variant, overrides)
