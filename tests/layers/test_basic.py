import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.layers.basic import Einsum, product


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


def test_an_einsum_that_is_no_product_is_refused():
  with pytest.raises(ValueError, match='the last axes of the input must be the first ones of the kernel'):
    Einsum((3, 5), (None, None)).init(jax.random.key(0), 'BSD,SF->BDF', jnp.ones((2, 3, 4)))
