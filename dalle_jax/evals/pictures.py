"""Samples of the objective for a few held-out records, as one grid of images."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dalle_jax.training import sharding
from dalle_jax.training.loop import Evaluator
from dalle_jax.training.state import Context, Objective, Params


def grid(images: np.ndarray, columns: int = 0, pad: int = 2) -> np.ndarray:
  """uint8[N, H, W, 3] -> one white-framed uint8[H', W', 3] in reading order; nearly square unless `columns` is set."""
  n, h, w, _ = images.shape
  columns = columns or math.ceil(math.sqrt(n))
  rows = math.ceil(n / columns)
  canvas = np.full((rows * (h + pad) + pad, columns * (w + pad) + pad, 3), 255, np.uint8)
  for i, image in enumerate(images):
    y, x = pad + i // columns * (h + pad), pad + i % columns * (w + pad)
    canvas[y : y + h, x : x + w] = image
  return canvas


def build(
  objective: Objective, config: ConfigDict, batches: Callable[[], Iterator[dict[str, np.ndarray]]], mesh: Mesh
) -> Evaluator:
  """An evaluator that makes the image `samples` with `objective.sample`, every time from the same records and noise.

  An objective without `sample` gives no image.
  """
  if not hasattr(objective, 'sample'):
    return lambda params, context: {}
  sample = jax.jit(objective.sample, out_shardings=sharding.whole(mesh))
  if config.train.pictures < 1:
    raise ValueError(
      f'train.pictures is {config.train.pictures}; expected 1 or more; or leave pictures out of train.evals.'
    )
  shards = sharding.batch_shards(mesh)
  rows = math.ceil(config.train.pictures / shards) * shards  # a multiple of the number of shards
  batch: dict[str, jax.Array] = {}

  def evaluate(params: Params, context: Context) -> dict[str, Any]:
    if not batch:
      first = next(batches())
      batch.update(sharding.put_whole({k: v[:rows] for k, v in first.items()}, mesh))
    return {'samples': grid(np.asarray(sample(params, context, batch)))}

  return evaluate
