"""LPIPS: perceptual distance of two images in the features of VGG16 (Zhang et al., 2018, the 'lin' variant).

The weights are not trained here: `python -m dalle_jax.convert --from lpips` imports the published ones.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.layers.basic import Conv
from dalle_jax.models import variants

VARIANTS = {'test': dict(widths=(4, 4), depths=(1, 1)), 'vgg16': dict()}
# Mean and deviation of ImageNet for pictures in [-1, 1], as the published code rounds them.
MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
  """Distance of float32[B, H, W, 3] pairs in [-1, 1]: float32[B], at least 0 for weights at least 0.

  `widths` and `depths` are the channels and convolutions of each stage; between stages pictures are halved.
  """

  widths: tuple[int, ...] = (64, 128, 256, 512, 512)
  depths: tuple[int, ...] = (2, 2, 3, 3, 3)
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    conv = lambda stage, i: Conv(self.widths[stage], dtype=self.dtype, name=f'conv_{stage}_{i}')
    self.convs = [[conv(stage, i) for i in range(depth)] for stage, depth in enumerate(self.depths)]
    self.weights = [
      self.param(f'lin_{stage}', nn.initializers.constant(1 / width), (width,), jnp.float32)
      for stage, width in enumerate(self.widths)
    ]

  def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
    return self.terms(a, b).sum(1)

  def terms(self, a: jax.Array, b: jax.Array) -> jax.Array:
    """What each stage adds to the distance, float32[B, stages]."""
    # One pass for both, side by side: [B, 2, ...] keeps each pair on its device.
    features = self.features(jnp.stack([a, b], 1).reshape(-1, *a.shape[1:]))
    terms = []
    for f, weight in zip(features, self.weights, strict=True):
      f = f / (jnp.sqrt(jnp.square(f).sum(-1, keepdims=True) + 1e-20) + 1e-10)  # unit length along channels
      f = f.reshape(-1, 2, *f.shape[1:])
      terms.append((jnp.square(f[:, 0] - f[:, 1]) @ weight).mean((1, 2)))
    return jnp.stack(terms, 1)

  def features(self, x: jax.Array) -> list[jax.Array]:
    """The last activations of each stage, float32[B, h, w, C], for pictures in [-1, 1]."""
    x, found = (x - jnp.asarray(MEAN)) / jnp.asarray(STD), []
    for stage, convs in enumerate(self.convs):
      x = nn.max_pool(x, (2, 2), (2, 2)) if stage else x
      for conv in convs:
        x = jax.nn.relu(conv(x))
      found.append(x.astype(jnp.float32))
    return found


def build(variant: str, **overrides) -> LPIPS:
  """The network of `VARIANTS[variant]` with some fields changed. Raises ValueError for an unknown variant or field."""
  return variants.build(LPIPS, VARIANTS, variant, overrides)
