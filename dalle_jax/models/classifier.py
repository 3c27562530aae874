"""Which labels a picture has, such as who is in a frame: the picture tower of a CLIP with a logit a label.

Published figures for characters in stories come from an Inception-v3 at 299 pixels ("StoryDALL-E", Maharana et al.,
2022). This network is small and trained from the labels alone: its figures compare runs with each other, and with its
own figures for true frames.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.layers.basic import Dense
from dalle_jax.models import variants
from dalle_jax.models.clip import ImageTower

VARIANTS = {
  'test': dict(image_size=16, patch=8, width=16, layers=1, heads=2, embed_dim=8),
  'quickstart': dict(image_size=36, patch=9, width=128, layers=3, heads=4, embed_dim=128),
  'small': dict(image_size=64, patch=8, width=256, layers=6, heads=8, embed_dim=256),
  'base': dict(image_size=128, patch=16, width=384, layers=8, heads=6, embed_dim=512),
}


class Classifier(nn.Module):
  """Pictures -> a logit a label; labels are independent of each other, any number of them may be true.

  Attributes:
    labels: C, how many there are; config.model.labels of a run.
    embed_dim: E, of the features.
    image_pool: what the features read: 'all' patches or the 'class' token (see `models.clip.CLIP`).
  """

  labels: int = 0
  image_size: int = 64
  patch: int = 8
  width: int = 256
  layers: int = 6
  heads: int = 8
  embed_dim: int = 256
  image_pool: str = 'all'
  activation: str = 'gelu'
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    if self.labels < 1:
      raise ValueError(f'Classifier.labels is {self.labels}; set config.model.labels to the number of labels.')
    if self.image_size % self.patch:
      raise ValueError(
        f'Classifier.patch {self.patch} does not divide pictures of {self.image_size} pixels; change either.'
      )
    self.image = ImageTower(
      self.image_size, self.patch, self.width, self.layers, self.heads, self.embed_dim, self.image_pool,
      self.activation, self.dtype,
    )  # fmt: skip
    self.head = Dense(self.labels, ('embed', None))

  def __call__(self, images: jax.Array) -> jax.Array:
    """float32[B, H, W, 3] in [-1, 1] -> logits float32[B, C]. Raises ValueError as `features`."""
    return self.head(nn.gelu(self.features(images)))  # without the gelu two linear maps would be one

  def features(self, images: jax.Array) -> jax.Array:
    """float32[B, H, W, 3] in [-1, 1] -> float32[B, E], of any length. Raises ValueError for another picture size."""
    size = self.image_size
    if images.ndim != 4 or images.shape[1:] != (size, size, 3):
      raise ValueError(f'the classifier takes pictures [B, {size}, {size}, 3], not {list(images.shape)}; resize.')
    return self.image(images)


def build(variant: str, **overrides) -> Classifier:
  """The network of `VARIANTS[variant]` with some fields changed. Raises ValueError for an unknown variant or field."""
  return variants.build(Classifier, VARIANTS, variant, overrides)


def of_run(config: Mapping[str, Any]) -> Classifier:
  """The network of a trained run, from the config in it."""
  return build(**{**config['model'], 'image_size': config['data']['image_size']})
