"""Training the parts of unCLIP: learning, dropout of conditioning, statistics of embeddings, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from dalle_jax.models import clip
from dalle_jax.objectives import prior, unclip, upsampler
from dalle_jax.training.state import Context
from tests import runs
from tests.objectives import steps

CLIP = {'objective': 'clip', 'model': {'variant': 'test'}, 'data': {'image_size': 16}}
CLIP['tokenizer'] = dict(vocab_size=32, length=8)
BATCH = {
  'image': np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8),
  'clip_text': np.random.default_rng(1).integers(0, 32, (16, 8)).astype(np.int32),
}
MODELS = {'prior': dict(variant='test'), 'unclip': runs.UNET, 'upsampler': dict(variant='test', channels=(8,))}
OBJECTIVES = {'prior': prior, 'unclip': unclip, 'upsampler': upsampler}


def config(name, **loss):
  c = common.base()
  c.objective, c.model, c.loss = name, ConfigDict(MODELS[name]), ConfigDict(loss)
  c.data.image_size = 32
  c.optim.update(lr=3e-3, schedule='constant')
  return c


def build(name, **loss):
  return OBJECTIVES[name].from_config(config(name, **loss), {} if name == 'upsampler' else {'clip': CLIP})


def frozen():
  model = clip.of_run(CLIP)
  return {'clip': runs.parameters(model.init, jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 8), jnp.int32))['params']}


@pytest.mark.parametrize('name', OBJECTIVES)
def test_it_learns(name):
  count = 30 if name == 'prior' else 16
  _, metrics, _ = steps.take(build(name), config(name), BATCH, count=count, frozen=frozen())
  if name == 'prior':  # whose targets change while their statistics are estimated
    cosines = [m['cosine'] for m in metrics]
    assert np.mean(cosines[-5:]) > np.mean(cosines[:3]) + 0.1
  else:
    losses = [m['loss'] for m in metrics]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:3])
    assert float(metrics[0].get('error', metrics[0]['loss'])) == pytest.approx(1.0, abs=0.1)  # it predicts 0


@pytest.mark.parametrize('name', OBJECTIVES)
def test_logged_samples(name):
  objective = build(name, **({} if name == 'prior' else {'sampling_steps': 3}))
  assert hasattr(objective, 'sample') == (name != 'prior')
  if name == 'prior':
    return
  params, _ = runs.parameters(objective.init, BATCH)
  ctx = Context(frozen(), {}, jax.random.key(1), jnp.int32(0), train=False)
  shown = jax.jit(objective.sample)(params, ctx, {k: v[:2] for k, v in BATCH.items()})
  size, parts = (16, 2) if name == 'unclip' else (32, 3)
  assert shown.shape == (2, size, parts * size, 3) and shown.dtype == jnp.uint8
  if name == 'upsampler':
    np.testing.assert_array_equal(shown[:, :, :32], BATCH['image'][:2])


def test_the_prior_averages_means_and_deviations_of_embeddings():
  objective, nets = build('prior'), frozen()
  states, _, _ = steps.take(objective, config('prior'), BATCH, count=3, frozen=nets, accum=2)
  embed = np.asarray(objective.reader.encode_image(nets['clip'], jnp.asarray(BATCH['image']) / 127.5 - 1))
  found = states[-1].params['prior']
  mean = 6 * embed.mean(0) / 7  # six halves of the batch, and one of mean 0 and variance 1
  np.testing.assert_allclose(found['mean'], mean, atol=1e-4)
  square = (1 + 6 * np.square(embed).mean(0)) / 7
  np.testing.assert_allclose(found['std'], np.sqrt(square - mean**2), rtol=1e-4)
  assert states[-1].mutable['batches'] == 7


def test_a_prior_that_starts_from_another_one_keeps_its_statistics():
  c = config('prior')
  c.init.path = 'runs/karlo'
  objective = prior.from_config(c, {'clip': CLIP})
  states, _, _ = steps.take(objective, c, BATCH, count=2, frozen=frozen())
  assert states[-1].mutable == {} and (states[-1].params['prior']['std'] == 1).all()
  assert (states[-1].params['prior']['query'] != states[0].params['prior']['query']).any()


def test_an_upsampler_starts_from_one_with_a_network_for_the_last_step():
  assert build('upsampler').adopt({'upsampler': 1, 'last': 2}, {}, jax.random.key(0)) == {'upsampler': 1}


@pytest.mark.parametrize('name', ['prior', 'unclip'])
def test_a_caption_that_is_dropped_does_not_count(name):
  other = BATCH | {'clip_text': (BATCH['clip_text'] + 7) % 32}
  params, mutable = runs.parameters(build(name).init, BATCH)
  ctx = Context(frozen(), mutable, jax.random.key(0), jnp.int32(0), train=True)
  for dropout, counts in ((1.0, False), (0.0, True)):
    objective = build(name, caption_dropout=dropout)
    a, b = map(jax.jit(lambda batch, o=objective: o.loss(params, ctx, batch)[0]), (BATCH, other))
    assert (abs(a - b) > 1e-4 * abs(a)) == counts, dropout


def test_crops_of_large_and_small_images_are_at_the_same_place():
  objective = build('upsampler', crop=8, blur=0.0)
  large = jnp.arange(32 * 32, dtype=jnp.float32).reshape(1, 32, 32, 1).repeat(3, -1)
  low = large[:, ::2, ::2]
  for i in range(5):
    a, b = objective._crop(jax.random.key(i), large, low)
    assert a.shape == (1, 8, 8, 3) and b.shape == (1, 4, 4, 3)
    np.testing.assert_array_equal(a[:, ::2, ::2], b)


def test_errors():
  with pytest.raises(ValueError, match=r'objective prior needs a CLIP; set config.frozen.clip'):
    prior.from_config(config('prior'), {})
  with pytest.raises(ValueError, match=r"config.frozen.clip is a run of 'vqgan'; expected a run of the objective clip"):
    unclip.from_config(config('unclip'), {'clip': {**CLIP, 'objective': 'vqgan'}})
  with pytest.raises(ValueError, match=r'config.loss has no field blurr; its fields are blur, noise, crop'):
    build('upsampler', blurr=1.0)
  with pytest.raises(ValueError, match=r'config.loss.crop is 7; expected a multiple of 2, at most 32'):
    build('upsampler', crop=7)
  for name, pixels in (('unclip', 16), ('upsampler', 32)):
    c = config(name)
    c.data.image_size = 8
    with pytest.raises(ValueError, match=f'generates images of {pixels} pixels a side, but those of the data have 8'):
      OBJECTIVES[name].from_config(c, {'clip': CLIP})
  for name, loss, message in (
    ('unclip', dict(sampling_steps=1), 'config.loss.sampling_steps is 1; expected 2 to 1000'),
    ('unclip', dict(image_dropout=1.5), 'config.loss.image_dropout is 1.5; expected a fraction'),
    ('prior', dict(caption_dropout=-0.1), 'config.loss.caption_dropout is -0.1; expected a fraction'),
    ('upsampler', dict(blur=-1.0), 'config.loss.blur is -1.0; expected 0 or more'),
  ):
    with pytest.raises(ValueError, match=message):
      build(name, **loss)
  with pytest.raises(ValueError, match='this CLIP was imported without its image tower'):
    prior.from_config(config('prior'), {'clip': {**CLIP, 'data': {'image_size': 0}}})
  c = config('upsampler')
  c.model.low_size = 12
  with pytest.raises(ValueError, match=r'image_size 32 is not a multiple of model\.low_size 12'):
    upsampler.from_config(c, {})
