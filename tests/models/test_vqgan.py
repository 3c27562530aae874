"""VQGAN: shapes of every variant, codes and back, gradients, errors."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models import patchgan, vqgan
from tests import runs

SMALL = {'ch_mult': (1,), 'attn_resolutions': ()}
IMAGES = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3), minval=-1, maxval=1)


def init(model, images=IMAGES):
  return runs.parameters(model.init, images, scale=0.1)['params']


@pytest.mark.parametrize(
  ('variant', 'size', 'grid'),
  [('quickstart', 36, 9), ('small', 64, 8), ('f8_8192', 256, 32), ('f16_1024', 256, 16), ('f16_16384', 256, 16)],
)
def test_shapes_of_the_variants(variant, size, grid):
  model = vqgan.build(variant)
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  variables = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), images))
  assert model.grid(size) == (grid, grid)
  assert variables['params']['quantize']['embedding'].shape == (model.num_codes, model.code_dim)
  codes = jax.eval_shape(lambda v, x: model.apply(v, x, method='encode'), variables, images)
  assert codes.shape == (1, grid, grid) and codes.dtype == jnp.int32
  recon = jax.eval_shape(lambda v, c: model.apply(v, c, method='decode_codes'), variables, codes)
  assert recon.shape == images.shape and recon.dtype == jnp.float32


def test_the_public_models_have_the_public_numbers_of_parameters():
  """Blocks and parameters of the published f16 model, counted by hand from its architecture."""
  images = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
  model = vqgan.build('f16_1024')
  params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), images))['params']
  assert {k for k in params['encoder'] if 'attn' in k} == {'down_4_attn_0', 'down_4_attn_1', 'mid_attn_1'}
  assert {k for k in params['decoder'] if 'attn' in k} == {*(f'up_4_attn_{i}' for i in range(3)), 'mid_attn_1'}
  assert {k for k in params['encoder'] if 'sample' in k} == {f'down_{i}_downsample' for i in range(4)}
  assert {k for k in params['decoder'] if 'sample' in k} == {f'up_{i}_upsample' for i in range(1, 5)}
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  assert count(params['encoder']) == 29_298_176
  assert count([params['decoder'], params['conv_out']]) == 42_449_795


@pytest.mark.parametrize('fields', [{}, SMALL | {'patch': 2, 'quantizer': 'gumbel'}, SMALL | {'normalize_codes': True}])
def test_codes_lie_in_range_and_decode_to_the_reconstruction(fields):
  model = vqgan.build('test', **fields)
  way = functools.partial(model.apply, {'params': init(model)})

  @jax.jit
  def ways():
    out, codes = way(IMAGES), way(IMAGES, method='encode')
    return out, codes, way(codes, method='decode_codes'), way(out.features, method='to_pixels')

  out, codes, decoded, pixels = ways()
  assert codes.shape == (2, *model.grid(16)) and codes.min() >= 0 and codes.max() < model.num_codes
  np.testing.assert_array_equal(codes, out.quantized.codes)
  np.testing.assert_allclose(decoded, out.recon, atol=1e-4)
  np.testing.assert_allclose(pixels, out.recon, atol=1e-6)
  assert out.recon.shape == IMAGES.shape and out.recon.dtype == jnp.float32


@pytest.mark.parametrize('fields', [{}, SMALL | {'quantizer': 'gumbel'}])
def test_every_parameter_gets_a_gradient(fields):
  model = vqgan.build('test', **fields)

  def loss(params):
    out = model.apply({'params': params}, IMAGES, jax.random.key(0))
    return jnp.square(out.recon - IMAGES).mean() + sum(out.quantized.losses.values())

  grads = jax.jit(jax.grad(loss))(init(model))
  dead = [jax.tree_util.keystr(k) for k, g in jax.tree_util.tree_leaves_with_path(grads) if not g.any()]
  # A bias of the keys shifts all scores of a query alike, which softmax forgets.
  assert [k for k in dead if "['k']['bias']" not in k] == []


def test_half_precision_is_close():
  params = init(vqgan.build('test', **SMALL))
  full, half = (
    jax.jit(vqgan.build('test', **SMALL, dtype=d).apply)({'params': params}, IMAGES) for d in ('float32', 'bfloat16')
  )
  assert half.recon.dtype == half.quantized.inputs.dtype == jnp.float32 and half.features.dtype == jnp.bfloat16
  np.testing.assert_allclose(half.quantized.inputs, full.quantized.inputs, atol=0.1)


def test_other_sizes_and_shapes_that_the_factor_divides_work():
  model = vqgan.build('test')
  images = jnp.zeros((1, 8, 24, 3))
  encode = functools.partial(model.apply, {'params': init(model)}, method='encode')
  assert jax.eval_shape(encode, images).shape == (1, 4, 12)


def test_errors_name_what_is_possible():
  model = vqgan.build('quickstart')
  with pytest.raises(ValueError, match=r'divisible by 4, not 50; the nearest is 48'):
    model.grid(50)
  with pytest.raises(ValueError, match='divisible by 4, not 50'):
    jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 48, 50, 3), jnp.float32))
  with pytest.raises(ValueError, match=r'no variant .huge.; its variants are test, quickstart'):
    vqgan.build('huge')
  with pytest.raises(ValueError, match='no field chanels; its fields are image_size'):
    vqgan.build('test', chanels=3)
  for field in ('norm_groups', 'z_channels'):
    with pytest.raises(ValueError, match=rf'VQGAN.{field} is 0; expected 1 or more'):
      vqgan.build('test', **{field: 0})
  with pytest.raises(ValueError, match="dtype 'float16' is unknown"):
    vqgan.build('test', dtype='float16')
  with pytest.raises(ValueError, match="quantizer 'pq' is unknown; expected nearest or gumbel"):
    vqgan.build('test', quantizer='pq').init(jax.random.key(0), IMAGES)


def test_patchgan_has_a_receptive_field_of_70_pixels():
  model = patchgan.build('base', width=4)
  images = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
  params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), images))['params']
  assert jax.eval_shape(model.apply, {'params': params}, images).shape == (1, 30, 30)
  # GroupNorm has a global receptive field, so count that of the convolutions only.
  flat = {k: v for k, v in params.items() if 'norm' not in k}
  assert [v['kernel'].shape[0] for v in flat.values()] == [4] * 5
  field, jump = 1, 1
  for stride in (2, 2, 2, 1, 1):
    field, jump = field + 3 * jump, jump * stride
  assert field == 70


def test_a_patchgan_refuses_images_of_which_it_has_no_logits():
  shape = lambda side, **fields: (
    jax.eval_shape(
      patchgan.build('base', width=4, **fields).init_with_output, jax.random.key(0), jnp.zeros((1, side, side, 3))
    )[0].shape
  )
  assert shape(24) == (1, 1, 1) and shape(16, layers=2) == (1, 2, 2)
  with pytest.raises(ValueError, match='16 x 16 pixels are too small for a PatchGAN of 3 layers'):
    shape(16)


def test_with_tiles_a_code_depends_on_its_own_tile():
  model = vqgan.build('test', tile=8)
  params = init(model)
  encode = jax.jit(lambda images: model.apply({'params': params}, images, method='_encode'))
  other = IMAGES.at[:, :8, 8:].set(-IMAGES[:, :8, 8:])
  moved = np.abs(np.subtract(encode(other), encode(IMAGES))).max((0, 3)) > 1e-6
  np.testing.assert_array_equal(moved, np.kron([[0, 1], [0, 0]], np.ones((4, 4))))
  with pytest.raises(ValueError, match='tile 6 must divide 16 pixels'):
    init(vqgan.build('test', tile=6))
