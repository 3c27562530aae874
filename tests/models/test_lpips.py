"""LPIPS: a distance, its weights from files, errors."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.models import lpips

A = jax.random.uniform(jax.random.key(0), (3, 8, 8, 3), minval=-1, maxval=1)
B = jax.random.uniform(jax.random.key(1), (3, 8, 8, 3), minval=-1, maxval=1)
MODEL = lpips.build('test')


def params():
  return nn.unbox(jax.jit(MODEL.init)(jax.random.key(2), A, B)['params'])


def test_a_distance_of_each_pair():
  distance = jax.jit(functools.partial(MODEL.apply, {'params': params()}))
  assert (distance(A, B) > 0).all() and distance(A, B).shape == (3,)
  np.testing.assert_allclose(distance(A, A), 0.0, atol=1e-7)
  np.testing.assert_allclose(distance(A, B), distance(B, A), rtol=1e-5)
  np.testing.assert_allclose(distance(A[1:2], B[1:2]), distance(A, B)[1:2], rtol=1e-5)
  assert jnp.isfinite(jax.jit(jax.grad(lambda a: distance(a, A).sum()))(A)).all()  # where the distance is 0


def test_the_equation_by_hand():
  p = params()
  scaled = [(x - np.asarray(lpips.MEAN)) / np.asarray(lpips.STD) for x in (A, B)]
  total = 0.0
  for stage in range(2):
    if stage:
      scaled = [np.asarray(x).reshape(3, 4, 2, 4, 2, 4).max((2, 4)) for x in scaled]
    conv = lambda x, k=f'conv_{stage}_0': jax.nn.relu(nn.Conv(4, (3, 3)).apply({'params': p[k]}, x))
    scaled = [conv(x) for x in scaled]
    unit = [x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-10) for x in scaled]
    total += (np.square(unit[0] - unit[1]) * np.asarray(p[f'lin_{stage}'])).sum(-1).mean((1, 2))
  np.testing.assert_allclose(MODEL.apply({'params': p}, A, B), total, rtol=1e-4)


def test_vgg16_has_its_layers():
  x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  p = nn.unbox(jax.eval_shape(lpips.build('vgg16').init, jax.random.key(0), x, x)['params'])
  assert sum(v.size for k, v in p.items() if k.startswith('lin')) == 1472
  convs = {k: v for k, v in p.items() if k.startswith('conv')}
  assert len(convs) == 13 and sum(x.size for x in jax.tree.leaves(convs)) == 14_714_688
