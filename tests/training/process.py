"""One process of a toy run, for test_processes.py: `python -m tests.training.process RUN_DIR STEPS [FLAGS]`.

`--event=KIND:PROCESS:STEP` makes that process fail ('bad') or send itself SIGKILL ('KILL'), SIGSTOP ('STOP') or SIGTERM
('TERM') when it reads the batch of that step, or report a skipped record from the beginning ('skip').
`--mesh` may name several: then there is a run in RUN_DIR/I for the I-th of them, and the event is in the last one.
"""

import os
import signal
import sys
import time

import jax
from absl import flags

from configs import common
from dalle_jax.training import distributed, errors, sharding
from tests.training import toy

MESHES = common.MESHES | {'across': dict(data=1, fsdp=1, tensor=4, sequence=1)}  # layers split over both processes
STEP = 0.04  # seconds, so that messages arrive before the run is over


def batches(start, event, part, parts):
  kind, process, at = event.split(':') if event else ('', -1, -1)
  Rows.skipped = {'picture 3': 1} if kind == 'skip' and jax.process_index() == int(process) else {}
  rows = toy.BATCH // parts
  mine = slice(part * rows, (part + 1) * rows)
  for step, batch in enumerate(toy.batches(start), start + 1):
    time.sleep(STEP)
    if (jax.process_index(), step) == (int(process), int(at)):
      if kind == 'bad':
        raise ValueError('the data of this process are bad')
      os.kill(os.getpid(), getattr(signal, f'SIG{kind}'))
    yield {k: v[mine] for k, v in batch.items()}


class Rows:
  """Batches, with the records that could not be read for them in `skipped`."""

  def __init__(self, rows):
    self.next = rows.__next__

  def __iter__(self):
    return self

  def __next__(self):
    return self.next()


def train(run_dir, steps, mesh, event=''):
  """Whether a signal asked for a stop."""
  c = toy.config(run_dir, steps=steps, log_every=1)
  c.mesh.update(MESHES[mesh])
  read = sharding.part_to_read(sharding.make_mesh(c.mesh))
  return toy.train(c, batches=lambda start: Rows(batches(start, event, *read)))[1]


def main(argv):
  values = flags.FlagValues()
  distributed.define_flags(values)
  flags.DEFINE_string('event', '', '', flag_values=values)
  flags.DEFINE_string('mesh', 'data', '', flag_values=values)
  _, run_dir, steps = values(argv)
  try:
    distributed.join(values)
    *before, last = values.mesh.split(',')
    for i, mesh in enumerate(before):
      train(f'{run_dir}/{i}', int(steps), mesh)
    stopped = train(f'{run_dir}/{len(before)}' if before else run_dir, int(steps), last, values.event)
  except errors.EXPECTED as e:
    return errors.report(e, debug=False)
  return 143 if stopped else 0


if __name__ == '__main__':
  sys.exit(main(sys.argv))
