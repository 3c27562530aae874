"""A DALL-E retro-fitted to stories at the smallest sizes, by full fine-tuning and by prompt tuning, and continued."""

import dataclasses
import functools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import sample
import train
from configs import common
from dalle_jax.data import bpe
from dalle_jax.data.bpe import BPE
from dalle_jax.data.sources import story_shapes
from dalle_jax.models import clip, dalle, vqgan
from dalle_jax.pipelines.story_dalle import StoryDallE
from dalle_jax.training import checkpoint, sharding
from tests import runs

SOURCE = story_shapes.load('test_seen', image_size=24)
CAPTIONS = [SOURCE.captions(k)[1:] for k in range(3)]
FIRSTS = np.stack([SOURCE[k].frames[0] for k in range(3)])


DATA = dict(image_size=24, source='shapes', path='', source_args={})


def config(root, stage):
  c = common.base()
  c.run_dir, c.data.source, c.data.image_size, c.data.batch_size = str(root / stage), 'story_shapes', 24, 8
  c.data.source_args = dict(image_size=24, count=16)
  c.tokenizer.update(vocab_size=300, length=6, new_tokens=('pip', 'Momo', 'a'))  # 'a' is a token already
  c.objective, c.model, c.frozen = 'story_dalle', dict(runs.DALLE), dict(vqgan=str(root / 'vqgan'))
  c.init.update(path=str(root / 'dalle'), new='story/.*')
  c.loss = dict(token_noise=0.5, noise_spread=0.5, caption_dropout=0.5)
  c.train.update(steps=2, log_every=1, evals=())
  if stage == 'story':
    c.encode.enabled = True
    c.train.update(checkpoint_every=1, eval_every=2, evals=('loss', 'pictures'), pictures=2, eval_batches=1)
  else:
    c.model.update(sentences='clip', prompt=2)
    c.frozen.clip, c.train.ema = str(root / 'clip'), 0.9
    c.optim.groups = dict(dalle=dict(frozen=True))
  return c


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """Runs of random parameters, and the two ways to adapt the DALL-E among them, trained for two steps."""
  path = tmp_path_factory.mktemp('runs')
  words = bpe.train((c for k in range(20) for c in SOURCE.captions(k)), 300)
  tokenizer = dict(vocab_size=words.vocab_size, length=6)
  text, picture = np.zeros((1, 6), np.int32), np.zeros((1, 24, 24, 3), np.float32)
  write = functools.partial(runs.write, words=words)
  c = {'data': DATA, 'tokenizer': tokenizer}
  write(path / 'vqgan', 'vqgan', vqgan.build(**runs.VQGAN), c | {'model': runs.VQGAN}, picture)
  c['model'] = {'variant': 'test'}
  write(path / 'clip', 'clip', clip.of_run(c), c, picture, text)
  model = dalle.build(**runs.DALLE, text_vocab=words.vocab_size + 6)
  write(path / 'dalle', 'dalle', model, c | {'model': runs.DALLE}, text, np.zeros((1, 16), np.int32), frozen=['vqgan'])
  with runs.one_device():
    for stage in ('story', 'prompt'):
      train.run(config(path, stage))
  return path


@pytest.fixture(scope='module')
def model(root):
  return StoryDallE.load(root / 'story', clip=root / 'clip')


def test_new_parameters_are_trained_saved_and_loaded(root):
  run = checkpoint.load_run(root / 'story')
  flat = sharding.flatten(run.params)
  assert {k.split('/')[0] for k in flat} == {'dalle', 'story'}
  zeros = ['cross/out_kernel', 'cross/out_bias', 'encoder/attention/out/bias']
  assert all(np.abs(flat[f'story/{k}']).max() > 0 for k in zeros)  # they were zero at the start
  last = json.loads((root / 'story' / 'metrics.jsonl').read_text().splitlines()[-1])
  assert {'grad_norm/dalle', 'grad_norm/story', 'val_image_loss', 'accuracy'} <= set(last)
  # Two stories of true frames above drawn ones.
  assert Image.open(root / 'story' / 'pictures' / 'samples_0000002.png').size == (2 * (5 * 24 + 2) + 2, 50 + 2)


