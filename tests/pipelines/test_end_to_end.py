"""All three stages on the procedural world at the smallest sizes, then what a user does with the runs."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import sample
import train
from configs import common
from dalle_jax.data.sources import folder, shapes, tokens
from dalle_jax.models import lpips
from dalle_jax.pipelines import encode
from dalle_jax.pipelines.dalle import DallE
from dalle_jax.training import checkpoint, metrics, sharding
from tests import runs

PROMPTS = ['a small red circle at the top', 'two blue hearts', '']


def config(root, stage):
  c = common.base()
  c.root, c.data.source, c.data.image_size, c.data.batch_size = str(root), 'shapes', 24, 8
  c.data.source_args = dict(image_size=24, count=32)
  c.train.update(steps=2, log_every=1, checkpoint_every=1, eval_every=2, eval_batches=1, pictures=2)

  def vqgan(c):
    c.objective, c.model = 'vqgan', dict(runs.VQGAN)
    c.frozen = dict(lpips=str(root / 'lpips'))

  def clip(c):
    c.objective, c.model = 'clip', dict(variant='test')
    c.tokenizer.update(vocab_size=300, length=8)

  def dalle(c):
    c.objective, c.model, c.encode.enabled = 'dalle', dict(runs.DALLE), True
    c.frozen, c.loss = dict(vqgan=str(root / 'vqgan')), dict(caption_dropout=0.5)
    c.tokenizer.update(vocab_size=300, length=6)

  common.choose_stage(c, stage, dict(vqgan=vqgan, clip=clip, dalle=dalle))
  return c


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  path = tmp_path_factory.mktemp('runs')
  picture = np.zeros((1, 16, 16, 3), np.float32)
  runs.write(path / 'lpips', 'lpips', lpips.build('test'), {'model': {'variant': 'test'}}, picture, picture)
  with runs.one_device():
    for stage in ('vqgan', 'clip'):
      train.run(config(path, stage))
  train.run(config(path, 'dalle'))
  return path


@pytest.fixture(scope='module')
def model(root):
  return DallE.load(root / 'dalle', clip=root / 'clip')


def equal(a, b):
  for x, y in zip(a, b, strict=True):
    assert x.prompt == y.prompt
    np.testing.assert_array_equal(x.tokens, y.tokens)
    np.testing.assert_allclose(x.images.astype(int), y.images.astype(int), atol=1)


def test_the_run_holds_all_that_a_user_needs(root):
  run = root / 'dalle'
  assert {'config.json', 'metrics.jsonl', 'checkpoints', 'frozen', 'encoded', 'pictures', 'tb'} <= {
    p.name for p in run.iterdir()
  }
  last = json.loads((run / 'metrics.jsonl').read_text().splitlines()[-1])
  expected = {'loss', 'text_loss', 'image_loss', 'grad_norm', 'lr', 'val_loss', 'tokens_per_second', 'seconds'}
  assert expected <= set(last) and last['step'] == 2
  assert metrics.read(root / 'vqgan' / 'metrics.jsonl')[0]['lpips'] != 0  # by the frozen network
  # Eight pairs, one a device, of 48 x 24 pixels in three columns.
  assert Image.open(run / 'pictures' / 'samples_0000002.png').size == (3 * (48 + 2) + 2, 3 * (24 + 2) + 2)
  assert checkpoint.load_run(run).tokenizer == checkpoint.load_run(root / 'clip').tokenizer


def test_a_run_that_has_started_keeps_its_frozen_networks_and_a_new_one_renews_them(root, tmp_path, capsys):
  shutil.copytree(root / 'vqgan', tmp_path / 'other')
  c = config(root, 'dalle')
  with sharding.use(c.mesh, c.rules) as mesh:
    copy = tmp_path / 'run' / 'frozen' / 'vqgan'
    for path, started, expected in (('vqgan', False, 'vqgan'), ('other', True, 'vqgan'), ('other', False, 'other')):
      c.frozen.vqgan = str(tmp_path / path if path == 'other' else root / path)
      runs = train.frozen_runs(c, tmp_path / 'run', mesh, started, ('vqgan',))
      assert checkpoint.origin(copy).split(',')[0].endswith(expected) and runs['vqgan'].step == 2
      assert ('keeps its copy' in capsys.readouterr().out) == started
    shutil.rmtree(tmp_path / 'other')  # the copy is all that a run needs
    train.frozen_runs(c, tmp_path / 'run', mesh, False, ('vqgan',))


def test_codes_of_another_vqgan_are_refused(root):
  vqgan = checkpoint.load_run(root / 'vqgan')
  source = tokens.load('train', path=str(root / 'dalle' / 'encoded'))
  encode.check(source, vqgan)
  vqgan.params['vqgan'] = jax.tree.map(lambda x: x + 1, vqgan.params['vqgan'])
  with pytest.raises(ValueError, match='encoded by another VQGAN'):
    encode.check(source, vqgan)


def test_broken_captions_do_not_stop_the_tokenizer(tmp_path):
  for name, text in (('a', b'a red kite'), ('b', b'\xff\xfe\xfa'), ('c', b'a blue kite')):
    Image.new('RGB', (8, 8)).save(tmp_path / f'{name}.png')
    (tmp_path / f'{name}.txt').write_bytes(text)
  (tmp_path / 'c.png').write_bytes(b'no picture')
  source = folder.load('train', path=str(tmp_path), val_fraction=0.0)
  assert list(train.captions(source, 9)) == ['a red kite', 'a blue kite']


def test_samples_are_ranked_and_depend_on_prompt_seed_and_number_alone(model):
  samples = model.sample(PROMPTS, n=3, seed=5, guidance=2.0, temperature=0.9, top_k=12)
  for s in samples:
    assert s.images.shape == (3, 24, 24, 3) and s.images.dtype == np.uint8 and s.tokens.shape == (3, 16)
    assert sorted(s.candidates) == [0, 1, 2] and (np.diff(s.scores) <= 0).all()
    scores = model.reranker.scores([s.prompt], s.images[None])[0]
    np.testing.assert_allclose(scores, s.scores, atol=1e-5)
  again = model.sample(PROMPTS[1:], n=3, seed=5, guidance=2.0, temperature=0.9, top_k=12, batch_size=2)
  equal(again, samples[1:])
  (alone,) = model.sample(PROMPTS[:1], n=1, first=2, seed=5, guidance=2.0, temperature=0.9, top_k=12)
  np.testing.assert_array_equal(alone.tokens[0], samples[0].tokens[samples[0].candidates.tolist().index(2)])
  other = model.sample(PROMPTS, n=3, seed=6, guidance=2.0, temperature=0.9, top_k=12)
  assert (other[0].tokens != samples[0].tokens).any()


def test_captions_are_completed(model):
  captions = model.complete_captions(['a small', ''], n=3, seed=1, batch_size=4)
  assert [len(c) for c in captions] == [3, 3] and all(c.startswith('a small') for c in captions[0])
  assert len(set(captions[0] + captions[1])) > 2
  assert model.complete_captions([''], n=2, seed=1)[0] == captions[1][:2]  # whatever else is asked for
  long = 'a large yellow moon at the top left'
  kept = model.encode_text.bpe.decode(model.encode_text.bpe.encode(long)[:6])
  assert model.complete_captions([long]) == [[kept]]  # nothing is left to complete


def test_a_mesh_draws_the_same_pictures(root, model):
  expected = model.sample(PROMPTS, n=2, seed=1, guidance=2.0)
  compiled = model._draw._cache_size()
  model.sample(['one', 'prompt', 'more', 'than before'], n=2, seed=2, guidance=3.0, temperature=0.5)
  assert model._draw._cache_size() == compiled and DallE.load(root / 'dalle')._draw is model._draw
  with sharding.use(dict(data=2, fsdp=2, tensor=2), common.RULES) as mesh:
    split = DallE.load(root / 'dalle', clip=root / 'clip', mesh=mesh, rules=common.RULES)
    equal(split.sample(PROMPTS, n=2, seed=1, guidance=2.0), expected)
    # Few prompts with many images leave no device idle, in programs of the same size.
    draw, sizes, split.reranker = split._draw, [], None
    split._draw = lambda params, batch, *rest, **sampling: (
      sizes.append(batch['number'].shape) or draw(params, batch, *rest, **sampling)
    )
    (many,) = split.sample(PROMPTS[:1], n=8, seed=1, guidance=2.0)
    assert sizes == [(4, 2)] and draw._cache_size() == 1
  for first in range(0, 8, 2):
    (few,) = model.sample(PROMPTS, n=2, seed=1, guidance=2.0, first=first)[:1]
    np.testing.assert_array_equal(many.tokens[few.candidates], few.tokens)
    np.testing.assert_allclose(many.images[few.candidates].astype(int), few.images.astype(int), atol=1)


def test_the_top_of_a_picture_is_kept(model):
  image = shapes.load('test', image_size=24)[0]['image']
  codes = model.encode(image[None])
  sample = model.sample(PROMPTS[:1], n=2, init_image=image, keep_rows=3)[0]
  np.testing.assert_array_equal(sample.tokens[:, :12], np.repeat(codes[:, :12], 2, 0))
  recon = model.reconstruct(image[None])
  assert recon.shape == (1, 24, 24, 3) and recon.dtype == np.uint8


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    (dict(prompts='a circle'), 'prompts must be a list of strings'),
    (dict(prompts=[]), 'there are no prompts'),
    (dict(prompts=None), 'prompts must be a list of strings'),
    (dict(prompts=iter(PROMPTS)), 'prompts must be a list of strings'),
    (dict(prompts=['a \ud800']), 'has a lone surrogate'),
    (dict(n='2'), "n is '2'; expected a whole number"),
    (dict(temperature=float('nan')), 'temperature is nan'),
    (dict(n=0), 'n is 0 and batch_size 64; both must be 1 or more'),
    (dict(top_p=1.5), r'top_p 1.5 is not in'),
    (dict(keep_rows=2), 'keep_rows is 2; expected 1 to 3 of 4 rows with an init_image'),
    (dict(init_image=np.zeros((8, 8, 3), np.uint8), keep_rows=4), 'keep_rows is 4; expected 1 to 3 of 4 rows'),
    (dict(init_image=np.zeros((8, 8, 3), np.uint8), keep_rows=1.5), 'keep_rows is 1.5; expected 1 to 3 of 4 rows'),
    (dict(init_image=b'no picture', keep_rows=1), 'init_image is not an image that can be read'),
  ],
)
def test_bad_requests_are_one_line(model, kwargs, message):
  with pytest.raises(ValueError, match=message) as e:
    model.sample(**{'prompts': PROMPTS, **kwargs})
  assert '\n' not in str(e.value)


def test_a_run_of_another_kind_is_refused(root):
  with pytest.raises(ValueError, match="vqgan is a run of 'vqgan'; sampling needs one of the objective dalle"):
    DallE.load(root / 'vqgan')
  with pytest.raises(ValueError, match="dalle is a run of 'dalle'; reranking needs one of the objective clip"):
    DallE.load(root / 'dalle', clip=root / 'dalle')
  with pytest.raises(ValueError, match='has no parts named foo; expected vqgan'):
    DallE.load(root / 'dalle', parts={'foo': root / 'vqgan'})


def test_batches_of_nothing_are_refused(model):
  for size in (0, 1.5):
    with pytest.raises(ValueError, match=f'batch_size is {size} and there are 1 inputs'):
      model.vqgan.decode(np.zeros((1, 16), np.int32), batch_size=size)


def blank(*shape, dtype=np.uint8):
  return np.zeros(shape, dtype)


@pytest.mark.parametrize(
  ('method', 'arguments', 'message'),
  [
    ('encode_prompts', ['a red circle'], 'prompts must be a list of strings'),
    ('encode_prompts', [[]], 'there are no prompts'),
    ('encode_images', [blank(2, 9, 9, 3, dtype=float)], 'images are float64[2, 9, 9, 3]; expected uint8[B, 9, 9, 3]'),
    ('encode_images', [blank(2, 8, 24, 3)], 'images are uint8[2, 8, 24, 3]; expected uint8[B, 8, 8, 3]'),
    ('encode_images', [blank(2, 24, 24, 4)], 'images are uint8[2, 24, 24, 4]'),
    ('encode_images', [blank(2, 24, 24)], 'images are uint8[2, 24, 24]'),
    ('encode_images', [[blank(24, 24, 3)]], 'images are a list'),
    ('scores', ['a', blank(1, 1, 24, 24, 3)], 'prompts must be a list of strings'),
    ('scores', [[], blank(0, 1, 24, 24, 3)], 'there are no prompts'),
    ('scores', [['a'], [blank(1, 24, 24, 3)]], 'images are a list; expected uint8[1, n, S, S, 3]'),
    ('scores', [['a'], blank(2, 1, 24, 24, 3)], 'images are uint8[2, 1, 24, 24, 3]; expected uint8[1, n, S, S, 3]'),
    ('scores', [['a'], blank(1, 0, 24, 24, 3)], 'images are uint8[1, 0, 24, 24, 3]; expected uint8[1, n, S, S, 3]'),
  ],
)
def test_a_clip_refuses_what_it_cannot_compare(model, method, arguments, message):
  with pytest.raises(ValueError, match=re.escape(message)) as e:
    getattr(model.reranker, method)(*arguments)
  assert '\n' not in str(e.value)


def test_sample_script(root, tmp_path, capsys):
  run = lambda *more: runs.call(sample, '--out', tmp_path / 'out', '--n', 2, '--prompt', PROMPTS[0], *more)
  assert run('--run', root / 'dalle', '--clip', root / 'clip', '--prompt', 'snow', '--mesh', 'data=-1') == 0
  files = {'000_0.png', '000_1.png', '001_0.png', '001_1.png', 'grid.png', 'samples.json'}
  assert {p.name for p in (tmp_path / 'out').iterdir()} == files
  report = json.loads((tmp_path / 'out' / 'samples.json').read_text())
  assert [s['prompt'] for s in report['samples']] == [PROMPTS[0], 'snow'] and len(report['samples'][0]['scores']) == 2
  for arguments, message in (
    (['--run', tmp_path / 'nowhere'], 'has no checkpoints'),
    ([], 'give --run RUN_DIR'),
    (['--run', root / 'dalle', '--init_image', 'none.png', '--keep_rows', '2'], 'there is no image none.png'),
    (['--run', root / 'dalle', '--prompt', 'a \udcff'], 'has a lone surrogate'),
    (['--run', root / 'dalle', '--nn=3'], "Unknown command line flag 'nn'"),
    (['--run', root / 'dalle', '--mesh', 'data=3,model=2'], 'has no axis model'),
  ):
    assert run(*arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1, err
