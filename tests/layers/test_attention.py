"""The attention of each kind against loops in numpy, the cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.layers.attention import Attention, KVCache, Stream, decode_attention
from dalle_jax.layers.patterns import KINDS, Pattern
from tests import runs


@pytest.mark.parametrize('kind', KINDS)
def test_attention_equals_loops_over_the_keys_that_are_seen(kind):
  pattern = Pattern(kind, 3, (3, 3), 3)
  mask = pattern.mask(12)
  x = np.random.default_rng(0).normal(size=(2, 12, 8)).astype(np.float32)
  module = Attention(heads=2)
  params = runs.parameters(module.init, x)['params']
  q, k, v = (np.einsum('bsd,dhk->bshk', x, params[n]['kernel']) + params[n]['bias'] for n in ('query', 'key', 'value'))
  out = np.zeros((2, 12, 2, 4))
  for b in range(2):
    for s in range(12):
      for h in range(2):
        seen = np.flatnonzero(mask[s])
        weights = np.exp(k[b, seen, h] @ q[b, s, h] / np.sqrt(4))
        out[b, s, h] = weights @ v[b, seen, h] / weights.sum()
  expected = np.einsum('bshk,hkd->bsd', out, params['out']['kernel']) + params['out']['bias']
  for told in (dict(mask=mask), dict(mask=np.stack([mask, mask])), dict(stream=Stream((pattern,)))):
    np.testing.assert_allclose(jax.jit(module.apply)({'params': params}, x, **told)[0], expected, atol=1e-5)


def test_cache_is_written_where_told_and_repeated_by_row():
  stream = jnp.arange(40.0).reshape(2, 5, 2, 2) + 1  # three positions of text, two image tokens
  cache = KVCache().append(3, stream, -stream).append(3, 2 * stream, -stream)
  assert cache.prefix == 3
  for i, by_position in enumerate((stream, 2 * stream)):
    np.testing.assert_array_equal(cache.text[i][0].swapaxes(1, 2), by_position[:, :3])
    np.testing.assert_array_equal(cache.image[i][0].swapaxes(1, 2), by_position[:, 3:])
  token = jnp.full((2, 1, 2, 2), 0.5)
  new = cache.extend(2).write(1, 3, token, -token)
  np.testing.assert_array_equal(new.image[1][0][:, :, :2], cache.image[1][0])
  assert not new.image[1][0][:, :, 2].any() and not new.image[0][0][:, :, 2:].any()
  assert (new.image[1][0][:, :, 3] == 0.5).all() and (new.image[1][1][:, :, 3] == -0.5).all()
  for part in ('text', 'image'):
    k, twice = getattr(new, part)[1][0], getattr(new.repeat(2), part)[1][0]
    np.testing.assert_array_equal(twice, k[np.array([0, 0, 1, 1])])


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('size', [3, 9])  # in the larger picture what is seen is gathered
def test_a_token_sees_of_the_cache_what_it_sees_in_the_stream(kind, size):
  pattern = Pattern(kind, 3, (size, size), 3)
  q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 3 + size * size, 2, 4))
  mask = pattern.mask(3 + size * size)
  expected = jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(mask)[None, None])
  cache = KVCache().append(3, k, v)
  run = jax.jit(lambda i: decode_attention(q[:, 3 + i][:, None], cache.text[0], cache.image[0], i, pattern))
  for i in (0, 1, size, size * size - 1):
    np.testing.assert_allclose(run(i)[:, 0], expected[:, 3 + i], atol=1e-5)
