"""Runs train.py once for each setting that a config's `sweep` adds, here or on Slurm, and tabulates the results.

  python -m dalle_jax.sweep --config configs/story_shapes.py --root runs/sweep --parallel 2 --gpus 1
  python -m dalle_jax.sweep --config configs/NAME.py:ARGUMENT --executor slurm --slurm gpus_per_node=8 \\
    --slurm timeout_min=720 --slurm slurm_partition=gpu --config.train.steps=2000
In the config file, `def sweep(add)` calls `add(**{'optim.lr': 1e-3, 'seed': 1})` for each run. This one is in
ROOT/optim.lr=0.001,seed=1, with its output in train.log there. `--config.NAME=VALUE` on the command line applies to all
runs. A run that fails does not stop the others; the same command resumes those that are not finished. ROOT/sweep.md and
sweep.json have one row per run and are written whenever a run ends.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from dalle_jax.training import checkpoint, errors, metrics
from dalle_jax.training import config as config_lib

TRAIN = Path(__file__).resolve().parents[1] / 'train.py'
ENDS = {
  0: 'finished',
  errors.DIVERGED: 'diverged',
  errors.STOPPED: 'stopped',
}  # by exit status of train.py; any other means failed
POLL = 0.2  # seconds
# Metrics that the table leaves out
OMITTED = re.compile(r'(steps_per_second|tokens_per_second|utilisation|lr|grad_norm)(/.*)?')
FLAGS = flags.FlagValues()
flags.DEFINE_string('config', '', 'file.py:argument; the file defines a function `sweep`', flag_values=FLAGS)
flags.DEFINE_enum('executor', 'local', ['local', 'slurm'], 'where the runs are executed', flag_values=FLAGS)
flags.DEFINE_string('root', '', 'parent of the run directories; by default runs/sweeps/NAME', flag_values=FLAGS)
flags.DEFINE_integer('parallel', 1, 'runs at the same time', 1, flag_values=FLAGS)
flags.DEFINE_integer(
  'gpus', 0, 'GPUs for each local run, not shared; 0: every run sees all of them', 0, flag_values=FLAGS
)
flags.DEFINE_multi_string('slurm', [], 'NAME=VALUE, a parameter of submitit such as mem_gb', flag_values=FLAGS)
flags.DEFINE_bool('debug', False, 'show tracebacks', flag_values=FLAGS)


@dataclasses.dataclass
class Run:
  """One setting: its run directory, the command that trains it, its number of steps and config, and how it ended."""

  path: Path
  overrides: Mapping[str, Any]
  command: Sequence[str]
  steps: int
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  status: str = 'waiting'

  @property
  def log(self) -> str:
    return str(self.path / 'train.log')

  def finished(self) -> bool:
    """Whether all steps are done and the last one is logged; a run killed in its last evaluation has not logged it."""
    last = next(iter(checkpoint.steps(self.path)), 0)
    return last >= self.steps and metrics.logged(self.path, last)

  def changes(self) -> list[str]:
    """How the config differs from that of the newest checkpoint, apart from what train.py itself sets."""
    if not (meta := checkpoint.read_meta(self.path)):
      return []
    ignored = r'run_dir|train\.(steps|compilation_cache)|tokenizer\.vocab_size'
    if self.config['model'].get('variant') == 'init':  # the fields come from the run to start from
      ignored += r'|(model|loss\.disc|tokenizer)\..*'
    lines = config_lib.changes(meta['config'], self.config)
    return [line for line in lines if not re.fullmatch(ignored, line.partition(': ')[0])]

  def results(self) -> dict[str, float]:
    """The last value of every metric."""
    return {k: v for line in metrics.read(self.path / 'metrics.jsonl') for k, v in line.items()}


def settings(config: str) -> list[dict[str, Any]]:
  """The settings that `sweep` of a config file adds, each as field -> value. Raises one-line ValueError or OSError."""
  path = config.partition(':')[0]
  added: list[dict[str, Any]] = []

  def add(*wrong: Any, **overrides: Any) -> None:
    if wrong:
      raise ValueError(f'`sweep` of {path} calls add({wrong[0]!r}); pass fields by name: add(**{{"optim.lr": 1e-3}}).')
    added.append(overrides)

  module = config_lib.load_file(path, 'sweep')
  with config_lib.user_code(path):
    module.sweep(add)
  if not added:
    raise ValueError(f'`sweep` of {path} adds no run; call add(**{{"optim.lr": 1e-3}}) for each.')
  names = list(map(name, added))
  if again := [n for n in names if names.count(n) > 1]:
    raise ValueError(f'`sweep` of {path} adds {again[0]} more than once; every run needs different overrides.')
  return added


def name(overrides: Mapping[str, Any]) -> str:
  """{'optim.lr': 1e-3, 'seed': 1} -> 'optim.lr=0.001,seed=1', as a directory name; 'base' without overrides."""
  return re.sub(r'[^\w.=,+-]+', '_', ','.join(f'{k}={v}' for k, v in overrides.items())) or 'base'


def plan(config: str, root: Path, common: Sequence[str]) -> list[Run]:
  """The runs of a sweep, whose configs have all been parsed. Raises ValueError or OSError of one line."""
  runs = []
  for overrides in settings(config):
    path = root / name(overrides)
    given = [*common, *(f'--config.{k}={v}' for k, v in overrides.items()), f'--config.run_dir={path}']
    command = [sys.executable, str(TRAIN), f'--config={config}', *given]
    parsed = config_lib.parse(command[1:])
    if parsed.stages:
      stages = ', '.join(parsed.stages)
      raise ValueError(f'{config} has the stages {stages}; sweep one of them: --config {config}:STAGE.')
    runs.append(Run(path, overrides, command, parsed.train.steps, config_lib.to_json(parsed)))
  return runs


Ended = Generator[tuple[Run, int | str], None, None]  # each run with its exit status, or a description of its end


def start(command: Sequence[str], log: str, gpus: str | None = None) -> subprocess.Popen:
  """Starts training in a process that logs to `log` and sees only `gpus`, e.g. '0,1'; Ctrl-C does not reach it."""
  visible = {} if gpus is None else {'CUDA_VISIBLE_DEVICES': gpus}
  with open(log, 'ab') as output:
    return subprocess.Popen(
      command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | visible
    )


def execute(command: Sequence[str], log: str) -> int:
  return start(command, log).wait()


def shares(parallel: int, gpus: int) -> list[str | None]:
  """Divides the GPUs that CUDA_VISIBLE_DEVICES names, or else all, among `parallel` runs. Raises ValueError."""
  if not gpus:
    return [None] * parallel
  available = [x for x in os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',') if x]
  if not available and shutil.which('nvidia-smi'):
    listed = subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True).stdout
    available = [str(i) for i in range(len(listed.splitlines()))]
  if len(available) < parallel * gpus:
    names = ','.join(available) or 'none'
    raise ValueError(f'--parallel {parallel} with --gpus {gpus} needs {parallel * gpus} GPUs; there are {names}.')
  return [','.join(available[i * gpus : (i + 1) * gpus]) for i in range(parallel)]


def locally(runs: Sequence[Run], parallel: int, gpus: int = 0) -> Ended:
  """Trains `parallel` runs at a time on this machine; when this program ends, they may save before they stop."""
  waiting, running, free = list(runs), {}, shares(parallel, gpus)
  try:
    while waiting or running:
      while waiting and free:
        run, share = waiting.pop(0), free.pop(0)
        running[start(run.command, run.log, share)] = run, share
      for child in [c for c in running if c.poll() is not None]:
        run, share = running.pop(child)
        free.append(share)
        yield run, child.returncode
      time.sleep(POLL)
  finally:
    for child in running:
      child.terminate()
    for child in running:
      child.wait()


def on_slurm(runs: Sequence[Run], parallel: int, folder: Path, options: Mapping[str, Any]) -> Ended:
  """Submits the runs as one job array and waits for them; when this program ends, jobs that are left are cancelled."""
  if not runs:
    return
  try:
    import submitit
  except ImportError as e:
    raise ValueError(f'--executor slurm needs submitit; run: pip install -e ".[launch]" ({e}).') from e
  executor = submitit.AutoExecutor(folder=folder, cluster='slurm')
  executor.update_parameters(**{'name': 'sweep', 'slurm_array_parallelism': parallel, **options})
  jobs = executor.map_array(execute, [r.command for r in runs], [r.log for r in runs])
  waiting = dict(zip(jobs, runs, strict=True))
  try:
    for job in submitit.helpers.as_completed(jobs):
      if error := job.exception():  # out of memory or time, or cancelled by someone
        yield waiting.pop(job), f'failed ({job.state}: {" ".join(str(error).split())[:200]})'
      else:
        yield waiting.pop(job), job.result()
  finally:
    for job in waiting:
      job.cancel()


def write(root: Path, runs: Sequence[Run]) -> str:
  """Writes ROOT/sweep.json, with all metrics, and the table ROOT/sweep.md; returns the latter."""
  about = lambda r: {'run': r.path.name, 'overrides': dict(r.overrides), 'status': r.status}
  rows: list[dict[str, Any]] = [about(r) | r.results() for r in runs]
  fields = dict.fromkeys(k for r in runs for k in r.overrides)
  columns = [k for k in dict.fromkeys(k for r in runs for k in r.results()) if not OMITTED.fullmatch(k)]
  lines = [['run', *fields, 'status', *columns]]
  lines += [['---'] * len(lines[0])]
  for row in rows:
    values = [f'{row[k]:.6g}' if k in row else '' for k in columns]
    lines.append([row['run'], *(str(row['overrides'].get(k, '')) for k in fields), row['status'], *values])
  table = ''.join(f'| {" | ".join(cell.replace("|", " ") for cell in line)} |\n' for line in lines)
  for file, text in (('sweep.json', json.dumps(rows, indent=2, default=str) + '\n'), ('sweep.md', table)):
    partial = root / f'{file}.tmp'
    partial.write_text(text)
    os.replace(partial, root / file)
  return table


def sweep(runs: Sequence[Run], root: Path, executor: Callable[[Sequence[Run]], Ended]) -> None:
  """Runs what is not finished and keeps the table up to date. Raises ValueError if some runs do not finish."""
  for run in runs:
    run.path.mkdir(parents=True, exist_ok=True)
    run.status = 'finished' if run.finished() else 'waiting'
    if run.status == 'finished' and (changed := run.changes()):
      print(
        f'warning: {run.path} was finished with another config ({"; ".join(changed[:5])}); delete it to train it '
        'again, or give another --root',
        flush=True,
      )
  left = [r for r in runs if r.status == 'waiting']
  print(f'{len(left)} of {len(runs)} runs to do in {root}', flush=True)
  write(root, runs)
  with contextlib.closing(executor(left)) as ended:
    for run, code in ended:
      run.status = code if isinstance(code, str) else ENDS.get(code, f'failed (exit {code})')
      print(f'{run.path.name}: {run.status}', flush=True)
      write(root, runs)
  print(write(root, runs))
  if failed := [r for r in runs if r.status != 'finished']:
    raise ValueError(f'{len(failed)} of {len(runs)} runs have not finished; see {failed[0].log} for the first.')


def run(common: Sequence[str]) -> None:
  if not FLAGS.config:
    raise ValueError('no config is given; pass --config configs/NAME.py of one with a function `sweep`.')
  stem = re.sub(r'\W+', '_', FLAGS.config.removeprefix('configs/').replace('.py', ''))
  root = Path(FLAGS.root or f'runs/sweeps/{stem}').expanduser()
  if FLAGS.gpus and FLAGS.executor != 'local':
    raise ValueError('--gpus is for local runs; on Slurm pass --slurm gpus_per_node=N.')
  if wrong := [o for o in FLAGS.slurm if '=' not in o]:
    raise ValueError(f'--slurm {wrong[0]} is not understood; expected NAME=VALUE, e.g. timeout_min=60.')
  options = {k: int(v) if v.isdigit() else v for k, v in (o.split('=', 1) for o in FLAGS.slurm)}
  where = {
    'local': lambda left: locally(left, FLAGS.parallel, FLAGS.gpus),
    'slurm': lambda left: on_slurm(left, FLAGS.parallel, root / 'slurm', options),
  }
  sweep(plan(FLAGS.config, root, common), root, where[FLAGS.executor])


def main(argv: list[str]) -> int:
  common = [a for a in argv if re.match('--?config[.]', a)]
  signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does
  own = [a for a in argv if a not in common]
  stopped = 'stopped; run the same command to resume.'
  return errors.command(own, FLAGS, lambda: run(common), __doc__, 'pass the config as --config.', stopped)


if __name__ == '__main__':
  sys.exit(main(sys.argv))
