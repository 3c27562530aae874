"""Tokens per second and model FLOPs utilisation of a training step, by rematerialisation and attention kernel.

  python -m benchmarks.step --size=t_base --batch_size=4 --peer=torch
  python -m benchmarks.step --size=mindalle --batch_size=64 --remat=dots --unroll=14    # 1.3B, on a GPU
Utilisation is relative to the rate of a large matrix product measured in the same run (`benchmarks/limits.py`). With
--story the batch consists of stories of four frames with cross-attention to their source.
"""

import itertools
import time

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from benchmarks import limits, sizes
from configs import common
from dalle_jax.models import vqgan
from dalle_jax.objectives import dalle, story_dalle
from dalle_jax.training import host, sharding
from dalle_jax.training.plan import Plan
from dalle_jax.training.step import make_step

_SIZE = flags.DEFINE_string('size', 't_base', 'name in benchmarks/sizes.py or variant in dalle_jax/models/dalle.py')
_BATCH = flags.DEFINE_integer('batch_size', 4, 'sequences or stories')
_STORY = flags.DEFINE_bool('story', False, 'stories of four frames, with cross-attention in every block')
_REMAT = flags.DEFINE_list('remat', ['none'], 'see layers.transformer.Stack')
_KERNEL = flags.DEFINE_list('kernel', ['auto'], 'see layers.kernels.stream_attention')
_UNROLL = flags.DEFINE_integer('unroll', 1, 'see layers.transformer.Stack; on a GPU, all scan steps', 1)
_STEPS = flags.DEFINE_integer('steps', 5, 'steps per measurement')
_MESH = flags.DEFINE_string('mesh', 'data', 'name in configs.common.MESHES')
_PEER = flags.DEFINE_enum('peer', '', ['', 'torch'], 'compare with plain PyTorch, eager and compiled')
FRAMES = 4
_WARM_UP = 3  # the first step compiles; from the third on, memory no longer grows


def objective_of(**changes):
  """Returns the objective and a batch for it."""
  rng, batch = np.random.default_rng(0), _BATCH.value
  draw = lambda vocab, *shape: rng.integers(0, vocab, (batch, *shape)).astype(np.int32)
  tokenizer = vqgan.build('test')
  if _STORY.value:
    model, defaults = sizes.story(_SIZE.value, **changes), ConfigDict(story_dalle.DEFAULTS)
    m = model.dalle
    data = {
      'text': draw(m.text_vocab, FRAMES, m.text_length),
      'tokens': draw(m.image_vocab, FRAMES + 1, m.image_length),
    }
    return story_dalle.StoryDALLEObjective(model, tokenizer, None, defaults), data
  m = sizes.model(_SIZE.value, **changes)
  data = {'text': draw(m.text_vocab, m.text_length), 'tokens': draw(m.image_vocab, m.image_length)}
  return dalle.DALLEObjective(m, tokenizer, ConfigDict(dalle.DEFAULTS)), data


def measure(remat: str, kernel: str, mesh: jax.sharding.Mesh) -> tuple[float, float, float]:
  """Returns steps, tokens and model FLOPs per second of the fastest of --steps; the peer is measured likewise."""
  objective, data = objective_of(remat=remat, kernel=kernel, unroll=_UNROLL.value)
  plan = Plan(common.base(), objective, data, mesh)
  state, step = plan.init(), make_step(plan)
  data = sharding.put_batch(data, mesh)
  times = []
  for _ in range(_WARM_UP + _STEPS.value):
    start = time.perf_counter()
    state, _, finite = step(state, {}, data)
    finite.block_until_ready()
    times.append(time.perf_counter() - start)
  rate = 1 / min(times[_WARM_UP:])
  return rate, rate * objective.tokens(data), rate * objective.flops(data)


def main(_):
  other = sizes.peer(_PEER.value)
  if jax.default_backend() == 'cpu':
    host.keep_memory()  # as train.py does; the peer benefits, too
  limit, count = limits.matmul(), jax.device_count()
  what = f'{_SIZE.value}, {_BATCH.value} {"stories" if _STORY.value else "sequences"}'
  print(
    f'{count} x {jax.devices()[0].device_kind}, {limit / 1e12:.2f} TFLOP/s measured on one; {what}, {sizes.dtype()}'
  )
  print(f'{"":<16}{"ms per step":>12}{"tokens/s":>12}{"utilisation":>14}{"peer":>8}')
  ours = []
  for remat, kernel in itertools.product(_REMAT.value, _KERNEL.value):
    with sharding.use(common.MESHES[_MESH.value], common.RULES) as mesh:
      rate, tokens, flops = measure(remat, kernel, mesh)
    ours.append(1 / rate)
    used = f'{100 * flops / (limit * count):.1f}%'
    print(f'{f"{remat}, {kernel}":<16}{1e3 / rate:>12.1f}{tokens:>12,.0f}{used:>14}', flush=True)
  if other is None:
    return
  print(f'the same product in torch: {other.matmul() / 1e12:.2f} TFLOP/s', flush=True)
  for compiled in (False, True):
    rows = _BATCH.value * (FRAMES if _STORY.value else 1)
    peer = other.step_seconds(sizes.model(_SIZE.value), rows, compiled, _STORY.value)
    name = 'torch.compile' if compiled else 'torch'
    print(f'{name:<16}{1e3 * peer:>12.1f}{tokens / rate / peer:>12,.0f}{"":>14}{peer / min(ours):>7.2f}x', flush=True)


if __name__ == '__main__':
  app.run(main)
