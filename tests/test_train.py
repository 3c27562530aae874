"""The command line of training."""

import pytest

import train

RECIPE = """
from configs import common

def get_config(arg=''):
  arg = common.parse_arg(arg, stage='')
  c = common.base()
  c.root, c.stages = 'ROOT', ('one', 'two')
  if arg.stage:
    common.choose_stage(c, arg.stage, dict(one=lambda c: None, two=lambda c: None))
  return c
"""


@pytest.fixture
def recipe(tmp_path):
  (tmp_path / 'recipe.py').write_text(RECIPE.replace('ROOT', str(tmp_path)))
  return str(tmp_path / 'recipe.py')


@pytest.mark.parametrize('stopped, status, runs', [(True, 143, ['one']), (False, 0, ['one', 'two'])])
def test_no_stage_begins_after_a_stop(tmp_path, recipe, monkeypatch, stopped, status, runs):
  begun = []

  def run(config):
    begun.append(config.run_dir)
    return stopped

  monkeypatch.setattr(train, 'run', run)
  assert train.main(['train.py', '--config', recipe]) == status
  assert begun == [f'{tmp_path}/{name}' for name in runs]
