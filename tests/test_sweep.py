"""A sweep: one run of train.py for each setting, whatever becomes of the others, none repeated, all in one table."""

import json
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from dalle_jax import sweep
from dalle_jax.training import errors
from tests import runs

ROOT = Path(__file__).parents[1]
RECIPE = """
from configs import common

def get_config(arg=''):
  arg = common.parse_arg(arg, staged=False)
  c = common.base()
  c.train.steps, c.stages = 4, ('one', 'two') if arg.staged else ()
  return c

def sweep(add):
  for lr in (0.5, 0.25):
    add(**{'optim.lr': lr, 'seed': 1})
  add(**{'train.evals': ('loss',)})
  add()
"""
NAMES = ['optim.lr=0.5,seed=1', 'optim.lr=0.25,seed=1', 'train.evals=_loss_,_', 'base']
# Takes the place of train.py: diverges with lr 0.25, waits for a signal with --config.objective=wait.
TRAIN = """
import json, pathlib, signal, sys, time
from dalle_jax.training import config
c = config.parse(sys.argv)
run = pathlib.Path(c.run_dir)
with (run / 'begun').open('a') as f:
  f.write('x')
if c.objective == 'wait':
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  time.sleep(60)
with (run / 'metrics.jsonl').open('w') as f:
  first = {'step': 2, 'loss': 2 * c.optim.lr, 'val_loss': 9.0, 'lr': 0.1}
  for line in (first, {'step': c.train.steps, 'loss': c.optim.lr}):
    f.write(json.dumps(line) + '\\n')
if c.optim.lr == 0.25:
  sys.exit(3 if c.train.steps == 4 else 1)  # diverged, or an error that is not caught
meta = run / 'checkpoints' / str(c.train.steps) / 'meta'
meta.mkdir(parents=True)
(meta / 'metadata').write_text(json.dumps({'config': config.to_json(c)}))
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
  (tmp_path / 'recipe.py').write_text(RECIPE)
  (tmp_path / 'train.py').write_text(TRAIN)
  monkeypatch.setattr(sweep, 'TRAIN', tmp_path / 'train.py')
  monkeypatch.setattr(sweep, 'POLL', 0.01)
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  return str(tmp_path / 'recipe.py')


@pytest.fixture
def run(tmp_path, recipe):
  handler = signal.getsignal(signal.SIGTERM)
  yield lambda *arguments: runs.call(sweep, '--config', recipe, '--root', tmp_path / 'out', *arguments)
  signal.signal(signal.SIGTERM, handler)


def rows(tmp_path):
  return json.loads((tmp_path / 'out' / 'sweep.json').read_text())


def begun(tmp_path):
  return [len((tmp_path / 'out' / name / 'begun').read_text()) for name in NAMES]


def test_a_failure_stops_no_other_run_and_only_it_is_repeated(tmp_path, run, capsys):
  assert run('--parallel', '2') == 2
  said = capsys.readouterr()
  assert '4 of 4 runs to do' in said.out and 'error: 1 of 4 runs have not finished' in said.err
  found = rows(tmp_path)
  assert [r['run'] for r in found] == NAMES
  assert [r['status'] for r in found] == ['finished', 'diverged', 'finished', 'finished']
  assert found[0]['overrides'] == {'optim.lr': 0.5, 'seed': 1}
  assert (found[0]['step'], found[0]['loss'], found[0]['val_loss'], found[0]['lr']) == (4, 0.5, 9.0, 0.1)
  table = (tmp_path / 'out' / 'sweep.md').read_text()
  assert table.splitlines()[0] == '| run | optim.lr | seed | train.evals | status | step | loss | val_loss |'
  assert table.splitlines()[3] == f'| {NAMES[1]} | 0.25 | 1 |  | diverged | 4 | 0.25 | 9 |' and table in said.out
  assert begun(tmp_path) == [1, 1, 1, 1]
  assert 'warning' not in said.out
  assert run('--config.seed=7') == 2  # for all; seed of an override comes after it
  warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith('warning: ')]
  again = 'was finished with another config (seed: 0 -> 7); delete it to train it again, or give another --root'
  assert warned == [f'warning: {tmp_path}/out/{name} {again}' for name in NAMES[2:]]
  assert begun(tmp_path) == [1, 2, 1, 1]
  assert run('--config.train.steps=5') == 2
  assert begun(tmp_path) == [2, 3, 2, 2]
  assert [r['status'] for r in rows(tmp_path)] == ['finished', 'failed (exit 1)', 'finished', 'finished']


def test_a_run_killed_in_its_last_evaluation_is_not_finished(tmp_path):
  run = sweep.Run(tmp_path, {}, [], steps=4)
  assert not run.finished()
  (tmp_path / 'checkpoints' / '4').mkdir(parents=True)
  (tmp_path / 'metrics.jsonl').write_text('{"step": 2}\n')
  assert not run.finished()
  (tmp_path / 'metrics.jsonl').write_text('{"step": 2}\n{"step": 4}\n')
  assert run.finished()


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--config', 'nope.py'], "the config cannot be read: [Errno 2] No such file or directory: 'nope.py'"),
    (['--config', f'{ROOT}/configs/emoji.py'], 'emoji.py has no function `sweep`'),
    (['--config.optim.lrr=1'], "no field 'optim.lrr'; did you mean optim.lr"),
    (['--slurm', 'fast'], '--slurm fast is not understood'),
    (['--gpus=1', '--executor=slurm'], '--gpus is for local runs; on Slurm pass --slurm gpus_per_node=N'),
    (['extra'], "arguments ['extra'] are not understood"),
  ],
)
def test_mistakes_are_one_line_before_anything_runs(run, tmp_path, capsys, arguments, message):
  assert run(*arguments) == 2
  err = capsys.readouterr().err
  assert message in err and len(err.splitlines()) == 1
  assert not (tmp_path / 'out').exists()


def test_a_sweep_is_of_one_stage_and_of_different_runs(tmp_path, recipe):
  with pytest.raises(ValueError, match=r'has the stages one, two; sweep one of them'):
    sweep.plan(f'{recipe}:staged', tmp_path, [])
  Path(recipe).write_text(f'{RECIPE}  add(**{{"optim.lr": 0.5, "seed": 1}})\n')
  with pytest.raises(ValueError, match=r'adds optim.lr=0.5,seed=1 more than once'):
    sweep.settings(recipe)
  for text, message in (
    ('def sweep():\n  pass', r'recipe.py: TypeError: sweep\(\) takes 0 positional arguments but 1 was given'),
    ('def sweep(add):\n  add({"seed": 1})', r"calls add\({'seed': 1}\); pass fields by name: add"),
    ('def sweep(add):\n  add(**{"seed": 1 / 0})', r'recipe.py, line 2: ZeroDivisionError: division by zero'),
  ):
    Path(recipe).write_text(text)
    with pytest.raises(ValueError, match=message):
      sweep.settings(recipe)


def test_the_end_of_the_launcher_lets_its_runs_save(tmp_path, recipe):
  code = f'import sys; from dalle_jax import sweep; sweep.TRAIN = {str(tmp_path / "train.py")!r}; '
  code += 'sys.exit(sweep.main(sys.argv))'
  command = [sys.executable, '-c', code, '--config', recipe, '--root', str(tmp_path / 'out'), '--config.objective=wait']
  child = subprocess.Popen([*command, '--parallel=2'], cwd=ROOT, stderr=subprocess.PIPE, text=True)
  deadline = time.monotonic() + 60
  while not all((tmp_path / 'out' / n / 'begun').exists() for n in NAMES[:2]):
    assert time.monotonic() < deadline and child.poll() is None
    time.sleep(0.05)
  time.sleep(0.2)
  child.send_signal(signal.SIGTERM)
  _, err = child.communicate(timeout=30)
  assert child.returncode == errors.STOPPED and err == 'stopped; run the same command to resume.\n'
  assert [r['status'] for r in rows(tmp_path)] == ['waiting'] * 4
  assert not (tmp_path / 'out' / NAMES[2] / 'begun').exists()


def test_each_run_has_gpus_of_its_own(tmp_path, recipe, monkeypatch):
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,5,7')
  with pytest.raises(ValueError, match='--parallel 2 with --gpus 2 needs 4 GPUs; there are 3,5,7'):
    sweep.shares(2, 2)
  assert sweep.shares(3, 1) == ['3', '5', '7'] and sweep.shares(2, 0) == [None, None]
  tell = [sys.executable, '-c', 'import os; print(os.environ["CUDA_VISIBLE_DEVICES"])']
  told = [sweep.Run(tmp_path / str(i), {}, tell, 1) for i in range(4)]
  for run in told:
    run.path.mkdir()
  assert [code for _, code in sweep.locally(told, 2, 1)] == [0] * 4
  seen = [Path(run.log).read_text().strip() for run in told]
  assert seen[:2] == ['3', '5'] and set(seen[2:]) <= {'3', '5'}


# --- Slurm


def fake_submitit(monkeypatch):
  """Runs at once what is submitted; the second job is lost. Returns what it was asked for."""
  module, asked = types.ModuleType('submitit'), {}

  class Job:
    state = 'OUT_OF_MEMORY'

    def __init__(self, function, arguments, number):
      self.number, self.code = number, function(*arguments)

    def exception(self):
      return RuntimeError('killed\nby the kernel') if self.number == 1 else None

    def result(self):
      return self.code

    def cancel(self):
      asked['cancelled'] = asked.get('cancelled', 0) + 1

  class AutoExecutor:
    def __init__(self, folder, cluster):
      asked.update(folder=folder, cluster=cluster)

    def update_parameters(self, **parameters):
      asked.update(parameters)

    def map_array(self, function, *columns):
      return [Job(function, arguments, i) for i, arguments in enumerate(zip(*columns, strict=True))]

  module.AutoExecutor = AutoExecutor
  module.helpers = types.SimpleNamespace(as_completed=iter)
  monkeypatch.setitem(sys.modules, 'submitit', module)
  return asked


def test_slurm_gets_one_array_and_its_parameters(tmp_path, run, monkeypatch):
  asked = fake_submitit(monkeypatch)
  assert run('--executor=slurm', '--parallel=3', '--slurm=mem_gb=64', '--slurm=slurm_partition=gpu') == 2
  assert (asked['cluster'], asked['slurm_array_parallelism'], asked['mem_gb']) == ('slurm', 3, 64)
  assert asked['slurm_partition'] == 'gpu' and 'cancelled' not in asked
  lost = 'failed (OUT_OF_MEMORY: killed by the kernel)'
  assert [r['status'] for r in rows(tmp_path)] == ['finished', lost, 'finished', 'finished']


def test_slurm_jobs_are_cancelled_when_the_launcher_ends(tmp_path, recipe, monkeypatch):
  asked = fake_submitit(monkeypatch)
  runs = sweep.plan(recipe, tmp_path / 'out', [])
  for r in runs:
    r.path.mkdir(parents=True)
  ended = sweep.on_slurm(runs, 1, tmp_path, {})
  next(ended)
  ended.close()
  assert asked['cancelled'] == 3


def test_slurm_without_its_package_names_it(run, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'submitit', None)
  assert run('--executor=slurm') == 2
  assert 'pip install -e ".[launch]"' in capsys.readouterr().err
