"""Quantisers and the upkeep of a codebook, against numpy and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.layers import quantize
from dalle_jax.layers.quantize import GumbelQuantizer, NearestQuantizer
from tests import runs

K, D = 6, 4
Z = jax.random.normal(jax.random.key(1), (2, 3, 3, D))


def params(module, z=Z, seed=0):
  return jax.device_put(runs.parameters(module.init, z, seed=seed)['params'])


def table(seed=2):
  return jax.random.normal(jax.random.key(seed), (K, D))


def update(state, z, codes, embedding=None, step=0, seed=0, **kwargs):
  settings = dict(decay=0.9, revive=0.0, average=True) | kwargs
  rng = jax.random.key(seed)
  embedding = table() if embedding is None else embedding
  batch = quantize.Quantized(jnp.asarray(embedding)[codes], jnp.asarray(codes), jnp.asarray(z), {})
  return quantize.update_codebook(state, embedding, batch, rng, jnp.int32(step), **settings)


@pytest.mark.parametrize('normalize', [False, True])
def test_nearest_takes_the_closest_code(normalize):
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True) if normalize else x
  out = NearestQuantizer(K, D, normalize).apply({'params': {'embedding': table()}}, Z)
  z, codebook = unit(np.asarray(Z)), unit(np.asarray(table()))
  expected = np.linalg.norm(z[..., None, :] - codebook, axis=-1).argmin(-1)
  np.testing.assert_array_equal(out.codes, expected)
  np.testing.assert_allclose(out.vectors, codebook[expected], atol=1e-6)
  np.testing.assert_allclose(out.losses['codebook'], np.square(z - codebook[expected]).mean(), rtol=1e-5)
  looked_up = NearestQuantizer(K, D, normalize).apply({'params': {'embedding': table()}}, out.codes, method='lookup')
  np.testing.assert_allclose(looked_up, out.vectors, atol=1e-6)


def test_nearest_is_straight_through_and_each_half_of_the_loss_moves_its_side():
  module = NearestQuantizer(K, D)
  run = lambda z, p, f: f(module.apply({'params': p}, z))
  grads = jax.grad(run, (0, 1))
  p = {'embedding': table()}
  weights = jax.random.normal(jax.random.key(3), Z.shape)
  to_z, to_table = grads(Z, p, lambda out: (out.vectors * weights).sum())
  np.testing.assert_allclose(to_z, weights, rtol=1e-6)
  assert not to_table['embedding'].any()
  to_z, to_table = grads(Z, p, lambda out: out.losses['commitment'])
  assert to_z.any() and not to_table['embedding'].any()
  to_z, to_table = grads(Z, p, lambda out: out.losses['codebook'])
  assert not to_z.any() and to_table['embedding'].any()


def test_gumbel_takes_the_most_probable_code_without_noise_and_samples_with_it():
  module = GumbelQuantizer(K, D)
  p = params(module)
  out = module.apply({'params': p}, Z)
  logits = np.asarray(Z) @ np.asarray(p['proj']['kernel'])[0, 0] + np.asarray(p['proj']['bias'])
  np.testing.assert_array_equal(out.codes, logits.argmax(-1))
  np.testing.assert_allclose(out.vectors, np.asarray(p['embedding'])[np.asarray(out.codes)], atol=1e-5)
  probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  np.testing.assert_allclose(out.losses['kl'], (probs * np.log(probs * K)).sum(-1).mean(), rtol=1e-4)
  # With noise, codes occur as often as their probabilities say.
  z = jnp.broadcast_to(Z[:1, :1, :1], (1, 100, 100, D))
  codes = module.apply({'params': p}, z, jax.random.key(0), 0.5).codes
  np.testing.assert_allclose(np.bincount(codes.ravel(), minlength=K) / codes.size, probs[0, 0, 0], atol=0.02)


def test_gumbel_gradient_is_that_of_the_soft_sample_at_its_temperature():
  module = GumbelQuantizer(K, D)
  p, rng = params(module), jax.random.key(5)
  weights = jax.random.normal(jax.random.key(3), Z.shape)

  def soft(z, temperature):
    logits = z @ p['proj']['kernel'][0, 0] + p['proj']['bias'] + jax.random.gumbel(rng, (*Z.shape[:-1], K))
    return (jax.nn.softmax(logits / temperature) @ p['embedding'] * weights).sum()

  for temperature in (1.0, 0.0625):
    grad = jax.grad(lambda z, t=temperature: (module.apply({'params': p}, z, rng, t).vectors * weights).sum())(Z)
    np.testing.assert_allclose(grad, jax.grad(soft)(Z, temperature), rtol=1e-3, atol=1e-5)


def test_every_gumbel_parameter_gets_a_gradient():
  module = GumbelQuantizer(K, D)
  grads = jax.grad(lambda p: (module.apply({'params': p}, Z).vectors ** 2).sum())(params(module))
  assert all(g.any() for g in jax.tree.leaves(grads))


def test_usage_counts_codes_and_perplexity():
  share, metrics = quantize.usage(jnp.asarray([[0, 0], [1, 1]]), 4)
  np.testing.assert_allclose(share, [2, 2, 0, 0])
  assert metrics['used_codes'] == 2
  np.testing.assert_allclose(metrics['perplexity'], 2.0, rtol=1e-6)


def test_average_follows_the_equations_of_the_paper():
  rng = np.random.default_rng(0)
  decay, codebook = 0.9, np.asarray(table())
  state = quantize.codebook_state(K, D, data_init=False)
  counts, sums = np.ones(K), codebook.astype(np.float64)
  embedding = table()
  for step in range(3):
    z, codes = rng.normal(size=(18, D)).astype(np.float32), rng.integers(0, 4, 18)
    state = update(state, z, codes, embedding, step)
    embedding = quantize.write_codebook(state, embedding)
    one_hot = np.eye(K)[codes]
    counts = decay * counts + (1 - decay) * one_hot.sum(0) * K / 18
    sums = decay * sums + (1 - decay) * one_hot.T @ z * K / 18
    np.testing.assert_allclose(embedding, sums / counts[:, None], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state['count'], counts, rtol=1e-5)


def test_two_updates_of_one_step_add_up():
  z, codes = np.ones((4, D), np.float32), np.zeros(4, int)
  start = quantize.codebook_state(K, D, data_init=False)
  first = update(start, z, codes, step=0)
  second = update(first, z, codes, step=0)
  written = quantize.write_codebook(first, table())
  expected = quantize.write_codebook(update(first, z, codes, written, step=1), written)
  np.testing.assert_allclose(quantize.write_codebook(second, table()), expected, rtol=1e-6)


@pytest.mark.parametrize('average', [True, False])
def test_the_first_batches_initialise_the_codebook(average):
  z = np.arange(16, dtype=np.float32).reshape(4, D)  # fewer vectors than codes
  state = update(quantize.codebook_state(K, D), z, np.zeros(4, int), average=average)
  embedding = quantize.write_codebook(state, table())
  assert {tuple(row) for row in np.asarray(embedding[:4])} == {tuple(row) for row in z}  # every vector once
  assert (state['count'][:4] == 1).all() and (state['count'][4:] < 0).all()
  state = update(state, z + 100, np.zeros(4, int), embedding, step=1, average=average)
  embedding = quantize.write_codebook(state, embedding)
  assert (embedding[4:] >= 100).all() and (state['count'] > 0).all()


@pytest.mark.parametrize('average', [True, False])
def test_codes_out_of_use_stay_when_none_are_revived(average):
  z, codes = np.ones((8, D), np.float32), np.zeros(8, int)
  state = quantize.codebook_state(K, D, data_init=False)
  for count in (1e-8, 1e-12, 1e-38, 0.0):  # as after thousands of updates, down to what float32 rounds to 0
    state = {**state, 'count': state['count'].at[1:].set(count)}
    state = update(state, z, codes, average=average)
    np.testing.assert_allclose(quantize.write_codebook(state, table())[1:], table()[1:], rtol=1e-6)


@pytest.mark.parametrize('average', [True, False])
def test_codes_out_of_use_are_revived(average):
  z = np.random.default_rng(0).normal(size=(18, D)).astype(np.float32)
  codes = np.arange(18) % (K - 1)  # the last one is never used
  state, embedding, revived = quantize.codebook_state(K, D, data_init=False), table(), []
  for step in range(30):
    before, state = embedding, update(state, z, codes, embedding, step, seed=step, revive=0.1, average=average)
    embedding = quantize.write_codebook(state, embedding)
    if (embedding[-1] != before[-1]).any() and abs(np.asarray(embedding[-1] - before[-1])).max() > 1e-5:
      revived.append(step)
      assert any(np.allclose(embedding[-1], row) for row in z)
    if not average:
      np.testing.assert_array_equal(embedding[:-1], table()[:-1])
  assert revived == [21]  # 0.9 ** 22 is the first power under 0.1


def test_a_revival_outlasts_the_other_updates_of_its_step():
  z, codes = np.ones((8, D), np.float32), np.zeros(8, int)
  state = update(quantize.codebook_state(K, D), z, codes, average=False)
  state = update(state, 2 * z, codes, average=False)
  np.testing.assert_allclose(quantize.write_codebook(state, table()), np.ones((K, D)))
  state = update(state, 2 * z, codes, step=1, average=False)
  np.testing.assert_array_equal(quantize.write_codebook(state, table()), table())
