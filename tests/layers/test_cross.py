"""Retro-fitted cross-attention: nothing at the start, then every attending position and no other; cached as taught."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.layers.cross import CrossAttention, cross_attend
from dalle_jax.layers.transformer import Stack
from dalle_jax.models import dalle
from tests import runs

TEXT = jax.random.randint(jax.random.key(0), (2, 6), 0, 40)
IMAGE = jax.random.randint(jax.random.key(1), (2, 16), 0, 16)
SOURCE = jax.random.normal(jax.random.key(2), (2, 5, 16))
EXTRA = jax.random.normal(jax.random.key(3), (2, 3, 16))


def models(layers=4, **fields):
  """apply of a DALL-E, the cross-attention module, its parameters; none of them is fresh."""
  model, cross = dalle.build('test', **fields), CrossAttention(layers, 2)
  params = runs.parameters(model.init, TEXT, IMAGE)['params']
  return jax.jit(functools.partial(model.apply, {'params': params}), static_argnames='method'), cross, grown(cross)


def grown(cross, source=SOURCE):
  return runs.parameters(cross.init, source)


def test_the_first_step_is_the_pretrained_model_to_the_bit():
  apply, cross, _ = models()
  fresh = nn.unbox(jax.jit(cross.init)(jax.random.key(6), SOURCE))
  for a, b in zip(apply(TEXT, IMAGE), apply(TEXT, IMAGE, context=cross.apply(fresh, SOURCE)), strict=True):
    np.testing.assert_array_equal(a, b)


def test_only_positions_that_predict_image_tokens_look_each_at_its_own_source():
  apply, cross, params = models()
  context = cross.apply(params, SOURCE)
  (text, image), (plain_text, plain_image) = apply(TEXT, IMAGE, context=context), apply(TEXT, IMAGE)
  np.testing.assert_array_equal(text, plain_text)
  assert (np.abs(image - plain_image).max((0, 2)) > 1e-3).all()  # from the first image token to the last
  other = cross.apply(params, SOURCE.at[1].multiply(-1))
  changed = np.abs(apply(TEXT, IMAGE, context=other)[1] - image).max(2) > 1e-3
  assert not changed[0].any() and changed[1].all()
  swapped = apply(TEXT[::-1], IMAGE[::-1], context=cross.apply(params, SOURCE[::-1]))
  np.testing.assert_allclose(swapped[1][::-1], image, atol=1e-5)


@pytest.mark.parametrize(
  ('fields', 'extra'),
  [
    (dict(layers=4), EXTRA),
    (dict(layers=2, period=2, attention='row,column'), None),
    (dict(layers=1, period=4), EXTRA),
  ],
)
def test_cached_logits_are_the_teacher_forced_ones(fields, extra):
  apply, cross, params = models(**fields)
  context = cross.apply(params, SOURCE)
  each = context.layers()
  _, expected = jax.jit(lambda: apply(TEXT, IMAGE, extra, context))()

  @jax.jit
  def cached():
    first, cache = apply(TEXT, IMAGE[:, :3], extra, each, method='prefill')
    step = lambda cache, i: apply(IMAGE[:, i], i, cache, each, method='step')[::-1]
    return first, jax.lax.scan(step, cache.extend(12), jnp.arange(3, 15))[1]

  first, rest = cached()
  np.testing.assert_allclose(first, expected[:, 3], atol=1e-4)
  for i, logits in enumerate(rest, 4):
    np.testing.assert_allclose(logits, expected[:, i], atol=1e-4, err_msg=f'token {i}')


@pytest.mark.parametrize(('layers', 'period', 'spreads'), [(1, 4, False), (2, 2, True), (2, 4, True), (4, 1, True)])
def test_the_last_layer_of_each_stretch_looks_and_no_other(layers, period, spreads):
  """What one position finds reaches the others by a later layer's attention: not if the last layer alone looks."""
  stack, cross = Stack(4, 2, period=period), CrossAttention(layers, 2)
  x = jax.random.normal(jax.random.key(8), (2, 6, 16))
  params = runs.parameters(stack.init, x)
  context = cross.apply(grown(cross), SOURCE)
  run = jax.jit(lambda **kwargs: stack.apply(params, x, **kwargs)[0])
  moved = np.abs(np.subtract(run(context=context, attending=np.arange(6) == 2), run())).max((0, 2)) > 1e-5
  assert moved[2] and moved.all() == spreads and (spreads or moved.sum() == 1)


def test_a_scan_that_does_not_hold_whole_stretches_is_refused():
  with pytest.raises(ValueError, match=r'1 layers with cross-attention do not fit 4 steps.*model.period'):
    one, cross, params = models(layers=1)
    one(TEXT, IMAGE, context=cross.apply(params, SOURCE))


def test_look_is_attention():
  cross = CrossAttention(1, 2)
  context = cross.apply(grown(cross), SOURCE).layers()[0]
  x = jax.random.normal(jax.random.key(7), (2, 3, 16))
  y = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * context.scale + context.bias
  q = jnp.einsum('btd,dhk->bthk', y, context.query) + context.query_bias
  weights = jax.nn.softmax(jnp.einsum('bthk,bhck->bhtc', q, context.k) / np.sqrt(8), -1)
  found = jnp.einsum('bhtc,bhck,hkd->btd', weights, context.v, context.out) + context.out_bias
  where = np.array([False, True, True])
  np.testing.assert_allclose(cross_attend(x, context, where), x + found * where[:, None], atol=1e-4)


def test_every_parameter_gets_a_gradient():
  apply, cross, params = models()
  loss = lambda p, x: jnp.square(apply(TEXT, IMAGE, context=cross.apply(p, x))[1]).sum()
  grads = jax.jit(jax.grad(loss, (0, 1)))(params, SOURCE)
  dead = [jax.tree_util.keystr(k) for k, g in jax.tree_util.tree_leaves_with_path(grads) if not g.any()]
  assert [k for k in dead if 'key_bias' not in k] == []  # a bias of the keys shifts all scores of a query alike


def test_rows_of_a_source_share_it():
  cross = CrossAttention(1, 2)
  x, where = jax.random.normal(jax.random.key(7), (6, 3, 16)), np.ones(3, bool)
  params = grown(cross)
  shared = cross.apply(params, SOURCE).layers()[0]
  each = cross.apply(params, jnp.repeat(SOURCE, 3, axis=0)).layers()[0]
  np.testing.assert_allclose(cross_attend(x, shared, where), cross_attend(x, each, where), atol=1e-5)


def test_frames_of_one_story_get_the_gradients_of_float32():
  """In bfloat16 at a size at which XLA read beyond the end of keys that were repeated for four frames."""
  width, where = 48, np.ones(304, bool)
  x, source, goal = (
    jax.random.normal(jax.random.key(i), shape)
    for i, shape in enumerate([(4, 304, width), (1, 256, width), (4, 304, width)])
  )
  params = grown(CrossAttention(1, 4), source)

  def gradients(dtype):
    def loss(params, x):
      context = CrossAttention(1, 4, dtype).apply(params, source.astype(dtype)).layers()[0]
      return (cross_attend(x.astype(dtype), context, where).astype(jnp.float32) * goal).sum()

    return jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss, (0, 1)))(params, x))

  for (path, ours), (_, exact) in zip(gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
    if 'key_bias' not in (name := jax.tree_util.keystr(path)):  # that has none
      np.testing.assert_allclose(ours, exact, atol=0.05 * np.abs(exact).max(), err_msg=name)
