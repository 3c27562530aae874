"""Contextual attention against a slow, plain one: loops over stories, places and patches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.layers import contextual

contextual_attention = jax.jit(contextual.contextual_attention)


def patch(x, i, j):
  """The 3 x 3 surroundings of a place of x[H, W, C], zero outside."""
  h, w, c = x.shape
  found = np.zeros((3, 3, c))
  for a in range(3):
    for b in range(3):
      y, z = i + a - 1, j + b - 1
      if 0 <= y < h and 0 <= z < w:
        found[a, b] = x[y, z]
  return found


def slow(target, source, scale):
  (n, h, w, c), (_, k, l, _) = target.shape, source.shape
  result = np.zeros((n, h, w, c))
  for b in range(n):
    known = [patch(source[b], i, j) for i in range(k) for j in range(l)]
    total, count = np.zeros((h, w, c)), np.zeros((h, w, 1))
    for i in range(h):
      for j in range(w):
        mine = patch(target[b], i, j)
        floor = lambda x: max(np.sqrt((x**2).sum()), 1e-4)
        cosines = np.array([(mine * other).sum() / floor(mine) / floor(other) for other in known])
        weights = np.exp(scale * cosines - (scale * cosines).max())
        weights /= weights.sum()
        mean = sum(weight * other for weight, other in zip(weights, known, strict=True))
        for a in range(3):
          for d in range(3):
            y, z = i + a - 1, j + d - 1
            if 0 <= y < h and 0 <= z < w:
              total[y, z] += mean[a, d]
              count[y, z] += 1
    result[b] = total / count
  return result


@pytest.mark.parametrize(('target', 'source'), [((5, 7), (3, 5)), ((4, 4), (4, 4)), ((1, 3), (2, 1))])
def test_it_equals_the_slow_one(target, source):
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, *target, 6)), rng.normal(size=(2, *source, 6))
  found = contextual_attention(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), 10.0)
  np.testing.assert_allclose(found, slow(a, b, 10.0), rtol=2e-4, atol=2e-5)


def test_a_source_of_one_colour_gives_that_colour_inside():
  source = jnp.broadcast_to(jnp.asarray([1.0, -2.0]), (1, 9, 9, 2))
  target = jnp.zeros((1, 5, 5, 2)).at[:, 2, 2].set(1.0)
  found = contextual_attention(target, source)
  assert float(jnp.abs(found[..., 0] / found[..., 1] + 0.5).max()) < 1e-6


def test_gradients_are_finite_where_patches_are_zero():
  rng = np.random.default_rng(1)
  target = jnp.asarray(rng.normal(size=(2, 5, 5, 4)), jnp.float32).at[0].set(0.0).at[1, :3, :3].set(0.0)
  source = jnp.asarray(rng.normal(size=(2, 5, 5, 4)), jnp.float32).at[1].set(0.0).at[0, 2:, 2:].set(0.0)
  loss = lambda a, b: jnp.square(contextual_attention(a, b) + 1.0).sum()
  grads = jax.jit(jax.grad(loss, (0, 1)))(target, source)
  assert all(bool(jnp.isfinite(g).all()) for g in grads)
  assert float(jnp.abs(grads[1]).max()) > 0
