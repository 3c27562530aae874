"""Inception-v3: sizes as published, images of any size. Its numbers are compared in tests/convert/test_parity.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models import inception
from dalle_jax.training import sharding
from tests import runs


def test_it_has_as_many_parameters_as_published():
  shapes = jax.eval_shape(inception.build('fid').init, jax.random.key(0), jnp.zeros((1, 299, 299, 3)))
  moved = sum(x.size for k, x in sharding.flatten(sharding.unbox(shapes)).items() if k.endswith(('mean', 'var')))
  total = sum(x.size for x in jax.tree.leaves(shapes))
  assert total - moved == 23_834_568 - (2_048 + 1) * 1_000  # torchvision's without its second head, and its classes


def test_features_do_not_depend_on_the_size_or_the_rest_of_the_batch():
  model = inception.build('test')
  picture = np.tile(np.linspace(-1, 1, 150, dtype=np.float32)[:, None, None], (1, 150, 3))[None]
  params = runs.parameters(model.init, picture)['params']
  see = jax.jit(lambda x: model.apply({'params': params}, x))
  alone, larger = see(picture), see(np.asarray(jax.image.resize(picture, (1, 299, 299, 3), 'linear')))
  assert alone.shape == (1, 128) and (alone >= 0).all() and (alone > 0).any()
  np.testing.assert_allclose(larger, alone, rtol=1e-3, atol=1e-3 * float(alone.max()))
  np.testing.assert_allclose(
    see(np.concatenate([picture, -picture]))[:1], alone, rtol=1e-4, atol=1e-4 * float(alone.max())
  )


def test_an_unknown_variant_is_refused():
  with pytest.raises(ValueError, match='Inception has no variant'):
    inception.build('large')
