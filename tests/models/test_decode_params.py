"""Parameters laid out for decoding: int8 weights, weights by output."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.models import dalle, decode_params
from tests import runs


def test_weights_in_eight_bits_are_off_by_half_a_step_at_most():
  x = jax.random.normal(jax.random.key(0), (3, 5, 4)) * jnp.arange(1.0, 5)
  kept = decode_params.to_int8(x, 1)
  assert kept.values.dtype == jnp.int8 and kept.scale.shape == (3, 1, 4)
  assert (jnp.abs(kept.astype(jnp.float32) - x) <= kept.scale * 0.5001).all()


def test_logits_with_int8_weights_are_close():
  model = dalle.build('test')
  text, image = jnp.ones((2, 6), jnp.int32), jnp.ones((2, 16), jnp.int32)
  params = runs.parameters(model.init, text, image)['params']
  small = decode_params.compute_params(params, jnp.float32, int8=True)
  kernel = small['blocks']['blocks']['block_0']['mlp_in']['kernel']
  assert isinstance(kernel, decode_params.Int8) and isinstance(small['image_head'], decode_params.Int8)
  run = jax.jit(lambda p: model.apply({'params': p}, text, image[:, :3], method='prefill')[0])
  full, close = run(params), run(small)
  assert 0 < jnp.abs(full - close).max() < 0.05 * jnp.abs(full).max()


def test_logits_with_weights_by_output_are_the_same():
  model = dalle.build('test')
  text, image = jnp.ones((2, 6), jnp.int32), jnp.arange(32).reshape(2, 16) % 16
  params = runs.parameters(model.init, text, image)['params']
  laid_out = decode_params.compute_params(params, jnp.float32, few_rows=True)
  attention = laid_out['blocks']['blocks']['block_0']['attention']
  assert all(isinstance(attention[name]['kernel'], decode_params.ByOutput) for name in ('query', 'out'))
  assert isinstance(laid_out['image_head'], decode_params.ByOutput)

  @jax.jit
  def run(params):
    logits, cache = model.apply({'params': decode_params.by_layer(params)}, text, image[:, :3], method='prefill')
    step = functools.partial(model.apply, {'params': decode_params.by_layer(params)}, method='step')
    return logits, step(image[:, 3], jnp.int32(3), cache.extend(5))[0]

  for ours, plain in zip(run(laid_out), run(params), strict=True):
    np.testing.assert_allclose(ours, plain, atol=1e-5)
