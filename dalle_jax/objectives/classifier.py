"""Trains a multi-label classifier: binary cross-entropy of each label."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from dalle_jax.functional.pixels import to_float
from dalle_jax.models import classifier

FROZEN = ()  # it uses no frozen network


class ClassifierObjective:
  """The player is 'classifier'. Batches: image uint8[B, H, W, 3], labels bool[B, C]."""

  def __init__(self, model: classifier.Classifier):
    self.model = model

  def init(self, rng: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[Any, Any]:
    """Raises ValueError for images of another size, and for stories."""
    shape = batch['image'].shape
    if len(shape) != 4:
      raise ValueError(
        f'the objective classifier takes single images, not {list(shape)}; set config.data.source_args.unit="frame".'
      )
    return {'classifier': self.model.init(rng, jnp.zeros((1, *shape[1:])))['params']}, {}

  def loss(
    self, params: Any, ctx: Any, batch: Mapping[str, jax.Array]
  ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
    """Mean cross-entropy over images and labels.

    Metrics are `f1` (micro, threshold 0.5) and `exact`, the fraction of images with all labels right. Raises ValueError
    if the data has no labels, or not as many as the model.
    """
    if 'labels' not in batch:
      raise ValueError('the objective classifier needs labels, and this data has none; use a data source with labels.')
    labels, expected = batch['labels'], (len(batch['image']), self.model.labels)
    if labels.shape != expected:
      raise ValueError(
        f'the labels of the data are {list(labels.shape)}, expected {list(expected)}; set config.model.labels to '
        f'{labels.shape[-1]}.'
      )
    logits = self.model.apply({'params': params['classifier']}, to_float(batch['image']))
    loss = optax.sigmoid_binary_cross_entropy(logits, labels.astype(jnp.float32)).mean()
    predicted = logits > 0
    hits, positives = (predicted & labels).sum(), predicted.sum() + labels.sum()
    f1 = jnp.where(positives > 0, 2 * hits / jnp.maximum(positives, 1), 1.0)  # 1: no label is true, and none predicted
    return loss, ({'f1': f1, 'exact': (predicted == labels).all(-1).mean()}, ctx.mutable)


def from_config(config: ConfigDict, frozen_configs: Mapping[str, Any]) -> ClassifierObjective:
  """The objective of `config.model` at the image size of the data. Raises ValueError for bad fields."""
  if config.loss:
    raise ValueError(f'config.loss has the unknown fields {", ".join(config.loss)}; the objective classifier has none.')
  if config.model.get('labels', 0) < 1:
    raise ValueError('the objective classifier needs config.model.labels, the number of labels in the data.')
  return ClassifierObjective(classifier.of_run(config))
