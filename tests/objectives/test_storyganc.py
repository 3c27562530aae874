"""Who learns from what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from dalle_jax.objectives import storyganc
from dalle_jax.training import sharding
from dalle_jax.training.state import Context
from tests import runs
from tests.objectives import steps

RNG = np.random.default_rng(0)
BATCH = {
  'text': RNG.integers(0, 30, (8, 3, 6)).astype(np.int32),
  'image': RNG.integers(0, 256, (8, 4, 16, 16, 3)).astype(np.uint8),
  'labels': RNG.random((8, 4, 5)) > 0.5,
}
PLAYERS = ('generator', 'image_discriminator', 'story_discriminator')


def config(loss=(), **model):
  c = common.base()
  c.model = ConfigDict(dict(variant='test', frames=3, **model))
  c.loss, c.data.image_size = ConfigDict(dict(loss)), 16
  c.tokenizer.update(vocab_size=30, length=6)
  c.optim.update(common.gan_optimizer(1e-3), schedule='constant')
  c.optim.groups = common.gan_groups(2e-3)
  return c


def build(loss=(), **model):
  return storyganc.from_config(config(loss, **model), {})


@functools.cache
def start(labels=0):
  init = build(labels=labels).init
  mutable = runs.parameters(lambda *x: init(*x)[1], BATCH)
  return runs.parameters(lambda *x: init(*x)[0], BATCH, scale=0.02), mutable


OWNERS = {
  **dict.fromkeys(('kl', 'l2', 'image_generator_loss', 'story_generator_loss', 'generator_label_loss'), 'generator'),
  **dict.fromkeys(('image_discriminator_loss', 'label_loss'), 'image_discriminator'),
  'story_discriminator_loss': 'story_discriminator',
}


@pytest.fixture(scope='module')
def gradients():
  """name of a parameter -> float32[1 + 8], the size of the gradients of the loss and of each of its terms."""
  objective, (params, mutable) = build(dict(l2_weight=1.0), labels=5), start(5)
  context = Context({}, mutable, jax.random.key(1), jnp.int32(0), train=True)

  def terms(params):
    loss, (metrics, _) = objective.loss(params, context, BATCH)
    return jnp.stack([loss, *(metrics[name] for name in OWNERS)])

  pull = jax.jit(lambda weights: jax.vjp(terms, params)[1](weights)[0])
  each = [sharding.flatten(pull(one)) for one in jnp.eye(1 + len(OWNERS))]
  return {k: np.array([float(jnp.abs(grads[k]).max()) for grads in each]) for k in each[0]}


def test_every_parameter_learns_but_running_statistics(gradients):
  still = sorted(k for k, v in gradients.items() if v[0] == 0)
  assert still == sorted(k for k in gradients if k.endswith(('/mean', '/var')))
  assert {k.split('/')[0] for k in gradients} == set(PLAYERS)


def test_each_player_learns_only_from_its_own_loss(gradients):
  moved = lambda i: {k.split('/')[0] for k, v in gradients.items() if v[1 + i] > 0}
  assert [moved(i) for i in range(len(OWNERS))] == [{player} for player in OWNERS.values()]


def test_the_loss_is_the_sum_of_its_terms():
  objective, (params, mutable) = build(dict(kl_weight=2.0, l2_weight=3.0), labels=5), start(5)
  context = Context({}, mutable, jax.random.key(1), jnp.int32(0), train=False)
  loss, (m, kept) = jax.jit(objective.loss)(params, context, BATCH)
  terms = [m[f'{who}_{what}'] for who in ('image', 'story') for what in ('generator_loss', 'discriminator_loss')]
  total = sum(terms) + 2 * m['kl'] + 3 * m['l2'] + m['label_loss'] + m['generator_label_loss']
  assert float(loss) == pytest.approx(float(total), rel=1e-5)
  # Fresh discriminators know nothing: log 2 for real ones, half of that for each of the others.
  assert float(m['image_discriminator_loss']) == pytest.approx(2 * np.log(2), rel=0.05)
  jax.tree.map(np.testing.assert_array_equal, kept, mutable)


def test_discriminators_are_updated_every_second_step_and_statistics_follow():
  objective, c = build(labels=5), config(labels=5)
  states, _, _ = steps.take(objective, c, BATCH, count=2, start=steps.start(objective, c, BATCH, scale=0.02))
  first, second, third = (s.params for s in states)
  same = lambda a, b, player, kind: all(
    (x == y).all()
    for (k, x), y in zip(sharding.flatten(a[player]).items(), sharding.flatten(b[player]).values(), strict=True)
    if k.endswith(kind)
  )
  for player in PLAYERS:
    assert not same(first, second, player, 'kernel')
    assert not same(second, third, player, 'mean')
  assert not same(second, third, 'generator', 'kernel')
  assert same(second, third, 'image_discriminator', 'kernel') and same(second, third, 'story_discriminator', 'kernel')


def test_a_single_story_has_no_other_to_be_compared_with_and_shorter_stories_work():
  objective, (params, mutable) = build(), start()
  context = Context({}, mutable, jax.random.key(1), jnp.int32(0), train=False)
  few = {'text': BATCH['text'][:1, :2], 'image': BATCH['image'][:1, :3]}
  _, (metrics, _) = jax.jit(objective.loss)(params, context, few)
  assert metrics['image_accuracy_wrong'] == metrics['image_accuracy_fake']
  assert jax.jit(objective.sample)(params, context, few).shape == (1, 2 * 16, 3 * 16, 3)


def test_captions_by_a_frozen_roberta():
  words = dict(vocab_size=40, length=8, pad=1, start=0, end=2)
  run = {'model': {'variant': 'test'}, 'tokenizer': words}
  objective = storyganc.from_config(config(captions='roberta'), {'roberta': run})
  params, mutable = (runs.parameters(lambda *x, i=i: objective.init(*x)[i], BATCH, scale=0.1) for i in range(2))
  assert 'captions_encoder' not in params['generator']
  net = objective.tower.model
  frozen = runs.parameters(net.init, np.zeros((1, 8), np.int32))['params']
  context = Context({'roberta': frozen}, mutable, jax.random.key(1), jnp.int32(0), train=True)
  batch = {**BATCH, 'roberta_text': RNG.integers(3, 39, (8, 3, 8)).astype(np.int32)}
  loss, _ = jax.jit(objective.loss)(params, context, batch)
  other = jax.jit(objective.loss)(params, context, {**batch, 'roberta_text': batch['roberta_text'][::-1]})[0]
  assert np.isfinite(float(loss)) and float(loss) != float(other)
  with pytest.raises(ValueError, match=r'config.frozen.roberta has no tokenizer'):
    objective.loss(params, context, BATCH)


def test_errors():
  with pytest.raises(ValueError, match=r'set config.tokenizer.vocab_size'):
    c = config()
    c.tokenizer.vocab_size = 0
    storyganc.from_config(c, {})
  with pytest.raises(ValueError, match='model generates 16 pixels; set it to 16'):
    c = config()
    c.data.image_size = 24
    storyganc.from_config(c, {})
  with pytest.raises(ValueError, match='each has 1; use 2 or more'):
    c = config()
    c.data.batch_size = 1
    storyganc.from_config(c, {})
  with pytest.raises(ValueError, match='needs stories of images; use a story source'):
    build().init(jax.random.key(0), {'text': BATCH['text'], 'tokens': BATCH['text']})
  with pytest.raises(ValueError, match=r"'roberta' needs a frozen network; set config.frozen.roberta"):
    build(captions='roberta')
  with pytest.raises(ValueError, match=r'config.loss has no field gp_weight'):
    build(dict(gp_weight=1.0))
  with pytest.raises(ValueError, match=r'norm_decay is 1.5; expected a fraction from 0 to 1'):
    build(dict(norm_decay=1.5))
  params, mutable = start()
  context = Context({}, mutable, jax.random.key(1), jnp.int32(0), train=True)
  with pytest.raises(ValueError, match=r'has 5 labels per frame, but model.labels is 7; set it to 5'):
    build(labels=7).loss(params, context, BATCH)
