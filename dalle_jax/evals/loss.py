"""The objective's loss and metrics on held-out batches."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dalle_jax.training import sharding
from dalle_jax.training.loop import Evaluator
from dalle_jax.training.state import Context, Objective, Params


def build(
  objective: Objective, config: ConfigDict, batches: Callable[[], Iterator[dict[str, np.ndarray]]], mesh: Mesh
) -> Evaluator:
  """Means over the first `config.train.eval_batches` of `batches()`, as val_loss and val_METRIC.

  Every process reads all rows of a batch, so that the figures do not depend on how many processes there are.
  Repeats that fill up the last batch (`Loader.fresh`) are left out as far as the mesh allows: they would count twice,
  and for a contrastive loss as wrong answers.
  """
  if config.train.eval_batches < 1:
    raise ValueError(f'train.eval_batches is {config.train.eval_batches}; expected 1 or more.')
  shards = sharding.batch_shards(mesh)

  @jax.jit
  def metrics(params: Params, context: Context, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    loss, (values, _) = objective.loss(params, context, batch)
    return {'loss': loss, **values}

  def evaluate(params: Params, context: Context) -> dict[str, Any]:
    loader, results = batches(), []
    for _, batch in zip(range(config.train.eval_batches), loader, strict=False):
      whole = len(next(iter(batch.values())))
      fresh = getattr(loader, 'fresh', whole) // shards * shards
      if fresh < whole and results:
        break
      batch = {k: v[: fresh or whole] for k, v in batch.items()}
      results.append(metrics(params, context, sharding.put_whole(batch, mesh)))
    if not results:
      raise ValueError(f'data.val_split {config.data.val_split!r} gives no batch; set data.val_split="" for none.')
    results = jax.device_get(results)
    return {f'val_{k}': float(np.mean([r[k] for r in results])) for k in results[0]}

  return evaluate
