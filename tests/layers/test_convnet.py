"""Convolutional blocks: shapes, padding, attention by hand."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.layers import basic, convnet
from tests import runs

X = jax.random.normal(jax.random.key(0), (2, 4, 6, 8))


def init(module, x=X):
  return runs.parameters(module.init, x)['params']


@pytest.mark.parametrize(
  ('module', 'shape', 'names'),
  [
    (convnet.ResBlock(8), (2, 4, 6, 8), {'norm1', 'conv1', 'norm2', 'conv2'}),
    (convnet.ResBlock(4), (2, 4, 6, 4), {'norm1', 'conv1', 'norm2', 'conv2', 'nin_shortcut'}),
    (convnet.AttnBlock(), (2, 4, 6, 8), {'norm', 'q', 'k', 'v', 'proj_out'}),
    (convnet.Downsample(), (2, 2, 3, 8), {'conv'}),
    (convnet.Upsample(), (2, 8, 12, 8), {'conv'}),
  ],
)
def test_shapes_names_and_gradients(module, shape, names):
  params = init(module)
  assert set(params) == names

  @jax.jit
  def everything(params):
    full = lambda p: module.apply({'params': p}, X)
    grads = jax.grad(lambda p: (full(p) ** 2).sum())(params)
    return full(params), grads, module.clone(dtype=jnp.bfloat16).apply({'params': params}, X.astype(jnp.bfloat16))

  full, grads, half = jax.device_get(everything(params))
  assert full.shape == shape and half.dtype == jnp.bfloat16
  assert all(g.any() for g in jax.tree.leaves(grads))
  np.testing.assert_allclose(half.astype(np.float32), full, atol=0.1, rtol=0.1)


def test_downsample_pads_at_the_bottom_and_the_right():
  params = {'conv': {'kernel': jnp.zeros((3, 3, 1, 1)).at[0, 0].set(1.0), 'bias': jnp.zeros(1)}}
  x = jnp.arange(16.0).reshape(1, 4, 4, 1)
  y = convnet.Downsample().apply({'params': params}, x)
  np.testing.assert_array_equal(y[0, ..., 0], [[0, 2], [8, 10]])
  params['conv']['kernel'] = jnp.zeros((3, 3, 1, 1)).at[2, 2].set(1.0)
  y = convnet.Downsample().apply({'params': params}, x)
  np.testing.assert_array_equal(y[0, ..., 0], [[10, 0], [0, 0]])


def test_attention_weighs_all_positions():
  params = init(convnet.AttnBlock())
  y = np.asarray(nn.GroupNorm(8, epsilon=1e-6).apply({'params': params['norm']}, X)).reshape(2, 24, 8)
  dense = lambda name, y: y @ np.asarray(params[name]['kernel'])[0, 0] + np.asarray(params[name]['bias'])
  scores = np.einsum('bqc,bkc->bqk', dense('q', y), dense('k', y)) / np.sqrt(8)
  weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
  expected = X + dense('proj_out', np.einsum('bqk,bkc->bqc', weights, dense('v', y))).reshape(X.shape)
  np.testing.assert_allclose(jax.jit(convnet.AttnBlock().apply)({'params': params}, X), expected, atol=1e-5)


def test_space_to_depth_moves_squares_and_back():
  y = convnet.space_to_depth(X, 2)
  assert y.shape == (2, 2, 3, 32)
  np.testing.assert_array_equal(y[1, 1, 2], X[1, 2:4, 4:6].ravel())
  np.testing.assert_array_equal(convnet.depth_to_space(y, 2), X)


@pytest.mark.parametrize('shape', [(3, 1, 1, 5), (3, 2, 4, 5), (2, 5, 3, 5)])
def test_convolution_of_a_doubled_map(shape):
  x, conv = jax.random.normal(jax.random.key(0), shape), basic.Conv(7, upsample=True)
  params = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), init(conv, x))
  fused = lambda x, params: conv.apply({'params': params}, x)
  plain = lambda x, params: basic.Conv(7).apply({'params': params}, convnet.upsample_nearest(x))
  given = jax.random.normal(jax.random.key(2), plain(x, params).shape)
  np.testing.assert_allclose(fused(x, params), plain(x, params), atol=1e-4)
  grads = lambda f: jax.jit(jax.grad(lambda *a: (f(*a) * given).sum(), (0, 1)))(x, params)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-3), grads(fused), grads(plain))


def test_convolutions_that_do_not_double():
  with pytest.raises(ValueError, match='3 x 3, stride 1, SAME'):
    init(basic.Conv(7, 5, upsample=True))


@pytest.mark.parametrize('kernel', [1, 3, 5])
def test_convolution_as_a_product(kernel):
  x = jax.random.normal(jax.random.key(0), (3, 2, 4, 5))
  weights = jax.random.normal(jax.random.key(1), (kernel, kernel, 5, 7))
  numbers = ('NHWC', 'HWIO', 'NHWC')
  expected = jax.lax.conv_general_dilated(x, weights, (1, 1), 'SAME', dimension_numbers=numbers)
  np.testing.assert_allclose(basic.conv_as_product(x, weights), expected, atol=1e-4)
