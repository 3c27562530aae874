"""Kills a training run with SIGKILL at random moments, restarts it with the same command, and compares the result.

  python benchmarks/kill.py --config=configs/quickstart.py:vqgan --override=--config.train.steps=300
Prints when it was killed, and whether all parameters are bit-identical to those of an uninterrupted run.
"""

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from dalle_jax.training import checkpoint

_CONFIG = flags.DEFINE_string('config', 'configs/quickstart.py:vqgan', 'config of a single run')
_OVERRIDES = flags.DEFINE_multi_string(
  'override', ['--config.train.steps=300'], 'argument for train.py; can be repeated'
)
_EVERY = flags.DEFINE_integer('checkpoint_every', 25, 'steps between checkpoints')
_KILLS = flags.DEFINE_integer('kills', 3, 'number of kills')
_SEED = flags.DEFINE_integer('seed', 0, 'seed of the random moments')


def main(_):
  with tempfile.TemporaryDirectory() as work:
    compare(Path(work))


def compare(work: Path) -> None:
  def command(name):
    every = f'--config.train.checkpoint_every={_EVERY.value}'
    return [
      sys.executable, 'train.py', f'--config={_CONFIG.value}', f'--config.run_dir={work / name}', every,
      *_OVERRIDES.value,
    ]  # fmt: skip

  start = time.monotonic()
  subprocess.run(command('uninterrupted'), check=True, stdout=subprocess.DEVNULL)
  seconds = time.monotonic() - start
  last = checkpoint.steps(work / 'uninterrupted')[0]
  print(f'uninterrupted: {last} steps in {seconds:.0f} s')
  rng = random.Random(_SEED.value)
  for _ in range(_KILLS.value):
    child = subprocess.Popen(command('killed'), stdout=subprocess.DEVNULL)
    wait = rng.uniform(0.2, 0.6) * seconds
    time.sleep(wait)
    child.send_signal(signal.SIGKILL)
    code = child.wait()
    print(f'killed after {wait:.1f} s (exit {code}); checkpoints on disk: {checkpoint.steps(work / "killed")}')
    if code != -signal.SIGKILL:
      sys.exit('error: the run ended before it was killed; give it more steps')
  subprocess.run(command('killed'), check=True, stdout=subprocess.DEVNULL)
  a, b = (checkpoint.load_run(work / name, ema=False) for name in ('uninterrupted', 'killed'))
  pairs = list(zip(*(jax.tree.leaves(run.params) for run in (a, b)), strict=True))
  same = sum(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)
  print(f'step {a.step} and {b.step}: {same} of {len(pairs)} parameters are bit-identical')
  if same != len(pairs) or a.step != b.step:
    sys.exit('error: the two runs differ')


if __name__ == '__main__':
  app.run(main)
