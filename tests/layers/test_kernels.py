"""Every way to compute attention is attention by the mask: in blocks, by cuDNN (faked), by splash (interpreted)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from dalle_jax.layers import kernels
from dalle_jax.layers.patterns import KINDS, Pattern
from dalle_jax.training import sharding


def qkv(n, heads=2, dtype=jnp.float32, batch=2):
  return jax.random.normal(jax.random.key(0), (3, batch, n, heads, 8), dtype)


def by_mask(q, k, v, pattern):
  return jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(pattern.mask(q.shape[1]))[None, None])


def both(run, pattern, n, **kwargs):
  """Values and gradients of `run` and of attention by the mask."""
  q, k, v = qkv(n, **kwargs)
  weigh = jax.random.normal(jax.random.key(1), q.shape)
  of = lambda f: jax.jit(jax.value_and_grad(lambda x: ((y := f(*x, pattern)) * weigh).sum() + 0 * y.sum()))((q, k, v))
  return of(run), of(by_mask)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('n', [3, 4, 9, 14, 15])  # the text alone, a token, parts of rows, all but the last token, all
def test_a_stream_is_attended_by_the_mask_of_its_pattern(kind, n):
  ours, expected = both(kernels.stream_attention, Pattern(kind, 3, (4, 3), 3), n)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=5e-5), ours, expected)


def test_long_streams_are_attended_in_blocks_of_queries(monkeypatch):
  monkeypatch.setattr(kernels, 'MAX_QUERIES', 5)
  for n in (8, 15):
    ours, expected = both(kernels.stream_attention, Pattern('full', 3, (4, 3)), n)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), ours, expected)


@pytest.mark.parametrize('kind', KINDS)
def test_splash_equals_the_mask(kind):
  run = functools.partial(kernels.splash_attention, interpret=True)
  ours, expected = both(run, Pattern(kind, 5, (13, 10), 3), 134, batch=1, heads=1)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-4), ours, expected)


def test_splash_is_split_over_batch_heads_and_sequence():
  pattern = Pattern('column', 5, (14, 10), 3)
  q, k, v = qkv(144)
  with sharding.use(dict(data=2, tensor=2, sequence=2), common.RULES):
    drawn = jax.jit(functools.partial(kernels.splash_attention, pattern=pattern, interpret=True))(q, k, v)
  np.testing.assert_allclose(drawn, by_mask(q, k, v, pattern), atol=2e-5)


def test_sparse_patterns_cost_less():
  """FLOPs that the compiler counts, at the sizes of the paper."""
  shape = jax.ShapeDtypeStruct((1, 1280, 2, 64), jnp.float32)

  def flops(kind):
    run = functools.partial(kernels.stream_attention, pattern=Pattern(kind, 257, (32, 32)))
    return jax.jit(run).lower(shape, shape, shape).cost_analysis()['flops']

  full = flops('full')
  assert flops('row') < full / 2 and flops('column') < full / 2 and flops('conv') < full * 0.6


def test_the_flash_kernel_gets_even_lengths_and_its_absence_is_one_line(monkeypatch):
  q, k, v = qkv(5, dtype=jnp.bfloat16)
  plain = kernels.fused_attention(q, k, v, 'auto', is_causal=True)
  for pattern in (Pattern('full', 2, (2, 2)), Pattern('row', 2, (2, 2))):
    with pytest.raises(ValueError, match='kernel "cudnn" is for NVIDIA GPUs'):
      kernels.stream_attention(q, k, v, pattern, 'cudnn')
  with pytest.raises(ValueError, match="kernel 'flash' is unknown"):
    kernels.fused_attention(q, k, v, 'flash')
  with pytest.raises(ValueError, match="kernel 'flash' is unknown"):
    kernels.stream_attention(q, k, v, Pattern('row', 2, (2, 2)), 'flash')
  with pytest.raises(ValueError, match='kernel "splash" is for TPUs, this is cpu'):
    kernels.stream_attention(q, k, v, Pattern('full', 2, (2, 2)), 'splash')
  asked, own = [], jax.nn.dot_product_attention

  def fake(q, k, v, mask, is_causal, implementation):
    asked.append((q.shape[1], mask is not None, implementation))
    return own(q, k, v, mask=mask, is_causal=is_causal)

  monkeypatch.setattr(kernels, 'capability', lambda: 9)
  monkeypatch.setattr(jax.nn, 'dot_product_attention', fake)
  found = kernels.fused_attention(q, k, v, 'auto', is_causal=True)
  np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (found, plain)), atol=2e-2)
  kernels.fused_attention(q, k, v, 'auto')  # without a mask the padding would be seen
  kernels.fused_attention(q, k, v, 'xla', is_causal=True)
  kernels.fused_attention(*(x.astype(jnp.float32) for x in (q, k, v)), 'auto', is_causal=True)
  with sharding.use(dict(data=4, sequence=2), common.RULES):  # it does not take queries apart from their keys
    kernels.fused_attention(q, k, v, 'auto', is_causal=True)
    with pytest.raises(ValueError, match=r'"cudnn" does not take bfloat16\[2, 5, 2, 8\] over 2 parts of a sequence'):
      kernels.fused_attention(q, k, v, 'cudnn', is_causal=True)
  assert asked == [(6, False, 'cudnn')]


@pytest.mark.parametrize('kind', ['row', 'column', 'conv', 'wrapped'])
def test_patterns_are_masks_of_the_flash_kernel(kind, monkeypatch):
  pattern, asked, own = Pattern(kind, 3, (4, 4), 3), [], jax.nn.dot_product_attention

  def fake(q, k, v, mask, is_causal, implementation):
    asked.append((mask.shape, is_causal, implementation))
    return own(q, k, v, mask=mask, is_causal=is_causal)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', fake)
  q, k, v = qkv(19, dtype=jnp.bfloat16)
  attend = lambda kernel='auto': np.asarray(kernels.stream_attention(q, k, v, pattern, kernel), np.float32)
  expected = attend()
  monkeypatch.setattr(kernels, 'capability', lambda: kernels.FLASH)  # it has no gradients through a mask
  np.testing.assert_array_equal(attend(), expected)
  assert not asked
  monkeypatch.setattr(kernels, 'capability', lambda: kernels.MASKED_FLASH)
  np.testing.assert_allclose(attend(), expected, atol=2e-2)
  np.testing.assert_array_equal(attend('xla'), expected)
  assert asked == [((1, 1, 20, 20), True, 'cudnn')]


@pytest.mark.parametrize(('blocks', 'own'), [((), False), ((3,), False), ((3,), True)])
def test_gradients_over_parts_are_those_of_one_softmax(blocks, own):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  q, goal = draw(2, *blocks, 5, 2, 4), draw(2, *blocks, 5, 2, 4)
  pairs = [draw(2, 2, *of, n, 4) for n, of in ((3, ()), (3, ()), (6, blocks * own), (6, blocks * own))]
  mask = jnp.asarray(np.tri(5, 6, 1, dtype=bool))

  def parts(q, k1, v1, k2, v2):
    return (kernels.attend(q, (k1, v1, None), (k2, v2, mask)) * goal).sum()

  def whole(q, *pairs):
    spread = lambda x: x if x.ndim == q.ndim else jnp.repeat(x[:, :, None], 3, 2)
    k1, v1, k2, v2 = (spread(x) for x in pairs)
    k, v = jnp.concatenate([k1, k2], -2), jnp.concatenate([v1, v2], -2)
    seen = jnp.concatenate([jnp.ones((5, 3), bool), mask], 1)
    scores = jnp.where(seen, jnp.einsum('b...thk,bh...nk->bh...tn', q, k) / 2, -jnp.inf)
    return (jnp.einsum('bh...tn,bh...nk->b...thk', jax.nn.softmax(scores, -1), v) * goal).sum()

  ours, theirs = (jax.jit(jax.value_and_grad(f, range(5)))(q, *pairs) for f in (parts, whole))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)
