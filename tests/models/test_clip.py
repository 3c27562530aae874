"""CLIP: unit embeddings, causal and full text attention, gradients, errors."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models import clip
from tests import runs

IMAGES = jax.random.uniform(jax.random.key(0), (3, 16, 16, 3), minval=-1, maxval=1)
TEXT = jax.random.randint(jax.random.key(1), (3, 8), 0, 40)


def init(model):
  return runs.parameters(model.init, IMAGES, TEXT)['params']


def fresh(model):
  return nn.unbox(jax.jit(model.init)(jax.random.key(2), IMAGES, TEXT)['params'])


def encode_text(text, **fields):
  model = clip.build('test', **fields)
  return jax.jit(functools.partial(model.apply, {'params': init(model)}, method='encode_text'))(text)


def test_embeddings_have_unit_length():
  model = clip.build('test')
  params = init(model) | {'logit_scale': jnp.log(1 / 0.07)}
  apply = jax.jit(model.apply, static_argnames='method')
  a, b, scale = apply({'params': params}, IMAGES, TEXT)
  assert a.shape == b.shape == (3, 16) and a.dtype == b.dtype == jnp.float32
  np.testing.assert_allclose(np.linalg.norm([a, b], axis=-1), 1.0, rtol=1e-5)
  np.testing.assert_allclose(scale, 1 / 0.07, rtol=1e-5)
  np.testing.assert_allclose(apply({'params': params}, IMAGES, method='encode_image'), a, rtol=1e-5)


@pytest.mark.parametrize('causal', [True, False])
def test_text_pooling_and_causal_attention(causal):
  end = TEXT.at[:, 4].set(39).at[:, 5:].set(0)  # the highest id is at 4
  later, earlier = end.at[:, 6].set(7), end.at[:, 1].set((end[:, 1] + 1) % 39)
  fields = dict(text_causal=causal, text_pool='max_id')
  base = encode_text(end, **fields)
  assert np.allclose(encode_text(later, **fields), base, atol=1e-6) == causal
  assert not np.allclose(encode_text(earlier, **fields), base, atol=1e-4)
  assert not np.allclose(encode_text(later, text_causal=causal), encode_text(end, text_causal=causal), atol=1e-4)


def test_image_pooling():
  """When the halves of an image trade places, a fresh projection of all patches changes, a class token hardly does."""
  shapes = {
    pool: jax.tree.map(jnp.shape, init(clip.build('test', image_pool=pool))['image']) for pool in ('class', 'all')
  }
  assert shapes['class']['positions'] == (5, 16) and shapes['class']['proj']['kernel'] == (16, 16)
  assert shapes['all']['positions'] == (4, 16) and shapes['all']['proj']['kernel'] == (64, 16)
  assert 'class_token' in shapes['class'] and 'class_token' not in shapes['all']
  rolled, change = jnp.roll(IMAGES, 8, axis=2), {}
  for pool in shapes:
    model = clip.build('test', image_pool=pool)
    params = fresh(model)
    assert float(params['logit_scale']) == pytest.approx(np.log(1 / 0.07))
    encode = jax.jit(functools.partial(model.apply, {'params': params}, method='encode_image'))
    a, b = (encode(x) for x in (IMAGES, rolled))
    change[pool] = float(jnp.abs(a - b).mean())
  assert change['all'] > 5 * change['class']


@pytest.mark.parametrize(('activation', 'pool'), [('gelu', 'class'), ('quick_gelu', 'all')])
def test_every_parameter_gets_a_gradient(activation, pool):
  model = clip.build('test', activation=activation, image_pool=pool)

  def loss(params):
    a, b, scale = model.apply({'params': params}, IMAGES, TEXT)
    return scale * (a * b.at[0].multiply(3.0)).sum()

  grads = jax.jit(jax.grad(loss))(init(model))
  dead = [jax.tree_util.keystr(k) for k, g in jax.tree_util.tree_leaves_with_path(grads) if not g.any()]
  assert dead == []


def test_half_precision_is_close():
  params = init(clip.build('test'))
  of = lambda dtype: jax.jit(clip.build('test', dtype=dtype).apply)({'params': params}, IMAGES, TEXT)
  full, half = of('float32'), of('bfloat16')
  for a, b in zip(full[:2], half[:2], strict=True):
    assert b.dtype == jnp.float32
    np.testing.assert_allclose(a, b, atol=0.05)


def test_the_published_size():
  model = clip.build('vit_b32')
  images, text = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32), jax.ShapeDtypeStruct((1, 77), jnp.int32)
  params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), images, text)['params'])
  assert sum(x.size for x in jax.tree.leaves(params)) == 151_277_313  # of the OpenAI checkpoint ViT-B/32


def test_errors():
  model = clip.build('test')
  with pytest.raises(ValueError, match='images of 16 pixels a side'):
    runs.parameters(model.init, jnp.zeros((1, 24, 24, 3)), TEXT)
  with pytest.raises(ValueError, match='8 text tokens, not 7'):
    runs.parameters(model.init, IMAGES, TEXT[:, :7])
  with pytest.raises(ValueError, match="image_pool 'mean' is unknown; expected class or all"):
    init(clip.build('test', image_pool='mean'))
  with pytest.raises(ValueError, match='patch 6 does not divide the image size 16'):
    init(clip.build('test', patch=6))
  with pytest.raises(ValueError, match="text_pool 'mean' is unknown; expected last, max_id or end"):
    init(clip.build('test', text_pool='mean'))
  with pytest.raises(ValueError, match='text_pool "end" needs the id of the end of text'):
    init(clip.build('test', text_pool='end'))
  with pytest.raises(ValueError, match='a width of 16 is not divisible by 3 heads'):
    init(clip.build('test', heads=3))
  with pytest.raises(ValueError, match="activation 'swish' is unknown; there are gelu, gelu_tanh, quick_gelu, relu"):
    init(clip.build('test', activation='swish'))
