"""What a user does with a DALL-E mini: sampling, reranking, meshes, int8, fine-tuning."""

import numpy as np
import pytest

import sample
import train
from configs import common
from dalle_jax.data import bpe
from dalle_jax.data.sources import shapes
from dalle_jax.models import clip, dalle_mini, vqgan
from dalle_jax.pipelines import generator
from dalle_jax.pipelines.dalle_mini import DallEMini
from dalle_jax.training import checkpoint, sharding
from tests import runs

SIZE, PROMPTS = 24, ['a small red circle at the top', 'two blue hearts', '']
WORDS = bpe.train((shapes.load('train', image_size=SIZE)[i]['caption'] for i in range(20)), 280)
TOKENIZER = dict(vocab_size=WORDS.vocab_size, length=8, pad=1, start=0, end=2)


def write(path, kind, model, config, *inputs, **options):
  runs.write(path, kind, model, {'tokenizer': TOKENIZER, **config}, *inputs, words=WORDS, **options)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp('runs')
  picture, text, codes = (
    np.zeros((1, SIZE, SIZE, 3), np.float32),
    np.zeros((1, 8), np.int32),
    np.zeros((1, 16), np.int32),
  )
  data = {'image_size': SIZE, 'path': '', 'source': 'shapes', 'source_args': {'image_size': SIZE, 'count': 50}}
  fields = dict(runs.VQGAN, pixels='unit')
  write(root / 'vqgan', 'vqgan', vqgan.build(**fields), {'model': fields, 'data': data}, picture)
  c = {'model': {'variant': 'test'}, 'data': data, 'tokenizer': TOKENIZER}
  write(root / 'clip', 'clip', clip.of_run(c), c, picture, text)
  small = dict(variant='test', depth=1)
  model = dalle_mini.build(**small, text_vocab=WORDS.vocab_size, text_length=8)
  params = {'dalle': runs.parameters(model.init, text, codes)['params']}
  frozen = {'vqgan': str(root / 'vqgan')}
  config = {'objective': 'dalle_mini', **c, 'model': small}
  checkpoint.export_run(root / 'mini', checkpoint.Run(config, params, WORDS.to_json(), 3, str(root), frozen))
  return root


@pytest.fixture(scope='module')
def model(root):
  return generator.load(root / 'mini', clip=root / 'clip')


def test_ranked_samples_are_the_same_on_a_mesh(root, model):
  assert isinstance(model, DallEMini) and (model.model.bos, model.model.eos, model.model.pad) == (0, 2, 1)
  drawn = model.sample(PROMPTS, n=2, seed=1, guidance=2.0)
  assert drawn[0].images.shape == (2, SIZE, SIZE, 3) and drawn[0].scores[0] >= drawn[0].scores[1]
  assert (drawn[0].tokens != drawn[1].tokens).any()
  with sharding.use(dict(data=2, fsdp=2, tensor=2), common.RULES) as mesh:
    split = DallEMini.load(root / 'mini', mesh=mesh, rules=common.RULES)
    for ours, theirs in zip(split.sample(PROMPTS, n=2, seed=1, guidance=2.0), drawn, strict=True):
      np.testing.assert_array_equal(ours.tokens[theirs.candidates], theirs.tokens)


def test_scripts(root, tmp_path, capsys):
  draw = ['--run', root / 'mini', '--out', tmp_path / 'drawn', '--n', 2, '--prompt', PROMPTS[0], '--int8']
  assert runs.call(sample, *draw, '--guidance', 2, '--top_k', 8) == 0
  assert {p.name for p in (tmp_path / 'drawn').iterdir()} == {'000_0.png', '000_1.png', 'grid.png', 'samples.json'}
  assert runs.call(sample, *draw, '--complete') == 2
  err = capsys.readouterr().err
  assert 'a DALL-E mini only reads captions and cannot complete them' in err and err.count('\n') == 1


def test_fine_tuning(root, tmp_path, capsys):
  arguments = [
    '--config.train.steps=1', '--config.train.log_every=1', '--config.train.eval_every=0', '--config.data.batch_size=8',
    '--config.data.source=shapes', '--config.data.augment=', '--config.data.workers=0', '--config.model.remat=full',
    f'--config.run_dir={tmp_path}/run',
  ]  # fmt: skip
  config = f'configs/finetune_dalle_mini.py:base={root}/mini,size={SIZE}'
  with runs.one_device():
    assert train.main(['train.py', f'--config={config}', f'--config.frozen.vqgan={root}/vqgan', *arguments]) == 0
  assert 'step 1/1' in capsys.readouterr().out
  before, after = (checkpoint.load_run(path) for path in (root / 'mini', tmp_path / 'run'))
  assert after.config['tokenizer']['end'] == 2 and after.tokenizer == before.tokenizer
  assert (before.params['dalle']['image_embed'] != after.params['dalle']['image_embed']).any()
