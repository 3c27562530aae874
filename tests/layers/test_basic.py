import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.layers.basic import BatchNorm, Dense, Einsum, layer_norm, product, update_statistics


@pytest.mark.parametrize(('shapes', 'axes', 'eqn'), [
  (((2, 3, 4), (4, 5)), 1, 'BSD,DF->BSF'),
  (((2, 3, 4), (4, 2, 3)), 1, 'BSD,DHK->BSHK'),
  (((2, 3, 4, 2), (4, 2, 5)), 2, 'BSHK,HKD->BSD'),
])  # fmt: skip
def test_product_and_its_gradients_are_those_of_einsum(shapes, axes, eqn):
  x, kernel = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes))
  ours = lambda x, k: jnp.sin(product(x, k, axes)).sum()
  theirs = lambda x, k: jnp.sin(jnp.einsum(eqn, x, k)).sum()
  for a, b in zip(jax.grad(ours, (0, 1))(x, kernel), jax.grad(theirs, (0, 1))(x, kernel), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_given_parameter_of_another_shape_is_refused():
  layer, given = Dense(3, (None, None)), {'kernel': jnp.ones((4, 3)), 'bias': jnp.ones(3)}
  assert (layer.apply({'params': given}, jnp.ones((2, 4))) == 5).all()
  for name, shape in (('kernel', (3, 4)), ('bias', (1,))):
    with pytest.raises(flax.errors.ScopeParamShapeError, match=f'"{name}"'):
      layer.apply({'params': {**given, name: jnp.ones(shape)}}, jnp.ones((2, 4)))
  with pytest.raises(flax.errors.ScopeParamNotFoundError, match='"bias"'):
    layer.apply({'params': {'kernel': given['kernel']}}, jnp.ones((2, 4)))


def test_a_layer_that_is_used_twice_has_one_set_of_parameters_with_names_of_axes():
  class Twice(nn.Module):
    def setup(self):
      self.dense = Dense(4, ('embed', 'mlp'))

    def __call__(self, x):
      return self.dense(self.dense(x))

  kernel = Twice().init(jax.random.key(0), jnp.ones((2, 4)))['params']['dense']['kernel']
  assert kernel.names == ('embed', 'mlp') and kernel.value.shape == (4, 4)


def test_an_einsum_that_is_no_product_is_refused():
  with pytest.raises(ValueError, match='the last axes of the input must be the first ones of the kernel'):
    Einsum((3, 5), (None, None)).init(jax.random.key(0), 'BSD,SF->BDF', jnp.ones((2, 3, 4)))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_gradients_of_layer_norm_are_those_of_its_formula(dtype):
  draw = lambda i, *shape: 1 + 2 * jax.random.normal(jax.random.key(i), shape)
  x, scale, bias = draw(0, 2, 3, 8).astype(dtype), draw(1, 8), draw(2, 8)

  def formula(x, scale, bias):
    x = x.astype(jnp.float32)
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-3) * scale + bias

  ours = lambda *args: jnp.sin(layer_norm(*args, eps=1e-3)).sum()
  theirs = lambda *args: jnp.sin(formula(*args)).sum()
  for a, b in zip(*(jax.grad(f, (0, 1, 2))(x, scale, bias) for f in (ours, theirs)), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(
      a.astype(jnp.float32), b.astype(jnp.float32), rtol=2e-2 if dtype != jnp.float32 else 1e-5, atol=1e-5
    )


def test_batch_norm_goes_by_the_batch_in_training_and_by_what_followed_it_afterwards():
  norm, x = BatchNorm(eps=0.0), 3 + 2 * jax.random.normal(jax.random.key(0), (64, 5, 5, 4))
  params = norm.init(jax.random.key(0), x)['params']
  params = jax.tree.map(lambda p: p.value, params, is_leaf=lambda p: hasattr(p, 'value'))
  y, seen = norm.apply({'params': params}, x, True, mutable=['statistics'])
  np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-5)
  np.testing.assert_allclose(y.var((0, 1, 2)), 1, rtol=1e-4)
  np.testing.assert_allclose(norm.apply({'params': params}, x), x, rtol=1e-6)
  followed = update_statistics({'a': params, 'b': 0}, {'a': seen['statistics']}, 0.75)
  np.testing.assert_allclose(followed['a']['mean'], 0.25 * x.mean((0, 1, 2)), rtol=1e-5)
  np.testing.assert_allclose(followed['a']['var'], 0.75 + 0.25 * x.var((0, 1, 2)), rtol=1e-4)
  loss = lambda p, train: jnp.sin(norm.apply({'params': p}, x, train)).sum()
  for train in (False, True):
    grads = jax.grad(loss)(params, train)
    assert not grads['mean'].any() and not grads['var'].any() and grads['scale'].any()
