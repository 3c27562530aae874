"""The command line of training."""

import subprocess
import sys

import numpy as np
import pytest
import yaml
from absl import flags

import train
from configs import common
from dalle_jax.data import sources
from dalle_jax.pipelines import encode
from dalle_jax.training import checkpoint, errors, sharding
from dalle_jax.training import config as config_lib
from tests import runs

RECIPE = """
from configs import common

def get_config(arg=''):
  arg = common.parse_arg(arg, stage='')
  c = common.base()
  c.objective, c.root, c.stages = 'clip', 'ROOT', ('one', 'two')
  if arg.stage:
    common.choose_stage(c, arg.stage, dict(one=lambda c: None, two=lambda c: None))
  return c
"""


@pytest.fixture
def recipe(tmp_path):
  (tmp_path / 'recipe.py').write_text(RECIPE.replace('ROOT', str(tmp_path)))
  return str(tmp_path / 'recipe.py')


@pytest.mark.parametrize('stopped, status, expected', [(True, 143, ['one']), (False, 0, ['one', 'two'])])
def test_no_stage_begins_after_a_stop(tmp_path, recipe, monkeypatch, stopped, status, expected):
  begun = []

  def run(config):
    begun.append(config.run_dir)
    return stopped

  monkeypatch.setattr(train, 'run', run)
  assert train.main(['train.py', '--config', recipe]) == status
  assert begun == [f'{tmp_path}/{name}' for name in expected]


