"""Diffusion: schedules, reverse steps that compose, sampling, losses, guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.functional import diffusion
from dalle_jax.functional.diffusion import Diffusion

X = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
NOISE = jax.random.normal(jax.random.key(1), X.shape)


@pytest.mark.parametrize('schedule', diffusion.SCHEDULES)
def test_ever_less_is_kept(schedule):
  d = Diffusion(schedule=schedule)
  kept = d.alphas_cumprod()
  assert kept.dtype == np.float32 and (np.diff(kept) < 0).all() and kept[0] > 0.999 and kept[-1] < 1e-4
  np.testing.assert_allclose(np.cumprod(1 - d.betas(), dtype=np.float64), kept, rtol=1e-6)


def test_the_schedules_by_hand():
  assert Diffusion(schedule='linear').betas()[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])
  assert Diffusion(250, 'linear').betas()[0] == pytest.approx(4e-4)
  share = lambda u: np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
  np.testing.assert_allclose(Diffusion().alphas_cumprod()[499], share(0.5) / share(0), rtol=1e-5)
  assert Diffusion().betas()[-1] == np.float32(0.999)
  # Of signal and noise, but at the last step, where what is added is cut.
  ratio = lambda d: np.sqrt(d.alphas_cumprod()[:-1] / (1 - d.alphas_cumprod()[:-1]))
  np.testing.assert_allclose(ratio(Diffusion(shift=0.25)), 0.25 * ratio(Diffusion()), rtol=1e-3)


def test_steps_are_spread_evenly_from_the_last_to_the_first():
  assert Diffusion().timesteps(3) == (999, 500, 0)
  assert Diffusion(8).timesteps(8) == tuple(range(7, -1, -1))
  for count in (1, 9):
    with pytest.raises(ValueError, match=f'prior_steps is {count}; expected 2 to 8'):
      Diffusion(8).timesteps(count, 'prior_steps')


@pytest.mark.parametrize(('later', 'earlier'), [(999, 700), (700, 699), (10, 3), (1, 0)])
def test_a_step_back_from_the_true_start_is_as_if_less_noise_had_been_added(later, earlier):
  """Mean and variance over the noise in x, of which a step keeps a part and adds another, in closed form."""
  d = Diffusion(predicts='start', clip=100.0)
  kept, start = d.alphas_cumprod().astype(np.float64), jnp.full((1, 1), 2.0)
  at = lambda x, noise: float(diffusion.reverse_step(d, start, jnp.full((1, 1), x), later, earlier, noise)[0, 0])
  zero, slope, spread = at(0.0, 0.0), at(1.0, 0.0) - at(0.0, 0.0), at(0.0, 1.0) - at(0.0, 0.0)
  mean = zero + slope * 2.0 * np.sqrt(kept[later])
  np.testing.assert_allclose(mean, 2.0 * np.sqrt(kept[earlier]), rtol=2e-3)
  variance = slope**2 * (1 - kept[later]) + spread**2
  np.testing.assert_allclose(variance, 1 - kept[earlier], rtol=5e-3)


def test_a_network_that_knows_the_start_is_led_there():
  d = Diffusion(predicts='start')
  start = jnp.clip(X, -1, 1)
  keys = jax.random.split(jax.random.key(2), 3)
  x = diffusion.sample(d, lambda x, t: start, diffusion.initial_noise(keys, X.shape[1:]), keys, d.timesteps(10))
  np.testing.assert_allclose(x, start, atol=1e-3)
  d = Diffusion(variance='learned')

  def knows_the_noise(x, t):
    kept = jnp.asarray(d.alphas_cumprod())[t][:, None, None, None]
    return jnp.concatenate([(x - jnp.sqrt(kept) * start) / jnp.sqrt(1 - kept), jnp.zeros_like(x)], -1)

  x = diffusion.sample(d, knows_the_noise, diffusion.initial_noise(keys, X.shape[1:]), keys, d.timesteps(10))
  np.testing.assert_allclose(x, start, atol=2e-3)


def network(x, t):
  return jnp.concatenate([0.3 * x + t[:, None, None, None] / 1000, jnp.sin(x)], -1)


def test_drawing_is_step_after_step_and_the_last_may_be_anothers():
  d, keys = Diffusion(variance='learned'), jax.random.split(jax.random.key(2), 3)
  steps, x = d.timesteps(4), diffusion.initial_noise(keys, X.shape[1:])
  other = lambda x, t: network(x, t) * 0.5
  drawn = jax.jit(lambda x: diffusion.sample(d, network, x, keys, steps, other))(x)
  normal = lambda i: jnp.stack([jax.random.normal(jax.random.fold_in(key, i), X.shape[1:]) for key in keys])
  for i, (t, then) in enumerate(zip(steps, [*steps[1:], -1], strict=True)):
    out = (other if t == 0 else network)(x, jnp.full(3, t))
    x = diffusion.reverse_step(d, out, x, t, then, normal(i + 1))
  np.testing.assert_allclose(drawn, x, atol=1e-5)


def test_ddim_moves_along_the_noise_it_is_told_of_and_eta_adds_fresh_noise():
  d, keys = Diffusion(), jax.random.split(jax.random.key(2), 3)
  x0, steps = jnp.clip(X, -1, 1), (600, 400, 0)
  alpha, sigma = (np.sqrt(v)[400] for v in (d.alphas_cumprod(), 1 - d.alphas_cumprod()))
  t = lambda step: jnp.full(3, step)
  knows = lambda x, t: (x - jnp.sqrt(a(t)) * x0) / jnp.sqrt(1 - a(t))
  a = lambda t: jnp.asarray(d.alphas_cumprod())[t][:, None, None, None]
  seen = []
  spy = lambda x, t: seen.append(x) or knows(x, t)
  noisy = diffusion.add_noise(d, x0, t(600), NOISE)
  with jax.disable_jit():
    out = diffusion.sample(d, spy, noisy, keys, steps, eta=0.0)
    np.testing.assert_allclose(seen[1], alpha * x0 + sigma * NOISE, atol=1e-4)  # the same noise, less of it
    np.testing.assert_allclose(out, x0, atol=2e-3)
    seen.clear()
    diffusion.sample(d, spy, noisy, keys, steps, eta=1.0)
  std = sigma * np.sqrt(1 - d.alphas_cumprod()[600] / d.alphas_cumprod()[400]) / np.sqrt(1 - d.alphas_cumprod()[600])
  fresh = jnp.stack([jax.random.normal(jax.random.fold_in(key, 1), X.shape[1:]) for key in keys])
  np.testing.assert_allclose(seen[1], alpha * x0 + np.sqrt(sigma**2 - std**2) * NOISE + std * fresh, atol=1e-4)


def test_rows_do_not_know_of_each_other():
  d, keys = Diffusion(variance='learned'), jax.random.split(jax.random.key(2), 3)
  draw = lambda keys: diffusion.sample(d, network, diffusion.initial_noise(keys, X.shape[1:]), keys, d.timesteps(5))
  np.testing.assert_allclose(draw(keys)[1:2], draw(keys[1:2]), atol=1e-6)
  assert not np.allclose(draw(keys)[0], draw(keys)[1])


def test_guidance_leaves_the_variance_alone():
  d = Diffusion(variance='learned')
  cond, uncond = (jax.random.normal(jax.random.key(i), (2, 3, 3, 4)) for i in (5, 6))
  np.testing.assert_allclose(diffusion.guide(d, cond, uncond, 1.0), cond, atol=1e-6)
  out = diffusion.guide(d, cond, uncond, 3.0)
  np.testing.assert_allclose(out[..., :2], uncond[..., :2] + 3 * (cond - uncond)[..., :2], atol=1e-5)
  np.testing.assert_array_equal(out[..., 2:], cond[..., 2:])


losses = jax.jit(diffusion.losses, static_argnums=0)


def test_losses_of_what_is_right_and_who_learns_from_them():
  d, t = Diffusion(variance='learned'), jnp.array([0, 300, 999])
  start = jnp.clip(X, -1, 1)
  x = diffusion.add_noise(d, start, t, NOISE)
  right = jnp.concatenate([NOISE, -jnp.ones_like(X)], -1)  # the true noise and the smallest variance
  simple, bound = losses(d, right, start, x, t, NOISE)
  np.testing.assert_allclose(simple, 0, atol=1e-6)
  np.testing.assert_allclose(bound[1:], 0, atol=1e-5)
  assert 0 < float(bound[0]) < 8  # bits of a pixel in 256 values, which one step of noise hides a little of
  wrong = right.at[..., :2].add(0.1)
  simple, bound = losses(d, wrong, start, x, t, NOISE)
  np.testing.assert_allclose(simple, 0.01, rtol=1e-4)
  assert (bound[1:] > 0).all()
  slope = jax.jit(jax.grad(lambda out: losses(d, out, start, x, t, NOISE)[1].sum()))(wrong + 0.5)
  np.testing.assert_array_equal(slope[..., :2], 0)
  assert (jnp.abs(slope[1:, ..., 2:]) > 0).any() and bool(jnp.isfinite(slope).all())
  kept = d.alphas_cumprod()[t][:, None, None, None]
  velocity = np.sqrt(kept) * NOISE - np.sqrt(1 - kept) * start
  both = Diffusion(variance='learned', predicts='velocity')
  simple, bound = losses(both, right.at[..., :2].set(velocity), start, x, t, NOISE)
  np.testing.assert_allclose(simple, 0, atol=1e-6)
  np.testing.assert_allclose(bound[1:], 0, atol=1e-4)
  small = Diffusion(predicts='start')
  simple, bound = losses(small, start + 0.2, start, x, t, NOISE)
  np.testing.assert_allclose(simple, 0.04, rtol=1e-4)
  np.testing.assert_array_equal(bound, 0)


def test_errors():
  with pytest.raises(ValueError, match=r"diffusion schedule 'sigmoid' is unknown; there are cosine, linear"):
    Diffusion(schedule='sigmoid')
  for wrong in (dict(shift=0.0), dict(shift=0.5, schedule='linear')):
    with pytest.raises(
      ValueError, match=r'diffusion shift is 0.\d; expected one above 0, and 1 but for the schedule cosine'
    ):
      Diffusion(**wrong)
  with pytest.raises(ValueError, match='diffusion has 1 steps'):
    Diffusion(1)
  with pytest.raises(ValueError, match='schedule linear needs more than 20'):
    Diffusion(20, 'linear')
