"""The VQGAN objective: the one loss has the gradients of the separate ones, the discriminator waits, codes revive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from dalle_jax.functional import gan
from dalle_jax.functional.pixels import to_float
from dalle_jax.objectives import vqgan
from dalle_jax.training.state import Context
from tests import runs

BATCH = {'image': jax.random.randint(jax.random.key(0), (4, 16, 16, 3), 0, 256).astype(jnp.uint8)}


def config(steps=100, model=(), **loss):
  c = common.base()
  c.model = ConfigDict(runs.VQGAN | dict(image_size=16, patch=2) | dict(model))
  c.loss = ConfigDict(dict(disc_variant='test', l2_weight=1.0, **loss))
  c.data.image_size, c.train.steps = 16, steps
  return c


def build(*args, **kwargs):
  return vqgan.from_config(config(*args, **kwargs), {})


STARTS = {}


def start(objective):
  """Random parameters and a fresh state, made once for each pair of networks."""
  networks = objective.model, objective.disc
  if networks not in STARTS:
    params = jax.device_put(runs.parameters(lambda *x: objective.init(*x)[0], BATCH, scale=0.1))
    STARTS[networks] = params, jax.jit(lambda: objective.init(jax.random.key(1), BATCH)[1])()
  return STARTS[networks]


def context(mutable, step=0, train=True):
  return Context({}, mutable, jax.random.key(2), jnp.int32(step), train=train)


def test_one_gradient_equals_those_of_both_players():
  objective = build(disc_weight=0.8)
  params, mutable = start(objective)
  ctx, images = context(mutable), to_float(BATCH['image'])
  grads, (metrics, _) = jax.jit(jax.grad(objective.loss, has_aux=True))(params, ctx, BATCH)

  def generator(net):
    out = objective.model.apply({'params': net}, images)
    nll = jnp.abs(out.recon - images).mean() + jnp.square(out.recon - images).mean()
    q = out.quantized.losses
    judged = objective.disc.apply({'params': params['discriminator']}, out.recon)
    adversarial = 0.8 * metrics['adaptive_weight'] * gan.hinge_generator(judged)
    return nll + 0.25 * q['commitment'] + q['codebook'] + adversarial

  def discriminator(net):
    recon = objective.model.apply({'params': params['vqgan']}, images).recon
    judge = lambda x: objective.disc.apply({'params': net}, x)
    return gan.hinge_discriminator(judge(images), judge(recon))

  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
  jax.tree.map(close, grads['vqgan'], jax.jit(jax.grad(generator))(params['vqgan']))
  jax.tree.map(close, grads['discriminator'], jax.jit(jax.grad(discriminator))(params['discriminator']))
  assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads['discriminator']['conv_0']))


def test_adaptive_weight_is_the_ratio_at_the_last_kernel():
  objective = build(disc_weight=0.8)
  params, mutable = start(objective)
  _, (metrics, _) = jax.jit(objective.loss)(params, context(mutable), BATCH)
  images = to_float(BATCH['image'])

  def norm(loss):
    def of_kernel(kernel):
      net = {**params['vqgan'], 'conv_out': {**params['vqgan']['conv_out'], 'kernel': kernel}}
      return loss(objective.model.apply({'params': net}, images).recon)

    return jnp.linalg.norm(jax.jit(jax.grad(of_kernel))(params['vqgan']['conv_out']['kernel']))

  nll = norm(lambda x: jnp.abs(x - images).mean() + jnp.square(x - images).mean())
  fool = norm(lambda x: gan.hinge_generator(objective.disc.apply({'params': params['discriminator']}, x)))
  assert float(metrics['adaptive_weight']) == pytest.approx(float(nll / (fool + 1e-4)), rel=1e-3)


@pytest.mark.parametrize(('disc_start', 'first'), [(0.5, 50), (7.0, 7)])
def test_the_discriminator_waits(disc_start, first):
  objective, plain = build(disc_weight=0.8, disc_start=disc_start), build()
  params, mutable = start(objective)
  of = lambda o: jax.jit(lambda step: o.loss(params, context(mutable, step), BATCH)[0])
  ours, theirs = of(objective), of(plain)
  assert float(ours(first - 1)) == pytest.approx(float(theirs(first - 1)), rel=1e-6)
  assert abs(ours(first) - theirs(first)) > 1e-3


def test_the_codebook_starts_from_the_data_and_dead_codes_come_back():
  objective = build(ema_decay=0.9)
  params, mutable = start(objective)
  loss, after = jax.jit(objective.loss), jax.jit(objective.after_update)
  _, (metrics, mutable) = loss(params, context(mutable), BATCH)
  params = after(params, mutable)
  _, (later, mutable) = loss(params, context(mutable, 1), BATCH)
  assert later['perplexity'] > metrics['perplexity'] and later['commitment_loss'] < metrics['commitment_loss']
  table = params['vqgan']['quantize']['embedding']
  broken = {**params, 'vqgan': {**params['vqgan'], 'quantize': {'embedding': table.at[3].set(1e3)}}}
  for step in range(2, 60):
    _, (_, mutable) = loss(broken, context(mutable, step), BATCH)
    broken = after(broken, mutable)
  assert jnp.abs(broken['vqgan']['quantize']['embedding'][3]).max() < 1e2


def test_gumbel_cools_and_has_no_codebook_state():
  objective = build(model={'quantizer': 'gumbel'}, temperature=1.0, temperature_end=0.0625)
  params, mutable = start(objective)
  assert 'codebook' not in mutable and objective.after_update(params, mutable) is params
  at = lambda step: float(objective.temperature(jnp.int32(step)))
  assert (at(0), at(50), at(100), at(900)) == pytest.approx((1.0, 0.53125, 0.0625, 0.0625))
  loss, (metrics, _) = jax.jit(objective.loss)(params, context(mutable), BATCH)
  assert {'kl_loss', 'temperature', 'used_codes', 'perplexity'} <= set(metrics) and jnp.isfinite(loss)


def test_evaluation_does_not_change_the_state_and_samples_are_pairs():
  objective = build()
  params, mutable = start(objective)
  _, (metrics, after) = jax.jit(objective.loss)(params, context(mutable, train=False), BATCH)
  jax.tree.map(np.testing.assert_array_equal, after, mutable)
  assert 'used_codes_window' not in metrics
  pairs = jax.jit(objective.sample)(params, context(mutable, train=False), BATCH)
  np.testing.assert_array_equal(pairs[:, :, :16], BATCH['image'])
  assert pairs.shape == (4, 16, 32, 3)


def test_a_config_without_lpips_says_so_and_unknown_fields_are_refused(capsys):
  build()
  assert 'no LPIPS weights' in capsys.readouterr().out
  with pytest.raises(ValueError, match='no field lpip_weight; its fields are l1_weight'):
    build(lpip_weight=1.0)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(temperature_end=0.0), 'temperature_end is 0.0; expected a temperature above 0'),  # evaluation would be NaN
    (dict(temperature=-1.0), 'loss.temperature is -1.0'),
    (dict(ema_decay=1.5), 'ema_decay is 1.5; expected a fraction from 0 to 1'),
    (dict(disc_weight=-0.8), 'disc_weight is -0.8; expected 0 or more'),
  ],
)
def test_values_out_of_range_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    build(**fields)
