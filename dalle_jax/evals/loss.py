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
  """Means over the first `config.train.eval_batches` of `batches()`, as val_loss and val_METRIC."""

  @jax.jit
  def metrics(params: Params, context: Context, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    loss, (values, _) = objective.loss(params, context, batch)
    return {'loss': loss, **values}

  def evaluate(params: Params, context: Context) -> dict[str, Any]:
    stream = zip(range(config.train.eval_batches), batches(), strict=False)
    results = [metrics(params, context, sharding.put_batch(batch, mesh)) for _, batch in stream]
    if not results:
      raise ValueError(f'data.val_split {config.data.val_split!r} gives no batch; set data.val_split="" for none.')
    results = jax.device_get(results)
    return {f'val_{k}': float(np.mean([r[k] for r in results])) for k in results[0]}

  return evaluate