def test_names_become_tokens_of_their_own(root):
  before, after = (checkpoint.load_run(root / k) for k in ('dalle', 'story'))
  words = BPE(after.tokenizer)
  assert words.vocab_size == BPE(before.tokenizer).vocab_size + 2 == after.config['tokenizer']['vocab_size']
  assert words.decode(words.encode('Pip meets momo')) == 'pip meets momo'
  rows = [r.params['dalle']['text_embed'].shape[0] for r in (before, after)]
  assert rows[1] == rows[0] + 2 and rows[1] == words.vocab_size + 6


def test_prompt_tuning_leaves_the_dalle_as_it_was_and_keeps_no_state_for_it(root):
  before, after = checkpoint.load_run(root / 'dalle'), checkpoint.load_run(root / 'prompt', ema=False)
  model = StoryDallE.load(root / 'prompt').model.dalle
  grown = dalle.adopt(model, before.params, before.config, jax.random.key(0))['dalle']
  jax.tree.map(np.testing.assert_array_equal, grown, after.params['dalle'])
  step = root / 'prompt' / 'checkpoints' / '2'
  state = [k for k in checkpoint._saved(step) if k.startswith('opt_state')]
  assert any('story' in k for k in state) and not any('dalle' in k for k in state)
  assert np.abs(after.params['story']['cross']['out_kernel']).max() > 0


def test_frames_depend_on_story_seed_and_number_alone(root, model):
  options = dict(n=2, seed=5, guidance=2.0, temperature=0.9, top_k=12)
  samples = model.continue_stories(FIRSTS, CAPTIONS, **options)
  for k, s in enumerate(samples):
    assert s.frames.shape == (4, 2, 24, 24, 3) and (np.diff(s.scores, axis=1) <= 0).all()
    assert s.captions == tuple(CAPTIONS[k]) and (np.sort(s.candidates, 1) == [0, 1]).all()
  order = [2, 0, 1]  # a permuted batch is permuted, in parts as in one
  permuted = model.continue_stories(FIRSTS[order], [CAPTIONS[k] for k in order], batch_size=8, **options)
  for k, s in zip(order, permuted, strict=True):
    np.testing.assert_allclose(s.frames.astype(int), samples[k].frames.astype(int), atol=1)
  alone = model.continue_story(Image.fromarray(FIRSTS[1]), CAPTIONS[1], **options)
  np.testing.assert_allclose(alone.frames.astype(int), samples[1].frames.astype(int), atol=1)
  other = model.continue_story(FIRSTS[1], CAPTIONS[1], **{**options, 'seed': 6})
  assert (other.frames != alone.frames).any()
  again, compiled = StoryDallE.load(root / 'story', clip=root / 'clip'), model._draw._cache_size()
  warmer = again.continue_story(FIRSTS[1], CAPTIONS[1], **{**options, 'temperature': 2.0, 'guidance': 3.0})
  assert (warmer.frames != alone.frames).any()
  assert again._draw is model._draw and model._draw._cache_size() == compiled
  programs = lambda m: (m.vqgan._encode, m.vqgan._decode, m.reranker._encode_text, m.reranker._encode_images)
  assert programs(again) == programs(model)
  with sharding.use(dict(data=2, fsdp=2, tensor=2), common.RULES) as mesh:
    split = StoryDallE.load(root / 'story', clip=root / 'clip', mesh=mesh, rules=common.RULES)
    for a, b in zip(split.continue_stories(FIRSTS, CAPTIONS, **options), samples, strict=True):
      np.testing.assert_allclose(a.frames.astype(int), b.frames.astype(int), atol=1)
    split.reranker = again.reranker = None
    many = split.continue_story(FIRSTS[1], CAPTIONS[1], **{**options, 'n': 8})
    assert split._draw._cache_size() == 1  # four rows of two candidates, as before
  parts = again.continue_story(FIRSTS[1], CAPTIONS[1], **{**options, 'n': 8}, batch_size=8)
  np.testing.assert_allclose(many.frames.astype(int), parts.frames.astype(int), atol=1)


