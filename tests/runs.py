"""Run directories of networks with random parameters, for tests of what is done with a run: nothing is trained."""

from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from dalle_jax.training.checkpoint import Run, export_run

ROOT = Path(__file__).parents[1]


def write(path, kind, model, config, *inputs, words, frozen=(), players=False):
  """A run of the objective `kind` in `path`; `frozen` ones lie beside it; with `players` parameters are by player."""
  shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs)['params'])
  rng = np.random.default_rng(0)  # nothing to compile
  params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes)
  frozen = {name: str(path.parent / name) for name in frozen}
  config = {'objective': kind, **config}
  export_run(path, Run(config, params if players else {kind: params}, words.to_json(), 3, str(path), frozen))
