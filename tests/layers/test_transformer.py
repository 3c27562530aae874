"""The stack: periods and rematerialisation change nothing, layers have their masks, errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.layers.transformer import Stack

X = jax.random.normal(jax.random.key(0), (2, 6, 8))
CAUSAL, ALL = np.tri(6, dtype=bool), np.ones((6, 6), bool)


def init(module):
  return nn.unbox(module.init(jax.random.key(1), X))['params']


def test_period_and_remat_change_no_value_and_no_gradient():
  params = init(Stack(4, 2))
  blocks = params['blocks']['block_0']
  halves = {f'block_{i}': jax.tree.map(lambda x, i=i: x[i::2], blocks) for i in range(2)}
  loss = lambda module: jax.jit(
    jax.value_and_grad(lambda p: jnp.square(module.apply({'params': p}, X, CAUSAL[None])[0]).sum())
  )
  value, grads = loss(Stack(4, 2))(params)
  for module in (Stack(4, 2, remat='full'), Stack(4, 2, remat='dots')):
    other, other_grads = loss(module)(params)
    np.testing.assert_allclose(other, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), grads, other_grads)
  other, _ = loss(Stack(4, 2, period=2))({'blocks': halves})
  np.testing.assert_allclose(other, value, rtol=1e-5)


def test_each_layer_has_the_mask_of_its_kind():
  params = init(Stack(2, 2))
  run = lambda kinds, x=X: Stack(2, 2).apply({'params': params}, x, np.stack([CAUSAL, ALL]), kinds)[0]
  later = X.at[:, 5].set(-X[:, 5])
  moved = lambda kinds: bool(jnp.abs(run(kinds, later) - run(kinds))[:, :5].max() > 1e-6)
  assert not moved([0, 0]) and moved([1, 0]) and moved([0, 1])
  assert not np.allclose(run([1, 0]), run([0, 1]))


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(heads=3), 'width of 8 is not divisible by 3 heads'),
    (dict(period=3), '4 layers are not divisible by the period 3'),
    (dict(remat='half'), "remat 'half' is unknown; there are none, full, dots"),
    (dict(activation='swish'), "activation 'swish' is unknown; there are gelu"),
  ],
)
def test_errors(fields, message):
  with pytest.raises(ValueError, match=message):
    init(Stack(**{'depth': 4, 'heads': 2, **fields}))
