"""The loss of stories by hand, what is frozen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from dalle_jax.functional import losses
from dalle_jax.models import clip
from dalle_jax.objectives import story_dalle
from dalle_jax.training import sharding
from dalle_jax.training.state import Context
from tests import runs
from tests.objectives import steps

VQGAN = {'model': runs.VQGAN | {'image_size': 16, 'patch': 2}}  # 8 x 8 codes of 16
CLIP = {
  'model': {'variant': 'test'},
  'tokenizer': {'vocab_size': 32, 'length': 8},
  'data': {'image_size': 16},
}
BATCH = {
  'text': jax.random.randint(jax.random.key(0), (8, 2, 6), 0, 34),
  'tokens': jax.random.randint(jax.random.key(1), (8, 3, 64), 0, 16),
}


def config(loss=(), **model):
  c = common.base()
  c.model, c.loss = ConfigDict(dict(variant='test', **model)), ConfigDict(dict(loss))
  c.data.image_size, c.tokenizer.vocab_size, c.tokenizer.length = 16, 34, 6
  return c


def build(loss=(), **model):
  return story_dalle.from_config(config(loss, **model), {'vqgan': VQGAN, 'clip': CLIP})


@functools.cache
def loss_of(**loss):
  return jax.jit(build(loss).loss)


@pytest.fixture(scope='module')
def params():
  return runs.parameters(build().init, BATCH, scale=0.1)[0]


def context(train=True, **frozen):
  return Context(frozen, {}, jax.random.key(4), jnp.int32(0), train=train)


def test_the_loss_is_that_of_the_frames_after_the_source_half_text_half_image(params):
  objective = build()
  loss, (metrics, _) = loss_of()(params, context(), BATCH)
  tokens = BATCH['tokens']
  text, image = jax.jit(objective.model.apply)({'params': params}, BATCH['text'], tokens[:, 1:], tokens[:, 0])
  text, _ = losses.token_loss(text, BATCH['text'].reshape(16, 6))
  image, accuracy = losses.token_loss(image, tokens[:, 1:].reshape(16, 64))
  assert float(loss) == pytest.approx(float(text / 2 + image / 2), rel=1e-5)
  assert float(metrics['accuracy']) == pytest.approx(float(accuracy), rel=1e-5)


def test_the_source_gets_no_noise_and_dropped_captions_no_text_loss(params):
  run = lambda batch=BATCH, **loss: loss_of(**loss)(params, context(), batch)[1][0]
  source = {**BATCH, 'tokens': BATCH['tokens'].at[:, 0].set(0)}
  assert run(token_noise=1.0)['image_loss'] != run(source, token_noise=1.0)['image_loss']
  assert run(token_noise=1.0)['text_loss'] == run()['text_loss']
  assert run(caption_dropout=1.0)['text_loss'] == 0.0
  same, spread = (run(token_noise=0.5, noise_spread=s)['image_loss'] for s in (0.0, 0.5))
  assert same != spread
  changed = {**BATCH, 'text': (BATCH['text'] + 1) % 34}  # the story token still knows
  assert run(caption_dropout=1.0)['image_loss'] != run(changed, caption_dropout=1.0)['image_loss']


def test_sentences_of_clip_and_of_the_data():
  ids = jax.random.randint(jax.random.key(5), (8, 2, 8), 0, 32)
  tower = clip.of_run(CLIP)
  frozen = runs.parameters(tower.init, jnp.zeros((1, 16, 16, 3)), ids[0])['params']
  by_clip = build(sentences='clip')
  assert by_clip.model.sentence_dim == tower.embed_dim
  params, _ = runs.parameters(by_clip.init, BATCH)
  read = jax.jit(lambda p: tower.apply({'params': p}, ids.reshape(16, 8), method='encode_text'))
  vectors = read(frozen).reshape(8, 2, -1)
  by_data = build(sentences='data', sentence_dim=16)
  a, _ = jax.jit(by_clip.loss)(params, context(clip=frozen), {**BATCH, 'clip_text': ids})
  b, _ = jax.jit(by_data.loss)(params, context(), {**BATCH, 'vectors': vectors})
  c, _ = jax.jit(by_data.loss)(params, context(), {**BATCH, 'vectors': vectors[::-1]})
  assert float(a) == pytest.approx(float(b), rel=1e-6) and abs(float(a) - float(c)) > 1e-6


def test_a_frozen_player_has_no_gradient_and_no_state():
  c = config(prompt=2)
  c.optim.groups = dict(dalle=dict(frozen=True))
  objective = build(prompt=2)
  states, metrics, target = steps.take(objective, c, BATCH, count=1, start=steps.start(objective, c, BATCH))
  before, after = (s.params for s in states)
  jax.tree.map(np.testing.assert_array_equal, before['dalle'], after['dalle'])
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), before['story'], after['story'])
  assert moved['prompt']['embedding'] and moved['cross']['out_kernel']
  assert not any('dalle' in k for k in sharding.flatten(target.opt_state)) and 'grad_norm/dalle' not in metrics[0]


def test_errors():
  with pytest.raises(ValueError, match=r'set config.frozen.vqgan to the run of a VQGAN'):
    story_dalle.from_config(config(), {})
  with pytest.raises(ValueError, match=r'needs a text tower; set config.frozen.clip'):
    story_dalle.from_config(config(sentences='clip'), {'vqgan': VQGAN})
  with pytest.raises(ValueError, match=r'needs config.model.sentence_dim'):
    build(sentences='data')
  with pytest.raises(ValueError, match=r'config.loss has no field dropout'):
    build(dict(dropout=0.1))
  with pytest.raises(ValueError, match=r'config.loss.first is -1.0; expected 0 or more'):
    build(dict(first=-1.0))
