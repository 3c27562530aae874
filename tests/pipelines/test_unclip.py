"""unCLIP as its user meets it, with runs of random parameters: captions, variations, scripts, what is refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import evaluate
import sample
import train
from configs import common
from dalle_jax.convert import __main__ as convert
from dalle_jax.data import bpe
from dalle_jax.data.sources import shapes
from dalle_jax.models import clip, prior, unclip, upsampler
from dalle_jax.models.clip_reader import Caption
from dalle_jax.pipelines import generator
from dalle_jax.pipelines.unclip import UnCLIP
from dalle_jax.training import checkpoint, sharding
from tests import runs

SOURCE = shapes.load('test', image_size=24)
WORDS = bpe.train((SOURCE[k]['caption'] for k in range(30)), 280)
PROMPTS = ['a small red circle', 'two blue hearts', '']
# The same steps and shapes wherever they do not matter, as each combination is compiled.
QUICK = dict(steps=4, prior_steps=3, upsampler_steps=2)
USUAL = dict(n=3, guidance=2.0, **QUICK)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  root, step = tmp_path_factory.mktemp('runs'), np.zeros(1, np.int32)
  picture = lambda size: np.zeros((1, size, size, 3), np.float32)
  data = {'image_size': 16, 'source': 'shapes', 'path': '', 'source_args': {'image_size': 24, 'count': 20}}
  c = {'objective': 'clip', 'model': {'variant': 'test'}, 'data': data}
  c['tokenizer'] = {'vocab_size': WORDS.vocab_size, 'length': 8}
  runs.write(root / 'clip', 'clip', clip.of_run(c), c, picture(16), np.zeros((1, 8), np.int32), words=WORDS)
  own = {'model': {'variant': 'test'}, 'data': data, 'tokenizer': {'vocab_size': 0}}
  model, _ = prior.of_run(own, c)
  embed = np.zeros((1, 16), np.float32)
  caption = Caption.blank(dict(embed_dim=16, text_width=16, text_length=8))
  runs.write(root / 'prior', 'prior', model, own, embed, step, caption, frozen=['clip'])
  for name, sizes in (('upsampler', {}), ('upsampler_2', dict(image_size=64, low_size=32))):
    fields = {**own, 'model': {'variant': 'test', 'channels': (8,), **sizes}}
    module = upsampler.of_run(fields)
    runs.write(root / name, 'upsampler', module, fields, picture(module.image_size), step, picture(module.low_size))
  own['model'] = runs.UNET
  model, _ = unclip.of_run(own, c)
  inputs = (picture(16), step, embed, caption, np.ones(1, bool))
  whole = ('clip', 'prior', 'upsampler')
  runs.write(root / 'unclip', 'unclip', model, own, *inputs, frozen=whole)
  runs.write(root / 'bare', 'unclip', model, own, *inputs, frozen=['clip'])
  return root


@pytest.fixture(scope='module')
def model(root):
  return UnCLIP.load(root / 'unclip', clip=root / 'clip')


def equal(a, b):
  for x, y in zip(a, b, strict=True):
    assert (x.candidates == y.candidates).all()
    near(x.images, y.images)


def near(a, b):
  """But for a few pixels: with random parameters diffusion makes much of rounding."""
  assert a.shape == b.shape and (np.abs(a.astype(int) - b.astype(int)) > 1).mean() < 0.005


def test_pictures_depend_on_prompt_seed_and_number_alone(model):
  options = dict(USUAL, seed=5)
  samples = model.sample(PROMPTS, **options)
  for s in samples:
    assert s.images.shape == (3, 32, 32, 3) and s.images.dtype == np.uint8 and s.tokens is None
    assert sorted(s.candidates) == [0, 1, 2] and (np.diff(s.scores) <= 0).all()
    assert (s.images[0] != s.images[1]).any()
  equal(model.sample(PROMPTS[1:], batch_size=2, **options), samples[1:])
  later = model.sample(PROMPTS, first=2, **options)[0]
  of_number_2 = [s.images[s.candidates.tolist().index(2)] for s in (later, samples[0])]
  near(*of_number_2)
  assert (model.sample(PROMPTS, **options | {'seed': 6})[0].images != samples[0].images).any()


def test_a_mesh_draws_the_same_pictures(root, model):
  options = dict(USUAL, seed=1)
  expected = model.sample(PROMPTS, **options)
  with sharding.use(dict(data=2, fsdp=2, tensor=2), common.RULES) as mesh:
    split = UnCLIP.load(root / 'unclip', clip=root / 'clip', mesh=mesh, rules=common.RULES)
    equal(split.sample(PROMPTS, **options), expected)


def test_each_argument_of_drawing_changes_the_pictures(model):
  draw = lambda **more: np.stack([sample.images for sample in model.sample(PROMPTS, **{**USUAL, **more})])
  programs = (model._sample_embeds, model._decode)
  base, compiled = draw(), [program._cache_size() for program in programs]
  for more in (dict(guidance=3.0, prior_guidance=2.0), dict(prior_guidance=3.0)):
    assert (draw(**more) != base).any(), more
  assert [program._cache_size() for program in programs] == compiled  # other numbers need no other program
  assert (draw(guidance=1.0, prior_guidance=2.0) != base).any()
  assert model._decode._cache_size() == compiled[1] + 1  # without guidance half as many rows are decoded
  for more in (dict(steps=5), dict(prior_steps=4), dict(upsampler_steps=3)):
    assert (draw(**more) != base).any(), more
  assert (draw(priors=1) != base).any()  # the nearest of several is not always the first
  compiled, noisy = model._decode._cache_size(), draw(eta=1)
  assert (draw(eta=0.0) != noisy).any() and (draw(eta=0.5) != noisy).any()
  assert model._decode._cache_size() == compiled + 1


def test_other_parameters_of_the_same_networks_are_drawn_by_the_same_programs(root, model, tmp_path):
  run = checkpoint.load_run(root / 'unclip')
  run = dataclasses.replace(run, params=jax.tree.map(lambda x: 0.9 * x, run.params))
  run.config['model'] = {**run.config['model'], 'dtype': 'float32'}  # as by default
  checkpoint.export_run(tmp_path / 'other', run)
  other, expected = UnCLIP.load(tmp_path / 'other'), model.sample(PROMPTS, **USUAL)
  programs = model._sample_embeds, model._decode, model._upsample['upsampler'], model._encode
  assert programs == (other._sample_embeds, other._decode, other._upsample['upsampler'], other._encode)
  compiled = [program._cache_size() for program in programs]
  found = other.sample(PROMPTS, **USUAL)
  assert [program._cache_size() for program in programs] == compiled
  assert (found[0].images[0] != expected[0].images[0]).any()


def test_variations_are_of_the_picture(model):
  pictures = [SOURCE[k]['image'] for k in range(2)]
  how = dict(guidance=2.0, steps=4, upsampler_steps=2)
  both = model.variations(pictures, n=2, seed=3, **how)
  assert [s.images.shape for s in both] == [(2, 32, 32, 3)] * 2 and (both[0].images != both[1].images).any()
  equal(model.variations(pictures[1:], n=2, seed=3, batch_size=1, **how), both[1:])


def test_upsamplers_take_up_where_the_one_before_ends(root):
  chain = UnCLIP.load(root / 'bare', prior=root / 'prior', upsampler=[root / 'upsampler', root / 'upsampler_2'])
  (found,) = chain.sample(PROMPTS[:1], **QUICK)
  assert found.images.shape == (1, 64, 64, 3) and chain.image_size == 64
  alone = UnCLIP.load(root / 'bare', prior=root / 'prior')
  small = UnCLIP.load(root / 'unclip').sample(PROMPTS[:1], **QUICK)[0].images
  assert alone.sample(PROMPTS[:1], **QUICK)[0].images.shape == (1, 16, 16, 3) and small.shape == (1, 32, 32, 3)
  with pytest.raises(ValueError, match='the upsampler takes images of 32 pixels a side, but gets images of 16'):
    UnCLIP.load(root / 'bare', upsampler=[root / 'upsampler_2'])
  assert UnCLIP.load(root / 'unclip', upsampler=[]).image_size == 16


def test_a_prior_of_another_clip_is_refused(root, tmp_path):
  shutil.copytree(root / 'clip', tmp_path / 'clip')
  own = checkpoint.load_run(root / 'prior')
  checkpoint.export_run(tmp_path / 'prior', dataclasses.replace(own, frozen={'clip': str(tmp_path / 'clip')}))
  meta = next((tmp_path / 'prior' / 'frozen' / 'clip' / 'checkpoints').glob('*/meta/metadata'))
  meta.write_text(meta.read_text().replace(str(root), 'elsewhere'))
  with pytest.raises(ValueError, match='was trained with another CLIP than'):
    UnCLIP.load(root / 'bare', prior=tmp_path / 'prior')


def test_the_recipe_trains_a_decoder_that_draws_with_its_parts(root, tmp_path):
  flags = [
    'model.variant=test',
    'model.channels=(8,)',
    'model.attention=(0,)',
    'data.image_size=24',
    'data.source_args.image_size=24',
    'data.source_args.count=20',
  ]
  flags += ['data.batch_size=8', 'train.steps=2', 'train.eval_every=2', 'train.checkpoint_every=1', 'train.log_every=1']
  flags += ['train.pictures=2', 'train.eval_batches=1', 'loss.sampling_steps=2', f'root={tmp_path}']
  flags += [f'frozen.{name}={root / name}' for name in ('clip', 'prior', 'upsampler')]
  recipe = f'--config={runs.ROOT}/configs/unclip_shapes.py:unclip'
  with runs.one_device():
    assert train.main(['train.py', recipe, *(f'--config.{flag}' for flag in flags)]) == 0
  found = json.loads((tmp_path / 'unclip' / 'metrics.jsonl').read_text().splitlines()[-1])
  assert found['step'] == 2 and np.isfinite([found['val_loss'], found['val_bound']]).all()
  shown = Image.open(tmp_path / 'unclip' / 'pictures' / 'samples_0000002.png').size
  assert shown == (2 * (2 * 16 + 2) + 2, 16 + 2 + 2)  # two pairs
  assert UnCLIP.load(tmp_path / 'unclip').sample(PROMPTS[:1], **QUICK)[0].images.shape == (1, 32, 32, 3)


def test_training_keeps_no_network_that_it_does_not_read(root, tmp_path):
  c = common.base()
  for kept, given in (('prior', 'prior'), ('upsampler', 'upsampler')):  # the second takes its place
    c.frozen = dict(clip=str(root / 'clip'), prior=str(root / given))
    with sharding.use(c.mesh, c.rules) as mesh:
      found = train.frozen_runs(c, tmp_path / 'run', mesh, started=True, reads=('clip',))
    assert set(found) == {'clip'}
    assert checkpoint.load_run(tmp_path / 'run' / 'frozen' / 'prior').config['objective'] == kept


def test_what_is_refused(root, model, tmp_path):
  for options, message in (
    (dict(prompts='a circle'), 'prompts must be a list of strings'),
    (dict(top_k=3), 'unCLIP has no tokens, so no top_k'),
    (dict(steps=1), 'steps is 1; expected 2 to 1000'),
    (dict(prior_steps=1001), 'prior_steps is 1001; expected 2 to 1000'),
    (dict(priors=0), 'priors is 0; expected one embedding per image or more'),
    (dict(eta=1.5), 'eta is 1.5; expected 0 to 1, or None for ancestral sampling'),
    (dict(n=0), 'n is 0'),
    (dict(guidance=float('nan')), 'guidance is nan; expected a finite number'),
    (dict(prior_guidance=float('inf')), 'prior_guidance is inf; expected a finite number'),
    (dict(steps=2.5), 'steps is 2.5; expected a whole number'),
  ):
    with pytest.raises(ValueError, match=message):
      model.sample(**{'prompts': PROMPTS, **options})
  bare = UnCLIP.load(root / 'bare')
  with pytest.raises(ValueError, match='has no prior, so it cannot read captions'):
    bare.sample(PROMPTS)
  for images in ('photo.png', [], np.zeros((16, 16, 3), np.uint8), Image.new('RGB', (16, 16))):
    with pytest.raises(ValueError, match='images must be a list of one or more images'):
      bare.variations(images)
  with pytest.raises(ValueError, match='not token by token, so int8 gains nothing'):
    UnCLIP.load(root / 'unclip', int8=True)
  with pytest.raises(ValueError, match="is a run of 'clip'; expected one of the objective prior"):
    UnCLIP.load(root / 'bare', prior=root / 'clip')


def test_scripts(root, tmp_path, capsys):
  flags = [f'--{name}={count}' for name, count in QUICK.items()]
  draw = lambda *more: runs.call(sample, '--out', tmp_path / 'out', '--n', 2, *more)
  assert draw(*flags, '--run', root / 'unclip', '--clip', root / 'clip', '--prompt', 'a red circle') == 0
  files = {'000_0.png', '000_1.png', 'grid.png', 'samples.json'}
  assert {p.name for p in (tmp_path / 'out').iterdir()} == files
  assert json.loads((tmp_path / 'out' / 'samples.json').read_text())['prior_steps'] == 3
  picture = shutil.copy(tmp_path / 'out' / '000_0.png', tmp_path)
  assert draw('--run', root / 'bare', '--vary', picture, *(flags[0], flags[2]), '--upsampler', root / 'upsampler') == 0
  assert Image.open(tmp_path / 'out' / '000_1.png').size == (32, 32)
  capsys.readouterr()
  for arguments, message in (
    (['--run', root / 'clip', '--prompt', 'x', '--steps', '3'], '--steps is for an unCLIP'),
    (['--run', root / 'unclip', '--vary', picture, '--prompt', 'x'], '--vary needs an image only; leave out --prompt.'),
    (['--run', root / 'unclip', '--vary', picture, '--priors', '3'], '--priors is not for --vary'),
    (
      ['--run', root / 'unclip', '--prompt', 'x', '--upsampler', 'none', '--upsampler', root / 'upsampler'],
      '--upsampler none leaves out all upsamplers',
    ),
    (['--run', root / 'unclip', '--vary', 'none.png'], 'there is no image'),
    (['--run', root / 'unclip', '--prompt', 'x', '--keep_rows', '2'], 'has no image tokens to keep'),
  ):
    assert draw(*arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1, err
  score = ['--run', root / 'unclip', '--clip', root / 'clip', '--count', 3, '--split', 'test']
  assert runs.call(evaluate, *score, *flags, '--out', tmp_path / 'scores') == 0
  metrics = json.loads((tmp_path / 'scores' / 'metrics.json').read_text())
  assert metrics['pictures'] == 3 and 0 <= metrics['all'] <= 1 and metrics['settings']['steps'] == 4


def test_an_imported_karlo_draws_and_varies(tmp_path, capsys):
  folder = runs.ROOT / 'tests' / 'convert' / 'fixtures' / 'unclip_diffusers'
  out = tmp_path / 'karlo'
  read = lambda out, *more: runs.call(convert, '--from', 'karlo', '--path', folder / 'karlo', '--out', out, *more)
  assert read(out, '--image_encoder', folder / 'karlo-image-variations') == 0
  model = generator.load(out)
  (found,) = model.sample(['a quiet river'], n=2, guidance=4.0, **QUICK)
  assert found.images.shape == (2, 32, 32, 3)
  (varied,) = model.variations([found.images[0]], n=2, guidance=4.0, steps=4, upsampler_steps=2)
  assert varied.images.shape == (2, 32, 32, 3)
  assert read(tmp_path / 'words') == 0
  assert 'makes no variations of images' in capsys.readouterr().out
  for what in (
    lambda: generator.load(tmp_path / 'words').variations([found.images[0]]),
    lambda: UnCLIP.load(out, clip=tmp_path / 'words' / 'frozen' / 'clip'),
  ):
    with pytest.raises(ValueError, match='this CLIP was imported without its image tower'):
      what()
