"""Multi-label image classifier, e.g. of the characters in a frame: the image tower of a CLIP with a logit per label.

Published character scores of stories are from an Inception-v3 at 299 pixels ("StoryDALL-E", Maharana et al., 2022).
This network is small and trained from the labels only, so compare its scores only between runs and with its scores on
real frames.
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
  """A logit per label for each image; labels are independent, and any number of them may be true.

  Attributes:
    labels: C, the number of labels; `config.model.labels` of a run.
    embed_dim: E, the number of features.
    image_pool: what the features are computed from: 'all' patches or the 'class' token (see `models.clip.CLIP`).
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
        f'Classifier.patch {self.patch} does not divide the image size {self.image_size}; change one of them.'
      )
    self.image = ImageTower(
      self.image_size, self.patch, self.width, self.layers, self.heads, self.embed_dim, self.image_pool,
      self.activation, self.dtype,
    )  # fmt: skip
    self.head = Dense(self.labels, ('embed', None))

  def __call__(self, images: jax.Array) -> jax.Array:
    """float32[B, H, W, 3] in [-1, 1] -> logits float32[B, C]. Raises ValueError as `features` does."""
    return self.head(nn.gelu(self.features(images)))  # without the gelu, projection and head would be one linear map

  def features(self, images: jax.Array) -> jax.Array:
    """float32[B, H, W, 3] in [-1, 1] -> float32[B, E], not normalised. Raises ValueError for another image size."""
    size = self.image_size
    if images.ndim != 4 or images.shape[1:] != (size, size, 3):
      raise ValueError(f'the classifier takes images [B, {size}, {size}, 3], not {list(images.shape)}; resize them.')
    return self.image(images)


def build(variant: str, **overrides) -> Classifier:
  """The network of `VARIANTS[variant]` with fields overridden. Raises ValueError for an unknown variant or field."""
  return variants.build(Classifier, VARIANTS, variant, overrides)


def of_run(config: Mapping[str, Any]) -> Classifier:
  """The network of a run, from its config."""
  return build(**{**config['model'], 'image_size': config['data']['image_size']})
