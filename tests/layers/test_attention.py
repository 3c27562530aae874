"""Masks in full, the attention of each kind against loops in numpy, the cache."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.layers import attention
from dalle_jax.layers.attention import Attention, KVCache, layer_kinds, stream_mask

MASKS = {  # a prefix of 2, then 2 x 3 image tokens; queries down, keys across
  'full': 'x....... xx...... xxx..... xxxx.... xxxxx... xxxxxx.. xxxxxxx. xxxxxxxx',
  'row': 'x....... xx...... xxx..... xxxx.... xxxxx... xxxxxx.. xx.xxxx. xx..xxxx',
  'column': 'x....... xx...... xxx..... xx.x.... xx..x... xxx..x.. xx.x..x. xx..x..x',
  'conv': 'x....... xx...... xxx..... xxxx.... xx.xx... xxxx.x.. xxxxxxx. xx.xx.xx',
  'wrapped': 'x....... xx...... xxx..... xxxx.... xxxxx... xxxxxx.. xxxxxxx. xxxxxxxx',  # around both edges: all
}


def drawn(text):
  return np.array([[c == 'x' for c in line] for line in text.split()])


@pytest.mark.parametrize('kind', attention.KINDS)
def test_masks_are_these(kind):
  np.testing.assert_array_equal(stream_mask(kind, 2, (2, 3), 3), drawn(MASKS[kind]))


def test_conv_reaches_half_its_kernel():
  prefix, w = 4, 16
  mask = stream_mask('conv', prefix, (16, 16), 11)[prefix + 9 * w + 8, prefix:].reshape(16, 16)
  expected = np.zeros((16, 16), bool)
  expected[4:9, 3:14] = expected[9, 3:9] = True
  np.testing.assert_array_equal(mask, expected)


def test_the_pattern_of_the_paper():
  kinds = layer_kinds('paper', 64)
  assert [i for i in range(1, 65) if kinds[i - 1] == 'column'] == [i for i in range(1, 64) if (i - 2) % 4 == 0]
  assert kinds[-1] == 'conv' and kinds.count('conv') == 1 and set(kinds) == {'row', 'column', 'conv'}
  assert layer_kinds('full, row', 3) == ('full', 'row', 'full')
  with pytest.raises(ValueError, match="attention 'full,diagonal' has diagonal; kinds are full, row"):
    layer_kinds('full,diagonal', 4)
  with pytest.raises(ValueError, match="kind 'diagonal' is unknown"):
    stream_mask('diagonal', 1, (2, 2))


@pytest.mark.parametrize('kind', attention.KINDS)
def test_attention_equals_loops_over_the_keys_that_are_seen(kind):
  mask = stream_mask(kind, 3, (3, 3), 3)
  x = jax.random.normal(jax.random.key(0), (2, 12, 8))
  module = Attention(heads=2)
  params = nn.unbox(module.init(jax.random.key(1), x, mask))['params']
  y, _ = module.apply({'params': params}, x, jnp.asarray(mask))
  q, k, v = (np.einsum('bsd,dhk->bshk', x, params[n]['kernel']) + params[n]['bias'] for n in ('query', 'key', 'value'))
  out = np.zeros((2, 12, 2, 4))
  for b in range(2):
    for s in range(12):
      for h in range(2):
        seen = np.flatnonzero(mask[s])
        weights = np.exp(k[b, seen, h] @ q[b, s, h] / np.sqrt(4))
        out[b, s, h] = weights @ v[b, seen, h] / weights.sum()
  expected = np.einsum('bshk,hkd->bsd', out, params['out']['kernel']) + params['out']['bias']
  np.testing.assert_allclose(y, expected, atol=1e-5)


def test_cache_is_written_where_told_and_repeated_by_row():
  cache = KVCache.zeros(3, 2, 5, 1, 2, jnp.float32)
  k = jnp.arange(8.0).reshape(2, 2, 1, 2) + 1
  new = cache.write(1, 3, k, -k)
  assert not cache.k.any() and not new.k[0].any() and not new.k[2].any() and not new.k[1, :, :3].any()
  np.testing.assert_array_equal(new.k[1, :, 3:], k)
  np.testing.assert_array_equal(new.read(1, 4)[1], new.v[1, :, :4])
  np.testing.assert_array_equal(new.repeat(2).k, new.k[:, np.array([0, 0, 1, 1])])


def test_the_flash_kernel_gets_even_lengths_and_its_absence_is_one_line(monkeypatch):
  q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 8), jnp.bfloat16)
  plain = attention.fused(q, k, v, 'auto', is_causal=True)
  with pytest.raises(ValueError, match='kernel "cudnn" does not take bfloat16'):
    attention.fused(q, k, v, 'cudnn', is_causal=True)
  with pytest.raises(ValueError, match="kernel 'flash' is unknown"):
    attention.fused(q, k, v, 'flash')
  asked, own = [], jax.nn.dot_product_attention

  def fake(q, k, v, is_causal, implementation):
    asked.append((q.shape[1], implementation))
    return own(q, k, v, is_causal=is_causal)

  monkeypatch.setattr(attention, 'has_flash', lambda: True)
  monkeypatch.setattr(jax.nn, 'dot_product_attention', fake)
  np.testing.assert_array_equal(attention.fused(q, k, v, 'auto', is_causal=True), plain)
  attention.fused(q, k, v, 'auto')  # without a mask the padding would be seen
  attention.fused(*(x.astype(jnp.float32) for x in (q, k, v)), 'auto', is_causal=True)
  assert asked == [(6, 'cudnn'), (5, 'xla'), (5, 'xla')]
