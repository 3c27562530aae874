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
  """Returns the evaluator of val_loss and val_METRIC: means over the first `config.train.eval_batches` of `batches()`.

  Every process reads all rows of a batch, so that the results do not depend on how many processes there are.

  The last batch is filled up with repeats (`Loader.fresh` counts the rows before them). Each batch is weighted by its
  fresh rows, so that each record counts once. The repeats still distort the mean of the last batch a little; removing
  them would change its shape and compile a second program. A split smaller than one batch is evaluated without repeats
  if its rows divide among the devices.

  Raises ValueError for fewer than one batch.
  """
  if config.train.eval_batches < 1:
    raise ValueError(f'train.eval_batches is {config.train.eval_batches}; expected 1 or more.')
  shards = sharding.batch_shards(mesh)

  @jax.jit
  def metrics(params: Params, context: Context, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    loss, (values, _) = objective.loss(params, context, batch)
    return {'loss': loss, **values}

  def evaluate(params: Params, context: Context) -> dict[str, Any]:
    loader, results, weights = batches(), [], []
    for _, batch in zip(range(config.train.eval_batches), loader, strict=False):
      fresh = getattr(loader, 'fresh', len(next(iter(batch.values()))))
      if not results and fresh % shards == 0:
        batch = {k: v[:fresh] for k, v in batch.items()}
      results.append(metrics(params, context, sharding.put_whole(batch, mesh)))
      weights.append(fresh)
    if not results:
      raise ValueError(f'data.val_split {config.data.val_split!r} gives no batch; set data.val_split="" for none.')
    results = jax.device_get(results)
    return {f'val_{k}': float(np.average([r[k] for r in results], weights=weights)) for k in results[0]}

  return evaluate
