"""A tiny StoryGANc, trained for a few steps by the command of its recipe, then used as a StoryDALL-E is."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import evaluate
import sample
import train
from configs import common
from dalle_jax.data.sources import story_shapes
from dalle_jax.pipelines import generator
from dalle_jax.pipelines.storyganc import StoryGANc
from dalle_jax.training import checkpoint, sharding
from tests import runs

SOURCE = story_shapes.load('test_seen', image_size=24)
CAPTIONS = [SOURCE.captions(k)[1:] for k in range(3)]
FIRSTS = np.stack([SOURCE[k].frames[0] for k in range(3)])


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  path = tmp_path_factory.mktemp('runs')
  sizes = ['--config.model.variant=test', '--config.model.start=6', '--config.data.image_size=24']
  sizes += [
    '--config.data.source_args.image_size=24',
    '--config.data.source_args.count=100',
    '--config.data.batch_size=8',
    '--config.tokenizer.vocab_size=280',
  ]
  steps = ['--config.train.steps=3', '--config.train.eval_every=3', '--config.train.log_every=1']
  steps += ["--config.train.evals=('pictures',)", '--config.train.checkpoint_every=0', '--config.train.pictures=2']
  config = f'--config={runs.ROOT}/configs/storyganc_shapes.py:steps=3'
  argv = ['train.py', config, f'--config.root={path}', *sizes, *steps]
  with runs.one_device():
    assert train.main(argv) == 0
  # Three steps draw grey alone: one with random parameters beside, whose pictures differ.
  trained = checkpoint.load_run(path / 'storyganc')
  rng = np.random.default_rng(0)
  spread = lambda key, x: np.ones(x.shape, np.float32) if key[-1].key == 'var' else rng.normal(0, 0.2, x.shape)
  params = jax.tree_util.tree_map_with_path(lambda k, x: jnp.asarray(spread(k, x), x.dtype), trained.params)
  checkpoint.export_run(path / 'random', dataclasses.replace(trained, params=params))
  return path


@pytest.fixture(scope='module')
def model(root):
  return StoryGANc.load(root / 'random')


def test_the_log_has_losses_accuracies_norms_and_storyboards(root):
  lines = [json.loads(line) for line in (root / 'storyganc' / 'metrics.jsonl').read_text().splitlines()]
  found = {k for line in lines for k in line}
  assert {'kl', 'l2', 'image_accuracy_real', 'story_accuracy_wrong', 'image_generator_loss'} <= found
  assert {f'grad_norm/{p}' for p in ('generator', 'image_discriminator', 'story_discriminator')} <= found
  assert (Image.open(root / 'storyganc' / 'pictures' / 'samples_0000003.png').width - 2) % (5 * 24 + 2) == 0
  params = checkpoint.load_run(root / 'storyganc').params
  assert float(np.abs(params['generator']['first_norm']['mean']).max()) > 0  # running statistics are saved


def test_frames_depend_on_story_seed_and_number_alone(root, model):
  options = dict(n=2, seed=5, temperature=0.9)
  samples = model.continue_stories(FIRSTS, CAPTIONS, **options)
  assert samples[0].frames.shape == (4, 2, 24, 24, 3) and samples[0].scores is None
  differ = lambda a, b: np.abs(a.astype(int) - b.astype(int)).max() > 5
  assert differ(samples[0].frames[:, 0], samples[0].frames[:, 1]) and differ(samples[0].frames, samples[1].frames)
  assert differ(model.continue_story(FIRSTS[0], CAPTIONS[0], **{**options, 'seed': 6}).frames, samples[0].frames)
  again, compiled = StoryGANc.load(root / 'random'), model._draw._cache_size()
  wilder = again.continue_story(FIRSTS[0], CAPTIONS[0], **{**options, 'temperature': 2.0})
  assert differ(wilder.frames, samples[0].frames)
  assert again._draw is model._draw and model._draw._cache_size() == compiled
  other = model.continue_story(255 - FIRSTS[0], CAPTIONS[0], **options)
  assert (other.frames != samples[0].frames).any((2, 3, 4)).any()  # the source counts
  order = [2, 0, 1]
  permuted = model.continue_stories(FIRSTS[order], [CAPTIONS[k] for k in order], batch_size=8, **options)
  close = lambda a, b: np.testing.assert_allclose(a.frames.astype(int), b.frames.astype(int), atol=1)
  for k, s in zip(order, permuted, strict=True):
    close(s, samples[k])
  close(model.continue_story(FIRSTS[1], CAPTIONS[1], **options), samples[1])
  fewer = model.continue_story(FIRSTS[1], CAPTIONS[1], n=1, seed=5, temperature=0.9)
  np.testing.assert_allclose(fewer.frames[:, 0].astype(int), samples[1].frames[:, 0].astype(int), atol=1)
  assert model.continue_story(FIRSTS[1], CAPTIONS[1][:2], n=1).frames.shape == (2, 1, 24, 24, 3)
  with sharding.use(dict(data=2, fsdp=2, tensor=2), common.RULES) as mesh:
    split = StoryGANc.load(root / 'random', mesh=mesh, rules=common.RULES)
    for a, b in zip(split.continue_stories(FIRSTS, CAPTIONS, **options), samples, strict=True):
      close(a, b)
    many = split.continue_story(FIRSTS[1], CAPTIONS[1], **{**options, 'n': 8})
    assert split._draw._cache_size() == 1  # four rows of two candidates, as before
  close(many, model.continue_story(FIRSTS[1], CAPTIONS[1], **{**options, 'n': 8}, batch_size=8))


def test_what_it_does_not_have_is_refused(root, model):
  with pytest.raises(ValueError, match='StoryGANc has no tokens, so no top_k; leave it out'):
    model.continue_story(FIRSTS[0], CAPTIONS[0], top_k=5)
  with pytest.raises(ValueError, match='not token by token, so int8 gains nothing'):
    StoryGANc.load(root / 'random', int8=True)
  with pytest.raises(ValueError, match='temperature is inf; expected a finite number'):
    model.continue_story(FIRSTS[0], CAPTIONS[0], temperature=float('inf'))
  with pytest.raises(ValueError, match=r'a story has \[5\] captions; this model takes 1 to 4'):
    model.continue_story(FIRSTS[0], ['pip moves'] * 5)
  with pytest.raises(FileNotFoundError, match='has no checkpoints'):
    generator.load(root / 'nothing')


def test_scripts_take_it_as_they_take_a_storydalle(root, tmp_path, capsys):
  Image.fromarray(FIRSTS[0]).save(tmp_path / 'first.png')
  (tmp_path / 'story.json').write_text(json.dumps({'captions': CAPTIONS[0], 'source': 'first.png'}))

  def run(script, *flags):
    return runs.call(script, '--run', root / 'storyganc', '--out', tmp_path / 'out', *flags)

  assert run(sample, '--story', tmp_path / 'story.json', '--n', 1) == 0
  assert (tmp_path / 'out' / 'storyboard.png').is_file()
  assert run(evaluate, '--split', 'test_unseen', '--count', 2, '--out', tmp_path / 'scored') == 0
  metrics = json.loads((tmp_path / 'scored' / 'metrics.json').read_text())
  assert metrics['pictures'] == 8 and {'caption', 'hero', 'setting'} <= set(metrics)
  assert run(sample, '--prompt', 'a red circle') == 2
  assert 'which needs a story; give --story FILE' in capsys.readouterr().err