def test_sentences_by_clip_and_a_prompt(root):
  model = StoryDallE.load(root / 'prompt')
  short = model.continue_story(FIRSTS[0], CAPTIONS[0][:2], n=1)
  assert short.frames.shape == (2, 1, 24, 24, 3) and short.scores is None


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    (dict(source=None), 'there is no source frame'),
    (dict(source='nowhere.png'), 'there is no image nowhere.png'),
    (dict(source=b'no picture'), 'the source frame is not an image that can be read'),
    (dict(captions='pip moves'), 'captions must be a list of strings, one per frame'),
    (dict(captions=None), 'captions must be a list of strings, one per frame'),
    (dict(captions=[None]), 'captions must be a list of strings, one per frame'),
    (dict(captions=['pip \ud800']), 'has a lone surrogate'),
    (dict(captions=[]), r'a story has \[0\] captions; this model takes 1 to 4'),
    (dict(captions=['pip moves'] * 5), r'a story has \[5\] captions; this model takes 1 to 4'),
    (dict(captions=['pip moves', ' ']), 'a caption is empty'),
    (dict(vectors=np.zeros((4, 8), np.float32)), 'this model reads no sentence vectors; leave vectors out'),
    (dict(n=0), 'n is 0 and batch_size 64'),
  ],
)
def test_bad_requests_are_one_line(model, kwargs, message):
  with pytest.raises((ValueError, FileNotFoundError), match=message) as e:
    model.continue_story(**{'source': FIRSTS[0], 'captions': CAPTIONS[0], **kwargs})
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('captions', [None, [None], [[3]], ['pip moves'], iter(CAPTIONS)])
def test_captions_that_are_not_lists_of_lists_are_refused(model, captions):
  with pytest.raises(ValueError, match='captions must be a list of lists of strings'):
    model.continue_stories(FIRSTS[:1], captions)


def test_a_storydalle_without_additions(root):
  additions = dict(story_encoder='', prompt=0, retro=0)
  before = checkpoint.load_run(root / 'dalle')
  config = {**before.config, 'objective': 'story_dalle', 'model': runs.DALLE | additions}
  checkpoint.export_run(root / 'plain', dataclasses.replace(before, config=config))
  plain = StoryDallE.load(root / 'plain')
  assert plain.continue_story(FIRSTS[0], CAPTIONS[0][:1], n=1).frames.shape == (1, 1, 24, 24, 3)


def test_a_run_of_another_kind_is_refused(root):
  with pytest.raises(ValueError, match="is a run of 'dalle'; sampling needs one of the objective story_dalle"):
    StoryDallE.load(root / 'dalle')


def test_sample_script(root, tmp_path, capsys):
  Image.fromarray(FIRSTS[0]).save(tmp_path / 'first.png')
  (tmp_path / 'story.json').write_text(json.dumps({'captions': CAPTIONS[0], 'source': 'first.png'}))
  (tmp_path / 'list.json').write_text(json.dumps(CAPTIONS[0]))
  (tmp_path / 'long.json').write_text(json.dumps(['pip moves'] * 5))
  (tmp_path / 'bad.json').write_text('{"captions": "pip"}')
  (tmp_path / 'lone.json').write_text('["pip \\ud800"]')
  options = ['--run', root / 'story', '--out', tmp_path / 'out', '--n', '2']
  command = [sys.executable, 'sample.py', *options, '--story', tmp_path / 'story.json']
  done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  files = {f'00{i}_{k}.png' for i in range(1, 5) for k in range(2)} | {'grid.png', 'samples.json', 'storyboard.png'}
  assert {p.name for p in (tmp_path / 'out').iterdir()} == files
  for arguments, message in (
    (['--story', tmp_path / 'list.json'], 'give it with --source FRAME.png'),
    (['--story', tmp_path / 'long.json', '--source', tmp_path / 'first.png'], 'this model takes 1 to 4'),
    (['--story', tmp_path / 'bad.json'], 'has no list of captions'),
    (['--story', tmp_path / 'lone.json', '--source', tmp_path / 'first.png'], 'has a lone surrogate'),
    (['--source', tmp_path / 'first.png'], 'give its captions with --story'),
    (['--story', tmp_path / 'none.json'], 'there is no file'),
  ):
    assert runs.call(sample, *options, *arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1, err
