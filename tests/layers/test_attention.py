"""The attention of each kind against loops in numpy, the cache."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.layers.attention import Attention, KVCache, Stream
from dalle_jax.layers.patterns import KINDS, Pattern


@pytest.mark.parametrize('kind', KINDS)
def test_attention_equals_loops_over_the_keys_that_are_seen(kind):
  pattern = Pattern(kind, 3, (3, 3), 3)
  mask = pattern.mask(12)
  x = jax.random.normal(jax.random.key(0), (2, 12, 8))
  module = Attention(heads=2)
  params = nn.unbox(module.init(jax.random.key(1), x))['params']
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
    np.testing.assert_allclose(module.apply({'params': params}, x, **told)[0], expected, atol=1e-5)


def test_cache_is_written_where_told_and_repeated_by_row():
  cache = KVCache.zeros(3, 2, 5, 1, 2, jnp.float32)
  k = jnp.arange(8.0).reshape(2, 2, 1, 2) + 1
  new = cache.write(1, 3, k, -k)
  assert not cache.k.any() and not new.k[0].any() and not new.k[2].any() and not new.k[1, :, :3].any()
  np.testing.assert_array_equal(new.k[1, :, 3:], k)
  np.testing.assert_array_equal(new.read(1, 4)[1], new.v[1, :, :4])
  np.testing.assert_array_equal(new.take(1, jnp.array([4, 0, 3]))[1], new.v[1][:, np.array([4, 0, 3])])
  np.testing.assert_array_equal(new.repeat(2).k, new.k[:, np.array([0, 0, 1, 1])])
