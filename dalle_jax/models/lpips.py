"""LPIPS: perceptual distance between two images in VGG16 features (Zhang et al., 2018, the 'lin' variant).

The weights are not trained here: `python -m dalle_jax.convert --from lpips` imports the published ones.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.layers.basic import Conv, param
from dalle_jax.models import variants

VARIANTS = {'test': dict(widths=(4, 4), depths=(1, 1)), 'vgg16': dict()}
# ImageNet mean and standard deviation for images in [-1, 1], as rounded in the published code.
MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
  """Distances float32[B] of pairs of images float32[B, H, W, 3] in [-1, 1]; non-negative for non-negative weights.

  `widths` and `depths` are the channels and the number of convolutions of each stage; max-pooling halves height and
  width between stages.
  """

  widths: tuple[int, ...] = (64, 128, 256, 512, 512)
  depths: tuple[int, ...] = (2, 2, 3, 3, 3)
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    conv = lambda stage, i: Conv(self.widths[stage], dtype=self.dtype, name=f'conv_{stage}_{i}')
    self.convs = [[conv(stage, i) for i in range(depth)] for stage, depth in enumerate(self.depths)]
    self.weights = [
      param(self, f'lin_{stage}', nn.initializers.constant(1 / width), (None,), (width,))
      for stage, width in enumerate(self.widths)
    ]

  def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
    return self.terms(a, b).sum(1)

  def terms(self, a: jax.Array, b: jax.Array) -> jax.Array:
    """The contribution of each stage to the distance, float32[B, stages]."""
    # One pass for both images, stacked as [B, 2, ...], which keeps each pair on its device.
    features = self.features(jnp.stack([a, b], 1).reshape(-1, *a.shape[1:]))
    terms = []
    for f, weight in zip(features, self.weights, strict=True):
      f = f / (jnp.sqrt(jnp.square(f).sum(-1, keepdims=True) + 1e-20) + 1e-10)  # unit length along channels
      f = f.reshape(-1, 2, *f.shape[1:])
      terms.append((jnp.square(f[:, 0] - f[:, 1]) @ weight).mean((1, 2)))
    return jnp.stack(terms, 1)

  def features(self, x: jax.Array) -> list[jax.Array]:
    """The last activations of each stage, float32[B, h, w, C], for images in [-1, 1]."""
    x, features = (x - jnp.asarray(MEAN)) / jnp.asarray(STD), []
    for stage, convs in enumerate(self.convs):
      x = nn.max_pool(x, (2, 2), (2, 2)) if stage else x
      for conv in convs:
        x = jax.nn.relu(conv(x))
      features.append(x.astype(jnp.float32))
    return features


def build(variant: str, **overrides) -> LPIPS:
  """The network of `VARIANTS[variant]` with fields overridden. Raises ValueError for an unknown variant or field."""
  return variants.build(LPIPS, VARIANTS, variant, overrides)
