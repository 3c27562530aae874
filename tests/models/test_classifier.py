"""The classifier: logits, features, gradients, building it from a run's config, errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models import classifier
from tests import runs

IMAGES = jax.random.uniform(jax.random.key(0), (3, 16, 16, 3), minval=-1, maxval=1)


def init(model, images=IMAGES):
  return runs.parameters(model.init, images)['params']


@pytest.mark.parametrize('pool', ['all', 'class'])
def test_logits_are_of_the_features_and_every_parameter_gets_a_gradient(pool):
  model = classifier.build('test', labels=5, image_pool=pool)
  params = init(model)
  apply = jax.jit(model.apply, static_argnames='method')
  logits, features = (apply({'params': params}, IMAGES, method=way) for way in (None, 'features'))
  assert logits.shape == (3, 5) and features.shape == (3, 8) and logits.dtype == features.dtype == jnp.float32
  head = params['head']
  np.testing.assert_allclose(logits, nn.gelu(features) @ head['kernel'] + head['bias'], atol=1e-5)
  loss = lambda p: jnp.square(model.apply({'params': p}, IMAGES) - jnp.arange(5)).sum()
  grads = jax.jit(jax.grad(loss))(params)
  dead = [jax.tree_util.keystr(k) for k, g in jax.tree_util.tree_leaves_with_path(grads) if not g.any()]
  assert dead == []


def test_the_network_of_a_run_is_in_its_config():
  config = {'model': {'variant': 'test', 'labels': 7, 'patch': 6}, 'data': {'image_size': 24}}
  model = classifier.of_run(config)
  assert (model.labels, model.image_size, model.patch, model.width) == (7, 24, 6, 16)


@pytest.mark.parametrize('variant', classifier.VARIANTS)
def test_every_variant_builds(variant):
  model = classifier.build(variant, labels=9)
  size = model.image_size
  shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
  assert nn.unbox(shapes['params'])['head']['kernel'].shape == (model.embed_dim, 9)


def test_errors():
  with pytest.raises(ValueError, match=r'takes images \[B, 16, 16, 3\], not \[1, 24, 24, 3\]; resize'):
    init(classifier.build('test', labels=2), jnp.zeros((1, 24, 24, 3)))
  with pytest.raises(ValueError, match=r'labels is 0; set config.model.labels'):
    init(classifier.build('test'))
  with pytest.raises(ValueError, match='patch 6 does not divide the image size 16'):
    init(classifier.build('test', labels=2, patch=6))
  with pytest.raises(ValueError, match="Classifier has no variant 'tiny'"):
    classifier.build('tiny')
