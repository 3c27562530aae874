"""Tokens a second and model-FLOPs utilisation of a training step, per variant and rematerialisation.

python -m benchmarks.step --variant=300m --batch_size=32 --remat=none,dots,full
Utilisation is against the rate of a large matrix product that is measured in the same run (`benchmarks/limits.py`).
"""

import itertools
import time

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from benchmarks import limits
from configs import common
from dalle_jax.models import dalle, vqgan
from dalle_jax.objectives.dalle import DEFAULTS, DALLEObjective
from dalle_jax.training import optim, sharding
from dalle_jax.training import state as state_lib
from dalle_jax.training.loop import make_step

_VARIANT = flags.DEFINE_string('variant', '300m', 'of dalle_jax/models/dalle.py')
_BATCH = flags.DEFINE_integer('batch_size', 32, 'streams of text and image')
_REMAT = flags.DEFINE_list('remat', ['none', 'dots', 'full'], 'see layers.transformer.Stack')
_STEPS = flags.DEFINE_integer('steps', 10, 'steps a measurement')
_KERNEL = flags.DEFINE_list('kernel', ['auto'], 'see layers.attention.fused')
_MESH = flags.DEFINE_string('mesh', 'data', 'of configs.common.MESHES')


def measure(remat: str, kernel: str, mesh: jax.sharding.Mesh) -> tuple[float, float, float]:
  """Tokens a second, steps a second and model FLOP/s."""
  cpu = jax.default_backend() == 'cpu'
  model = dalle.build(_VARIANT.value, remat=remat, kernel=kernel, dtype='float32' if cpu else 'bfloat16')
  objective = DALLEObjective(model, vqgan.build('test'), ConfigDict(DEFAULTS))
  rng, batch = np.random.default_rng(0), _BATCH.value
  data = {
    'text': rng.integers(0, model.text_vocab, (batch, model.text_length)).astype(np.int32),
    'tokens': rng.integers(0, model.image_vocab, (batch, model.image_length)).astype(np.int32),
  }
  c, spec = common.base(), state_lib.batch_spec(data)
  params, mutable, _ = state_lib.abstract(objective, spec, mesh, common.RULES)
  optimizer = optim.build(c.optim, 100, list(params))
  target = state_lib.abstract_state(params, mutable, optimizer, False, mesh)
  where = jax.tree.map(lambda x: x.sharding, target)
  state = state_lib.init(objective, target, optimizer, 0, spec)
  step = make_step(objective, optimizer, seed=0, accum=1, ema=0.0, mesh=mesh, shardings=where)
  data = sharding.put_batch(data, mesh)
  for _ in range(2):
    state, _, finite = step(state, {}, data)
  finite.block_until_ready()
  start = time.perf_counter()
  for _ in range(_STEPS.value):
    state, _, finite = step(state, {}, data)
  finite.block_until_ready()
  rate = _STEPS.value / (time.perf_counter() - start)
  return rate * objective.tokens(data), rate, rate * objective.flops(data)


def main(_):
  limit, count = limits.matmul(), jax.device_count()
  print(f'{count} x {jax.devices()[0].device_kind}, {limit / 1e12:.2f} TFLOP/s each measured; {_VARIANT.value}')
  print(f'{"remat":<8}{"kernel":<8}{"tokens/s":>12}{"ms a step":>12}{"utilisation":>14}')
  for remat, kernel in itertools.product(_REMAT.value, _KERNEL.value):
    with sharding.use(common.MESHES[_MESH.value], common.RULES) as mesh:
      tokens, rate, flops = measure(remat, kernel, mesh)
    used = f'{100 * flops / (limit * count):.1f}%'
    print(f'{remat:<8}{kernel:<8}{tokens:>12,.0f}{1e3 / rate:>12.1f}{used:>14}', flush=True)


if __name__ == '__main__':
  app.run(main)
