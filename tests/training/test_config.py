import subprocess
import sys
from pathlib import Path

import pytest

from configs import common
from dalle_jax.training import config as config_lib

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path):
  path = tmp_path / 'recipe.py'
  path.write_text(
    'from configs import common\n'
    'def get_config(arg=""):\n'
    '  arg = common.parse_arg(arg, stage="", size=8, small=False)\n'
    '  c = common.base()\n'
    '  c.data.image_size = arg.size\n'
    '  c.root, c.stages = "runs/x", ("one", "two")\n'
    '  if arg.stage:\n'
    '    common.choose_stage(c, arg.stage, dict(one=lambda c: c.optim.update(lr=0.5), two=lambda c: None))\n'
    '  return c\n'
  )
  return str(path)


@pytest.mark.parametrize('form', [['--config={}'], ['--config', '{}']])
def test_parse_overrides_and_stages(recipe, form):
  argv = ['train.py', *(f.format(f'{recipe}:size=16') for f in form), '--config.train.steps=3', '--config.root=runs/y']
  config = config_lib.parse(argv)
  assert (config.train.steps, config.data.image_size, config.stages) == (3, 16, ('one', 'two'))
  argv += ['--config.model.num_codes=7', '--config.loss.kind=a']
  new = config_lib.parse(argv)  # what the model, the objective and the players will check
  assert (new.model.num_codes, new.loss.kind) == (7, 'a')
  argv += [
    '--config.optim.groups.dalle.frozen=True',
    '--config.optim.groups.dalle.lr=2.0',
    '--config.loss.disc.width=8',
  ]
  new = config_lib.parse(argv)  # fields two levels below what the config has
  assert new.optim.groups.dalle.to_dict() == {'frozen': True, 'lr': 2.0} and new.loss.disc.width == 8
  one = config_lib.parse(config_lib.with_stage(argv, 'one'))
  assert (one.train.steps, one.data.image_size, one.run_dir, one.optim.lr) == (3, 16, 'runs/y/one', 0.5)
  assert one.stages == ()


@pytest.mark.parametrize(
  'override, message',
  [
    ('--config.optim.lrr=1', r"no field 'optim.lrr'; did you mean .*optim.lr"),
    ('--config.steps=1', r"no field 'steps'; did you mean train.steps"),
    ('--config.qqq=1', r"no field 'qqq'; it has data, encode"),
    ('--config.optim.groups.dalle=1', r"no field 'optim.groups.dalle'; did you mean optim.groups"),
    ('--config.optim.lr=fast', "could not convert string to float: 'fast'"),
    ('--config.train.steps=1.5', 'invalid literal for int'),
    ('--config.data=x', '^--config.data holds other fields; set one of those, as --config.data.NAME=VALUE.$'),
    ('--config.rules=(("embed",3),)', 'config.rules has .*; expected pairs of a logical axis and mesh axes'),
    ('--config.rules=(("embed",("data","data")),)', 'config.rules has .*; expected pairs of a logical axis and'),
    (f'--config.seed={2**32}', 'config.seed is 4294967296; expected 0 to 4294967295'),
    ('--config.rules=x', "config.rules has 'x'; expected pairs of a logical axis and mesh axes"),
    ('--conf=1', "Unknown command line flag 'conf'"),
    ('lr=1', "arguments \\['lr=1'\\] are not understood"),
  ],
)
def test_mistakes_are_one_line(recipe, override, message):
  with pytest.raises(ValueError, match=message) as e:
    config_lib.parse(['train.py', '--config', recipe, override])
  assert '\n' not in str(e.value)


def test_no_config_or_no_such_file():
  with pytest.raises(ValueError, match='no config is given; pass --config'):
    config_lib.parse(['train.py'])
  with pytest.raises(FileNotFoundError, match=r'cannot be read.*nope\.py'):
    config_lib.parse(['train.py', '--config', 'nope.py'])


@pytest.mark.parametrize(
  'text, message',
  [
    ('get_config = ', r'recipe.py, line 1: SyntaxError: invalid syntax'),
    ('import os\nimport no_such_module', r"recipe.py, line 2: ModuleNotFoundError: No module named 'no_such_module'"),
    ('def get_config(arg=""):\n  return int("x\\ny")', r'recipe.py, line 2: ValueError: invalid literal for int\(\)'),
    ('def get_config():\n  raise ValueError("wrong\\nsize")', r'^wrong size$'),
    ('def get_config(arg):\n  pass', r'recipe.py: TypeError: get_config\(\) missing 1 required positional argument'),
    ('def get_config():\n  pass', r'get_config of .*recipe.py returns NoneType; expected a ConfigDict'),
    ('def get_config():\n  return {}', r'returns dict; expected a ConfigDict'),
    ('x = 1', r'recipe.py has no function `get_config`'),
  ],
)
def test_mistakes_in_the_file_are_one_line(tmp_path, text, message):
  (tmp_path / 'recipe.py').write_text(text)
  with pytest.raises(ValueError, match=message) as e:
    config_lib.parse(['train.py', '--config', str(tmp_path / 'recipe.py')])
  assert '\n' not in str(e.value)


def test_what_is_not_a_config_file_is_named(tmp_path):
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(ValueError, match=r'config.json is not a Python file; pass --config'):
    config_lib.parse(['train.py', '--config', str(tmp_path / 'config.json')])
  with pytest.raises(OSError, match=r'the config cannot be read: .*Is a directory'):
    config_lib.parse(['train.py', '--config', str(tmp_path)])


def test_an_unknown_argument_of_the_file_is_one_line(recipe):
  with pytest.raises(ValueError, match=r"^config argument 'sise=4' is unknown; there are size") as e:
    config_lib.parse(['train.py', '--config', f'{recipe}:sise=4'])
  assert '\n' not in str(e.value)


def test_parse_arg():
  arg = common.parse_arg('two,size=4,small', stage='', size=8, small=False)
  assert (arg.stage, arg.size, arg.small) == ('two', 4, True)
  with pytest.raises(ValueError, match="argument 'sise=4' is unknown; there are size"):
    common.parse_arg('sise=4', stage='', size=8)
  with pytest.raises(ValueError, match="size='x' is not int"):
    common.parse_arg('size=x', size=8)
  assert [common.parse_arg(f'small={x}', small=True).small for x in ('yes', 'False', '0')] == [True, False, False]
  with pytest.raises(ValueError, match="small='on' is not bool"):
    common.parse_arg('small=on', small=False)


@pytest.mark.parametrize('name', ['fid', 'nope'])
def test_only_evaluations_of_the_loop_are_offered(name):
  assert config_lib.module_named('evals', 'loss', 'config.train.evals', 'build').build
  with pytest.raises(
    ValueError, match=f"^config.train.evals '{name}' is unknown; dalle_jax/evals has loss, pictures.$"
  ):
    config_lib.module_named('evals', name, 'config.train.evals', 'build')


def test_json_and_changes():
  a, b = (config_lib.to_json(common.base()) for _ in range(2))
  b['optim']['lr'] = 0.5
  assert a['rules'][0] == ['batch', ['data', 'fsdp']]
  assert config_lib.changes(a, b) == ['optim.lr: 0.001 -> 0.5']


def test_train_script_ends_in_one_line(recipe):
  done = subprocess.run(
    [sys.executable, 'train.py', '--config', recipe, '--config.optm.lr=1'], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 2 and done.stderr.startswith(
    "error: the config has no field 'optm.lr'; did you mean optim.lr"
  )
  assert len(done.stderr.splitlines()) == 1