def test_a_home_directory_is_that_of_the_user_and_names_of_files_are_always_printed(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.setattr(train, 'train', lambda config, run_dir, mesh: print(run_dir / config.encode.path / '\udce9'))
  (tmp_path / 'recipe.py').write_text(RECIPE.replace('ROOT', '~/runs'))
  command = ['train.py', '--config', f'{tmp_path}/recipe.py:stage=one', '--config.encode.path=~/codes']
  assert train.main(command) == 0
  assert capsys.readouterr().out == f'{tmp_path}/codes/\\udce9\n'
  assert train.main([*command, '--print_config']) == 0
  assert f'run_dir: {tmp_path}/runs/one' in capsys.readouterr().out


def test_print_config_prints_every_stage_and_writes_nothing(tmp_path, recipe, capsys):
  command = ['train.py', '--config', recipe, '--print_config', '--config.optim.lr=0.5']
  assert train.main(command) == 0
  one, two = yaml.safe_load_all(capsys.readouterr().out)
  assert (one['run_dir'], two['run_dir'], two['optim']['lr']) == (f'{tmp_path}/one', f'{tmp_path}/two', 0.5)
  assert one['rules'] == config_lib.to_json(common.RULES) and one['train']['evals'] == ['loss', 'pictures']
  assert [p.name for p in tmp_path.iterdir()] == ['recipe.py']

  command += ['--config.model.variant=init', f'--config.init.path={tmp_path}/start', '--config.tokenizer.vocab_size=9']
  assert train.main(command) == 0
  out = capsys.readouterr().out
  assert out.count(f'# without what it inherits from the run init.path: {tmp_path}/start has no checkpoints') == 2
  start = {'model': {'variant': 'mini', 'depth': 3}, 'tokenizer': {'length': 7, 'pad': 1}}
  checkpoint.export_run(tmp_path / 'start', checkpoint.Run(start, {'x': {'x': np.zeros(1)}}, None, 3, 'elsewhere'))
  assert train.main([*command, '--config.model.depth=5']) == 0
  one, _ = yaml.safe_load_all(capsys.readouterr().out)
  assert one['model'] == {'variant': 'mini', 'depth': 5} and one['tokenizer']['length'] == 7
  assert {p.name for p in tmp_path.iterdir()} == {'recipe.py', 'start'}


def test_print_config_refuses_what_training_refuses(recipe, capsys):
  for override, message in (
    ('--config.frozen.vqgna=x', "config.frozen has vqgna; for the objective 'clip' it uses no frozen networks."),
    ('--config.objective=clop', "config.objective 'clop' is unknown; dalle_jax/objectives has classifier, clip, "),
  ):
    assert train.main(['train.py', '--config', recipe, '--print_config', override]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith(f'error: {message}') and err.count('\n') == 1


def test_ctrl_c_outside_the_loop_is_one_line(recipe, monkeypatch, capsys):
  def run(config):
    raise KeyboardInterrupt

  monkeypatch.setattr(train, 'run', run)
  assert train.main(['train.py', '--config', recipe]) == 143
  assert capsys.readouterr().err == 'stopped; run the same command to resume.\n'
  values = flags.FlagValues()
  assert errors.command(['sample.py'], values, lambda: run(None), '', '') == 143
  assert capsys.readouterr().err == 'stopped.\n'


def test_only_scripts_of_our_own_hide_the_echoes_of_a_failed_save():
  code = """
import sys, train
class Echo:
  def __init__(self, text): self.text = text
  def __del__(self): raise RuntimeError(self.text)
for script in ('', 'ours'):
  if script: train.main(['train.py', '--config='])
  for text in ('Event loop is closed', 'another error'):
    print(script, 'echoes:', file=sys.stderr, flush=True)
    Echo(text)
"""
  done = subprocess.run([sys.executable, '-c', code], cwd=runs.ROOT, capture_output=True, text=True)
  shown = [text.partition('RuntimeError: ')[2].strip() for text in done.stderr.split('echoes:')[1:]]
  assert shown[0] == 'Event loop is closed' and shown[1].startswith('another error'), done.stderr
  assert shown[2:] == ['', 'another error'], done.stderr


def test_after_ctrl_c_nothing_is_taken_down():
  code = 'import atexit; from dalle_jax.training import errors; atexit.register(print, "taken down"); print("done"); '
  for status, out in (('errors.interrupted("stopped.")', 'done\n'), ('errors.STOPPED', 'done\ntaken down\n')):
    command = [sys.executable, '-c', f'{code} errors.leave({status})']
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (errors.STOPPED, out), done.stderr


@pytest.mark.parametrize(
  'objective, size, message',
  [
    ('clip', 64, "is a run of 'dalle', but this config trains 'clip'; pass another --config.run_dir"),
    ('dalle', 32, 'was trained with data.image_size=64, but this config has 32; set it back or pass another'),
  ],
)
def test_a_run_of_another_kind_is_left_untouched(tmp_path, objective, size, message):
  before = {'objective': 'dalle', 'data': {'image_size': 64}}
  checkpoint.export_run(tmp_path, checkpoint.Run(before, {'dalle': {'x': np.zeros(1)}}, None, 3, str(tmp_path)))
  files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*') if p.is_file()}
  c = common.base()
  c.run_dir, c.objective, c.data.image_size, c.encode.enabled = str(tmp_path), objective, size, True
  c.data.source, c.data.source_args = 'shapes', dict(count=4)
  with pytest.raises(ValueError, match=message) as e:
    train.run(c)
  assert '\n' not in str(e.value)
  assert files == {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*') if p.is_file()}


def test_a_frozen_network_that_the_objective_does_not_know_is_refused(tmp_path):
  c = common.base()
  c.run_dir, c.data.source, c.data.source_args = str(tmp_path), 'shapes', dict(count=4)
  for objective, expected in (('unclip', 'expected clip, prior, upsampler, '), ('clip', 'it uses no frozen networks.')):
    c.objective, c.frozen = objective, dict(clip='', vqgna='runs/vqgan')
    if objective == 'clip':
      del c.frozen.clip
    with pytest.raises(ValueError, match=f"^config.frozen has vqgna; for the objective '{objective}' {expected}"):
      train.run(c)
  before = {'objective': 'clip', 'frozen': {'vqgna': ''}}
  c.frozen.vqgna = str(tmp_path / 'vqgan')
  checkpoint.export_run(tmp_path, checkpoint.Run(before, {'clip': {'x': np.zeros(1)}}, None, 3, str(tmp_path)))
  with pytest.raises(FileNotFoundError, match='vqgan has no checkpoints'):  # it is kept, so it is copied
    train.run(c)


def test_damage_is_one_line_that_says_what_to_do(tmp_path):
  c = common.base()
  c.run_dir, c.objective, c.frozen = str(tmp_path), 'vqgan', dict(lpips='runs/lpips')
  for path in (tmp_path, tmp_path / 'frozen' / 'lpips'):
    run = checkpoint.Run({'objective': 'vqgan'}, {'x': {'x': np.zeros(1)}}, None, 3, 'elsewhere')
    checkpoint.export_run(path, run)
    for file in path.glob('checkpoints/3/state/_METADATA'):
      file.write_text('')
  with sharding.use(c.mesh, c.rules) as mesh, pytest.raises(OSError) as e:
    train.frozen_runs(c, tmp_path, mesh, started=True, reads=('lpips',))
  assert str(e.value) == f'{tmp_path}/frozen/lpips is damaged; delete it and it is copied again from runs/lpips.'
  (tmp_path / 'checkpoints' / '3' / 'meta' / 'metadata').write_text('{"conf')
  with pytest.raises(FileNotFoundError, match='has no checkpoint that can be read: all of them are damaged'):
    train.run(c)


def test_a_run_to_start_from_without_its_tokenizer_is_refused():
  c = common.base()
  c.tokenizer.vocab_size, c.init.path = 300, 'runs/other'
  with pytest.raises(ValueError, match='runs/other has no tokenizer; pass'):
    train.make_tokenizer(c, None, {'tokenizer': None}, [])


def test_a_complete_run_does_not_encode_other_data(tmp_path, monkeypatch):
  encoded_again = []
  monkeypatch.setattr(encode, 'encode_dataset', lambda source, vqgan, folder, *sizes: encoded_again.append(folder.name))
  monkeypatch.setattr(sources, 'load', lambda data, split: split)
  (tmp_path / 'checkpoints' / '3').mkdir(parents=True)
  (tmp_path / 'encoded' / 'train').mkdir(parents=True)
  (tmp_path / 'encoded' / 'train' / 'meta.json').touch()
  c, records = common.base(), {'train': [], 'val': []}
  for steps, expected in ((3, ['val']), (4, ['val', 'train', 'val'])):  # `val` is not there yet
    c.train.steps = steps
    assert train.encoded(c, records, {'vqgan': None}, tmp_path) == {'train': 'train', 'val': 'val'}
    assert encoded_again == expected
