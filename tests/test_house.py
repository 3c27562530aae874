"""The rules of the house: who imports whom, every family has its files, every shipped config builds what it names."""

import ast
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from absl import flags

import train
from configs import common
from dalle_jax.models import vqgan
from dalle_jax.pipelines.dalle import DallE
from dalle_jax.pipelines.dalle_mini import DallEMini
from dalle_jax.pipelines.story_dalle import StoryDallE
from dalle_jax.pipelines.storyganc import StoryGANc
from dalle_jax.pipelines.unclip import UnCLIP
from dalle_jax.training import config as config_lib
from dalle_jax.training import sharding

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {  # room -> rooms (or one file of a room)
  'layers': {'layers'},
  'functional': {'functional'},
  'data': {'data'},
  'training': {'training'},
  'models': {'models', 'layers', 'functional'},
  'objectives': {'objectives', 'models', 'functional', 'layers'},
  'aot': {'aot', 'models', 'training', 'functional', 'pipelines'},
  'convert': {'convert', 'models', 'training', 'data.restricted'},
  'evals': {'evals', 'models', 'functional', 'training', 'data', 'pipelines.grids'},
  'pipelines': {'pipelines', 'models', 'functional', 'training', 'data'},
  'sweep.py': {'training'},
}
OBJECTIVES = sorted(p.stem for p in (ROOT / 'dalle_jax' / 'objectives').glob('*.py') if p.stem != '__init__')
CONFIGS = sorted(p.stem for p in (ROOT / 'configs').glob('*.py') if p.stem not in ('__init__', 'common'))


def imported(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      yield from (f'{node.module}.{a.name}' for a in node.names)
    elif isinstance(node, ast.Import):
      yield from (a.name for a in node.names)


def test_imports_go_one_way():
  wrong = []
  for path in (ROOT / 'dalle_jax').rglob('*.py'):
    room = path.relative_to(ROOT / 'dalle_jax').parts[0]
    for name in imported(path):
      if name.startswith(('configs', 'train', 'sample', 'quickstart', 'tests')):
        wrong.append(f'{path.name} imports {name}')
      ours = name.removeprefix('dalle_jax.') if name.startswith('dalle_jax.') else ''
      if ours and not any(ours == r or ours.startswith(f'{r}.') for r in MAY_IMPORT[room]):
        wrong.append(f'{room}/{path.name} imports {name}')
  for path in (ROOT / 'configs').glob('*.py'):
    wrong += [f'configs/{path.name} imports {n}' for n in imported(path) if n.startswith('dalle_jax')]
  assert wrong == []


def config(name, *arguments):
  return config_lib.parse(['train.py', f'--config={ROOT}/configs/{name}.py', *arguments], flags.FlagValues())


def stages(name):
  whole = config(name)
  argv = ['train.py', f'--config={ROOT}/configs/{name}.py']
  return [config_lib.parse(config_lib.with_stage(argv, s)) for s in whole.stages] or [whole]


@pytest.mark.parametrize('name', CONFIGS)
def test_shipped_configs_build_their_objective(name):
  runs = stages(name)
  networks = {'vqgan': {'model': {'variant': 'f8_8192' if runs[0].data.image_size >= 256 else 'quickstart'}}}
  networks['lpips'] = {'model': {'variant': 'vgg16'}}
  roberta = dict(vocab_size=50_265, length=32, pad=1, start=0, end=2)
  words = dict(vocab_size=512, length=24)
  networks['clip'] = {'model': {'variant': 'quickstart'}, 'tokenizer': words, 'data': {'image_size': 36}}
  networks['roberta'] = {'model': {'variant': 'base'}, 'tokenizer': roberta}
  if runs[0].model.get('variant') == 'init':  # fine-tuning of what `convert` made
    kind = {'vqgan': 'f16_1024', 'dalle_mini': 'mini'}.get(runs[0].objective, 'mindalle')
    networks['vqgan']['model']['variant'] = 'f16_16384'
    train.inherit(runs[0], {'model': {'variant': kind}, 'tokenizer': {'length': 64, 'pad': 0}})
  for c in runs:
    room = config_lib.module_named('objectives', c.objective, 'objective')
    train.check_frozen(c, room.FROZEN)
    frozen = {k: networks[k] for k in c.frozen}
    objective = room.from_config(c, frozen)
    size, text = c.data.image_size, c.tokenizer.length
    story = c.objective.startswith('story')
    batch = {'image': jax.ShapeDtypeStruct((2, *(5,) * story, size, size, 3), jnp.uint8)}
    batch['text'] = jax.ShapeDtypeStruct((2, *(4,) * story, text), jnp.int32)
    params, _ = jax.eval_shape(objective.init, jax.random.key(0), batch)
    assert set(params) & {c.objective, 'dalle', 'story', 'generator'} and sharding.logical_axes(params)
    assert config_lib.to_json(c) == config_lib.to_json(config_lib.to_json(c))
    networks[c.objective] = {**networks.get(c.objective, {}), 'model': config_lib.to_json(c.model)}
    for evaluator in c.train.evals:
      config_lib.module_named('evals', evaluator, 'evals')


@pytest.mark.parametrize('name', OBJECTIVES)
def test_every_objective_has_a_model_with_a_test_variant(name):
  model = importlib.import_module(f'dalle_jax.models.{name}')
  assert 'test' in model.VARIANTS and callable(model.build)
  assert callable(importlib.import_module(f'dalle_jax.objectives.{name}').from_config)


@pytest.mark.parametrize('pipeline', [DallE, DallEMini, StoryDallE, StoryGANc, UnCLIP])
def test_training_accepts_every_frozen_network_that_sampling_knows(pipeline):
  objective = config_lib.module_named('objectives', pipeline.OBJECTIVE, '')
  assert {*pipeline.REQUIRED, *pipeline.OPTIONAL} <= set(objective.FROZEN)
  assert set(getattr(objective, 'READS', ())) <= set(objective.FROZEN)


def test_the_paper_config_has_the_papers_numbers():
  c = config('dalle_paper')
  objective = config_lib.module_named('objectives', 'dalle', '').from_config(
    c, {'vqgan': {'model': {'variant': 'f8_8192'}}}
  )
  m = objective.model
  assert (m.text_length, m.text_vocab, m.image_length, m.image_vocab) == (256, 16_640, 1024, 8192)
  assert (m.depth, m.d_model, m.heads, m.attention) == (64, 3968, 62, 'paper')
  assert (c.optim.lr, c.optim.b2, c.optim.weight_decay, c.optim.clip) == (4.5e-4, 0.96, 4.5e-2, 4.0)
  assert (c.data.batch_size, c.train.steps, c.train.ema, c.tokenizer.dropout) == (1024, 430_000, 0.999, 0.1)
  v = vqgan.build('f8_8192')
  assert (v.grid(256), v.num_codes, v.code_dim, v.quantizer) == ((32, 32), 8192, 256, 'gumbel')
  assert common.MESHES['fsdp128'] == dict(c.mesh)
