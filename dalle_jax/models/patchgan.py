"""The PatchGAN discriminator of "pix2pix", Isola et al., 2017; with 3 layers it is the 70 x 70 one."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.layers.basic import BatchNorm, Conv, GroupNorm
from dalle_jax.models import variants

VARIANTS = {'test': dict(width=8, layers=1), 'base': dict()}


class PatchGAN(nn.Module):
  """Images float32[B, H, W, 3] in [-1, 1] -> logits float32[B, h, w], positive for real; h is about H / 2 ** layers.

  It uses group normalisation, not batch normalisation as the original does: there is no state besides the parameters,
  the logits of an image do not depend on its batch, and real and reconstructed images cannot be told apart by batch
  statistics. `norm='fixed_batch'`, batch normalisation by stored statistics, is for the original's weights.
  """

  width: int = 64
  layers: int = 3
  norm: str = 'group'
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Raises ValueError for an unknown norm, and for images too small to have a logit."""
    norms: dict[str, type[nn.Module]] = {'group': GroupNorm, 'fixed_batch': BatchNorm}
    if self.norm not in norms:
      raise ValueError(f'PatchGAN norm {self.norm!r} is unknown; expected one of {", ".join(norms)}.')
    init, pad = nn.initializers.normal(0.02), ((1, 1), (1, 1))
    x = Conv(self.width, 4, 2, pad, dtype=self.dtype, kernel_init=init, name='conv_0')(images)
    x = jax.nn.leaky_relu(x, 0.2)
    for i in range(1, self.layers + 1):
      stride = 2 if i < self.layers else 1
      features = self.width * min(2**i, 8)
      x = Conv(features, 4, stride, pad, use_bias=False, dtype=self.dtype, kernel_init=init, name=f'conv_{i}')(x)
      x = jax.nn.leaky_relu(norms[self.norm](dtype=self.dtype, name=f'norm_{i}')(x), 0.2)
    x = Conv(1, 4, 1, pad, dtype=self.dtype, kernel_init=init, name='conv_out')(x)
    if not x.size:  # the mean of no logits would be NaN
      raise ValueError(
        f'images of {images.shape[1]} x {images.shape[2]} pixels are too small for a PatchGAN of {self.layers} layers; '
        'set config.loss.disc.layers to fewer.'
      )
    return x[..., 0].astype(jnp.float32)


def build(variant: str, **overrides) -> PatchGAN:
  """The network of `VARIANTS[variant]` with fields overridden. Raises ValueError for an unknown variant or field."""
  return variants.build(PatchGAN, VARIANTS, variant, overrides)
