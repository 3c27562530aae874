"""Properties of StoryGANc's networks: what depends on what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models import storyganc
from tests import runs

B, T, N = 3, 4, 5
MODEL = storyganc.build('test', text_vocab=20, text_length=N)
RNG = np.random.default_rng(0)
TEXT = jnp.asarray(RNG.integers(0, 15, (B, T, N)), jnp.int32)
SOURCE = jnp.asarray(RNG.uniform(-1, 1, (B, 16, 16, 3)), jnp.float32)
EPS = jnp.asarray(RNG.normal(size=(B, MODEL.code)), jnp.float32)
NOISE = jnp.asarray(RNG.normal(size=(B, T, MODEL.noise)), jnp.float32)


@pytest.fixture(scope='module')
def params():
  return runs.parameters(MODEL.init, TEXT, SOURCE, EPS, NOISE, scale=0.1)['params']


@functools.partial(jax.jit, static_argnames=('model', 'train'))
def draw(params, text=TEXT, source=SOURCE, eps=EPS, noise=NOISE, model=MODEL, train=False):
  return model.apply({'params': params}, text, source, eps, noise, train)


def moved(a, b):
  """bool[B, T], the frames that differ."""
  return np.abs(a.frames - b.frames).max((2, 3, 4)) > 1e-5


def test_a_permuted_batch_is_permuted_in_training_too(params):
  order = np.array([2, 0, 1])
  for train in (False, True):
    drawn = draw(params, train=train)
    other = draw(params, TEXT[order], SOURCE[order], EPS[order], NOISE[order], train=train)
    np.testing.assert_allclose(other.frames, drawn.frames[order], atol=2e-5)
    np.testing.assert_allclose(other.mu, drawn.mu[order], atol=1e-5)
    assert drawn.frames.shape == (B, T, 16, 16, 3) and float(drawn.kl) >= 0


def test_a_story_does_not_depend_on_the_rest_of_the_batch(params):
  drawn, alone = draw(params), draw(params, TEXT[:1], SOURCE[:1], EPS[:1], NOISE[:1])
  np.testing.assert_allclose(alone.frames, drawn.frames[:1], atol=1e-5)


def test_the_source_and_every_caption_change_every_frame_of_their_story(params):
  drawn = draw(params)
  other = draw(params, source=SOURCE.at[1].mul(-1.0))
  assert (moved(drawn, other) == (np.arange(B) == 1)[:, None]).all()
  for t in range(T):
    other = draw(params, text=TEXT.at[1, t, 0].add(1))
    assert (moved(drawn, other) == (np.arange(B) == 1)[:, None]).all()


def test_noise_of_a_frame_and_of_a_story(params):
  drawn = draw(params)
  later = moved(drawn, draw(params, noise=NOISE.at[0, 2].add(1.0)))
  assert later.tolist() == [[False, False, True, True], [False] * 4, [False] * 4]  # recurrent: not the frames before
  assert moved(drawn, draw(params, eps=EPS.at[0].add(1.0)))[0].all()


def test_without_attention_the_source_has_no_influence(params):
  blind = storyganc.build('test', text_vocab=20, text_length=N, attention=False)
  own = {k: v for k, v in params.items() if k != 'source'}
  assert set(own) == set(runs.parameters(blind.init, TEXT, SOURCE, EPS, NOISE)['params'])
  assert not moved(draw(own, model=blind), draw(own, source=-SOURCE, model=blind)).any()


def test_over_time_is_a_3d_convolution():
  frames = jnp.asarray(RNG.normal(size=(2, 5, 8, 8, 3)), jnp.float32)
  kernel = jnp.asarray(RNG.normal(size=(3, 4, 4, 3, 6)), jnp.float32)
  rows = storyganc.with_neighbours(frames.reshape(-1, 8, 8, 3), 5)
  flat = kernel.transpose(1, 2, 0, 3, 4).reshape(4, 4, 9, 6)
  ours = jax.lax.conv_general_dilated(rows, flat, (2, 2), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  theirs = jax.lax.conv_general_dilated(
    frames, kernel, (1, 2, 2), 'SAME', dimension_numbers=('NDHWC', 'DHWIO', 'NDHWC')
  )
  np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('frames', [2, 5])
def test_the_story_discriminator_takes_two_to_five_frames_and_depends_on_their_order(frames):
  _, discriminator = storyganc.discriminators(MODEL)
  story = jnp.asarray(RNG.normal(size=(2, frames, 16, 16, 3)), jnp.float32)
  about = jnp.asarray(RNG.normal(size=(2, 7)), jnp.float32)
  params = runs.parameters(discriminator.init, story, about, scale=0.1)
  apply = jax.jit(discriminator.apply)
  logits, labels = apply(params, story, about)
  assert logits.shape == (2,) and labels is None
  moved_by = lambda *inputs: float(jnp.abs(apply(params, *inputs)[0] - logits).max())
  least = 1e-3 * float(jnp.abs(logits).max())
  assert moved_by(story[:, ::-1], about) > least and moved_by(story, -about) > least


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(captions='bert'), "captions 'bert' is unknown; expected own, clip or roberta"),
    (dict(join=3), 'model.join is 3; expected a feature map, 0 to 2'),
    (dict(joint=1), 'has no field joint'),
  ],
)
def test_errors(change, message):
  with pytest.raises(ValueError, match=message):
    storyganc.build('test', **change)


def test_errors_of_shapes(params):
  with pytest.raises(ValueError, match='has 5 frames after the source, the model takes at most 4'):
    draw(params, text=jnp.zeros((B, 5, N), jnp.int32))
  with pytest.raises(ValueError, match=r'the model generates \[16, 16, 3\]'):
    draw(params, source=jnp.zeros((B, 8, 8, 3)))
