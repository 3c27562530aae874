"""Training the parts of unCLIP: what is learnt, what is left out, which numbers are counted, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from dalle_jax.models import clip
from dalle_jax.objectives import prior, unclip, upsampler
from dalle_jax.training import sharding
from dalle_jax.training.state import Context
from tests import runs
from tests.objectives import steps

CLIP = {'objective': 'clip', 'model': {'variant': 'test'}, 'data': {'image_size': 16}}
CLIP['tokenizer'] = dict(vocab_size=32, length=8)
BATCH = {
  'image': np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8),
  'clip_text': np.random.default_rng(1).integers(0, 32, (16, 8)).astype(np.int32),
}
ROOMS = {'prior': prior, 'unclip': unclip, 'upsampler': upsampler}


def config(name, **loss):
  c = common.base()
  c.objective, c.model, c.loss = name, ConfigDict(dict(variant='test')), ConfigDict(loss)
  c.data.image_size = 32
  c.optim.update(lr=3e-3, schedule='constant')
  return c


def build(name, **loss):
  return ROOMS[name].from_config(config(name, **loss), {} if name == 'upsampler' else {'clip': CLIP})


def frozen():
  model = clip.of_run(CLIP)
  return {'clip': runs.parameters(model.init, jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 8), jnp.int32))['params']}


@pytest.mark.parametrize('name', ROOMS)
def test_it_learns(name):
  _, metrics, _ = steps.take(build(name), config(name), BATCH, count=30, frozen=frozen())
  losses = [m['loss'] for m in metrics]
  if name == 'prior':  # before the first step entries are not yet of size 1
    losses = losses[1:]
  assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:3])
  if name != 'prior':
    assert float(metrics[0].get('noise_loss', metrics[0]['loss'])) == pytest.approx(1.0, abs=0.1)  # it says nothing yet


@pytest.mark.parametrize('name', ROOMS)
def test_pictures_for_the_log(name):
  objective = build(name, **({} if name == 'prior' else {'sampling_steps': 3}))
  assert hasattr(objective, 'sample') == (name != 'prior')
  if name == 'prior':
    return
  params = sharding.unbox(jax.jit(objective.init)(jax.random.key(0), BATCH)[0])
  ctx = Context(frozen(), {}, jax.random.key(1), jnp.int32(0), train=False)
  shown = jax.jit(objective.sample)(params, ctx, {k: v[:2] for k, v in BATCH.items()})
  size, parts = (16, 2) if name == 'unclip' else (32, 3)
  assert shown.shape == (2, size, parts * size, 3) and shown.dtype == jnp.uint8
  if name == 'upsampler':
    np.testing.assert_array_equal(shown[:, :, :32], BATCH['image'][:2])


def test_the_prior_counts_means_and_deviations_of_embeddings():
  objective, nets = build('prior'), frozen()
  states, _, _ = steps.take(objective, config('prior'), BATCH, count=3, frozen=nets, accum=2)
  embed = np.asarray(objective.reader.look(nets['clip'], jnp.asarray(BATCH['image']) / 127.5 - 1))
  found = states[-1].params['prior']
  np.testing.assert_allclose(found['mean'], embed.mean(0), atol=1e-3)
  np.testing.assert_allclose(found['std'], embed.std(0), rtol=1e-2, atol=1e-3)
  assert states[-1].mutable['batches'] == 6


def loss_of(name, ctx_rng=0, batch=BATCH, **loss):
  """The loss in training with parameters that say something."""
  objective, nets = build(name, **loss), frozen()
  params = runs.larger(sharding.unbox(objective.init(jax.random.key(0), batch)[0]))
  mutable = sharding.unbox(objective.init(jax.random.key(0), batch)[1])
  ctx = Context(nets, mutable, jax.random.key(ctx_rng), jnp.int32(0), train=True)
  return float(jax.jit(lambda p, b: objective.loss(p, ctx, b)[0])(params, batch))


@pytest.mark.parametrize('name', ['prior', 'unclip'])
def test_a_caption_that_is_dropped_does_not_count(name):
  other = BATCH | {'clip_text': (BATCH['clip_text'] + 7) % 32}
  assert loss_of(name, caption_dropout=1.0) == pytest.approx(loss_of(name, batch=other, caption_dropout=1.0), rel=1e-5)
  assert abs(loss_of(name, caption_dropout=0.0) - loss_of(name, batch=other, caption_dropout=0.0)) > 1e-4


def test_cut_outs_of_large_and_small_pictures_are_of_the_same_place():
  objective = build('upsampler', crop=8, blur=0.0)
  large = jnp.arange(32 * 32, dtype=jnp.float32).reshape(1, 32, 32, 1).repeat(3, -1)
  low = large[:, ::2, ::2]
  for i in range(5):
    a, b = objective._cut(jax.random.key(i), large, low)
    assert a.shape == (1, 8, 8, 3) and b.shape == (1, 4, 4, 3)
    np.testing.assert_array_equal(a[:, ::2, ::2], b)


def test_errors():
  with pytest.raises(ValueError, match=r'objective prior needs a CLIP; set config.frozen.clip'):
    prior.from_config(config('prior'), {})
  with pytest.raises(ValueError, match=r"config.frozen.clip is a run of 'vqgan'; expected one of the objective clip"):
    unclip.from_config(config('unclip'), {'clip': {**CLIP, 'objective': 'vqgan'}})
  with pytest.raises(ValueError, match=r'config.loss has no field blurr; there are blur, noise, crop'):
    build('upsampler', blurr=1.0)
  with pytest.raises(ValueError, match=r'config.loss.crop is 7; expected a multiple of 2, at most 32'):
    build('upsampler', crop=7)
  for name, pixels in (('unclip', 16), ('upsampler', 32)):
    c = config(name)
    c.data.image_size = 8
    with pytest.raises(ValueError, match=f'draws {pixels} pixels a side, the data has 8'):
      ROOMS[name].from_config(c, {'clip': CLIP})
  c = config('upsampler')
  c.model.low_size = 12
  with pytest.raises(ValueError, match='makes 32 of 12 pixels; expected a multiple'):
    upsampler.from_config(c, {})
