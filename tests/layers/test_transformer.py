"""The stack: periods and rematerialisation change nothing, layers see by their patterns, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from dalle_jax.aot import costs
from dalle_jax.layers import kernels
from dalle_jax.layers.attention import Stream
from dalle_jax.layers.patterns import Pattern
from dalle_jax.layers.transformer import ACTIVATIONS, Stack
from tests import runs

X = jax.random.normal(jax.random.key(0), (2, 6, 8))
CAUSAL = np.tri(6, dtype=bool)


def init(module):
  return runs.parameters(module.init, X)['params']


def test_period_and_remat_change_no_value_and_no_gradient():
  params = init(Stack(4, 2))
  blocks = params['blocks']['block_0']
  halves = {f'block_{i}': jax.tree.map(lambda x, i=i: x[i::2], blocks) for i in range(2)}
  loss = lambda module: jax.jit(
    jax.value_and_grad(lambda p: jnp.square(module.apply({'params': p}, X, CAUSAL)[0]).sum())
  )
  value, grads = loss(Stack(4, 2))(params)
  for module in (Stack(4, 2, remat='full'), Stack(4, 2, remat='dots')):
    other, other_grads = loss(module)(params)
    np.testing.assert_allclose(other, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), grads, other_grads)
  other, _ = loss(Stack(4, 2, period=2))({'blocks': halves})
  np.testing.assert_allclose(other, value, rtol=1e-5)


def kept(stack, x, stream, kinds=None):
  """Shapes of what a scan over layers keeps for the backward pass, beside its result."""
  params = runs.parameters(stack.init, x)['params']
  run = lambda params: stack.apply({'params': params}, x, None, stream, kinds)[0].sum()
  program = jax.make_jaxpr(jax.grad(run))(params)
  forward = next(e for e in program.eqns if e.primitive.name == 'scan')
  return [v.aval.shape for v in forward.outvars[1:]]


def test_a_scanned_layer_keeps_no_slopes_statistics_or_scores():
  x, stream = jnp.zeros((1, 512, 16)), Stream((Pattern('full', 2, (16, 32)),))
  every = kept(Stack(2, 2), x, stream)
  wide = [shape for shape in every if shape[-1] == 4 * 16]
  assert 1 <= len(wide) <= 2, wide  # of the MLP what goes into its activation, and what comes out
  assert not [shape for shape in every if shape[-1] == 1 and shape[-2] == 512], every  # of norms
  assert not [shape for shape in every if sum(size > 64 for size in shape) > 1], every  # queries by keys


def test_dots_keep_what_attention_finds_and_full_the_input_of_a_layer():
  x, stream = jnp.zeros((1, 512, 16)), Stream((Pattern('full', 2, (16, 32)),))
  dots = kept(Stack(2, 2, remat='dots'), x, stream)
  assert dots.count((2, 1, 256, 2, 8)) == dots.count((2, 1, 2, 256, 1)) == 2, dots  # of each half of the queries
  patterns = Stream((Pattern('row', 2, (16, 32)), Pattern('column', 2, (16, 32))))
  assert (2, 1, 512, 2, 8) in kept(Stack(2, 2, remat='dots'), x, patterns, kinds=(0, 1))
  assert kept(Stack(2, 2, remat='full'), x, stream) == [(2, 1, 512, 16)]


@pytest.mark.parametrize('unroll', [2, 3])
def test_remat_computes_again_where_layers_are_no_loop(unroll):
  """Neither where all are compiled one after the other, nor where some are left over."""
  params = init(Stack(3, 2))

  def flops(remat):
    stack = Stack(3, 2, remat=remat, unroll=unroll)
    grads = jax.jit(jax.grad(lambda params: (stack.apply({'params': params}, X)[0] ** 2).sum()))
    return sum(r.times * r.flops for r in costs.regions(grads.lower(params).compile().as_text(), 1))

  assert flops('full') > 1.2 * flops('none')


def test_gelu_is_exact_in_float32_and_rounds_once_in_bfloat16():
  x = jnp.linspace(-6, 6, 1001)
  gelu_by_erfc = functools.partial(jax.nn.gelu, approximate=False)
  np.testing.assert_allclose(ACTIVATIONS['gelu'](x), gelu_by_erfc(x), atol=1e-6)
  np.testing.assert_allclose(jax.vmap(jax.grad(ACTIVATIONS['gelu']))(x), jax.vmap(jax.grad(gelu_by_erfc))(x), atol=1e-6)
  half = x.astype(jnp.bfloat16)
  expected = gelu_by_erfc(half.astype(jnp.float32)).astype(jnp.bfloat16)
  np.testing.assert_allclose(ACTIVATIONS['gelu'](half), expected, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize('period', [1, 2])
def test_each_layer_sees_by_the_pattern_of_its_kind(period):
  stream = Stream((Pattern('full', 2, (2, 2)), Pattern('column', 2, (2, 2))))
  stack = Stack(2, 2, period=period)
  params = init(stack)
  run = jax.jit(lambda kinds, x: stack.apply({'params': params}, x, None, stream, kinds)[0], static_argnums=0)
  other = X.at[:, 2].set(-X[:, 2])  # the token at the left of the last one's row above
  moved = lambda *kinds: np.abs(run(kinds, other) - run(kinds, X))[:, 5].max() > 1e-6
  assert moved(0, 0) and moved(0, 1) and moved(1, 0) and not moved(1, 1)
  assert not np.allclose(run((1, 0), X), run((0, 1), X))


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


@pytest.mark.parametrize('kernel', ['cudnn', 'splash'])
def test_dots_keep_what_the_backward_pass_of_a_kernel_reads(kernel, monkeypatch):
  """Else its forward pass would run again. The program is for a GPU or a TPU: it is traced here, not compiled."""
  if kernel == 'cudnn':
    monkeypatch.setattr(kernels, 'capability', lambda: 9)
    monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91_100)
  else:
    monkeypatch.setattr(kernels, 'platform', lambda: 'tpu')
  x, stream = jnp.zeros((1, 512, 16), jnp.bfloat16), Stream((Pattern('full', 2, (16, 32)),))
  stack = functools.partial(Stack, 2, 2, dtype=jnp.bfloat16, kernel=kernel)
  dots = kept(stack(remat='dots'), x, stream)
  found = (2, 1, 512, 2, 8) if kernel == 'cudnn' else (2, 1, 2, 512, 8)
  assert dots.count(found) == dots.count((2, 1, 2, 512)) == 1, dots  # and the logarithm of the sum of each query
  assert kept(stack(remat='full'), x, stream) == [(2, 1, 512, 16)]
