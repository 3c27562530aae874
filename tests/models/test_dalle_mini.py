"""Properties of DALL-E mini: cached = teacher-forced, causal, padding is not read, gradients everywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.functional import decoding
from dalle_jax.layers import attention
from dalle_jax.models import dalle_mini, decode_params
from dalle_jax.training import sharding
from tests import runs

TEXT = jnp.array([[0, 5, 7, 9, 3, 2], [0, 8, 2, 1, 1, 1]])  # the second one is padded
IMAGE = jax.random.randint(jax.random.key(1), (2, 16), 0, 16)
MODEL = dalle_mini.build('test')


@functools.cache
def init():
  """Larger parameters than at the start of training, so that attention is not flat and masks matter."""
  return runs.parameters(MODEL.init, TEXT, IMAGE)['params']


def bind(model, params=None):
  return functools.partial(model.apply, {'params': params or init()})


def test_cached_logits_are_the_teacher_forced_ones():
  expected = forward(TEXT, IMAGE)
  apply = bind(MODEL, decode_params.by_layer(decode_params.compute_params(init(), jnp.float32, few_rows=True)))
  step = jax.jit(lambda token, i, cache: apply(token, i, cache, method='step'))
  for start in (0, 5):  # image rows may be given
    logits, cache = jax.jit(lambda image: apply(TEXT, image, method='prefill'))(IMAGE[:, :start])
    np.testing.assert_allclose(logits, expected[:, start], atol=1e-4)
    cache = cache.extend(15 - start)
    for i in range(start, 15):
      logits, cache = step(IMAGE[:, i], jnp.int32(i), cache)
      np.testing.assert_allclose(logits, expected[:, i + 1], atol=1e-4, err_msg=f'token {i + 1}')


forward = jax.jit(lambda text, image: bind(MODEL)(text, image))


@pytest.mark.parametrize('guidance, copies', [(1.0, 1), (3.0, 2)])
def test_sampling_is_teacher_forcing(guidance, copies, monkeypatch):
  """Greedy codes of several candidates for each caption are the argmax of the (guided) teacher-forced logits."""
  monkeypatch.setattr(attention.KVCache, 'copies', copies)
  options = dict(empty=MODEL.padding, length=16, n=2, sampling=decoding.Sampling(0.0, guidance=guidance))
  keys, given = jax.random.split(jax.random.key(0), 4), IMAGE[:, :4]
  apply = bind(MODEL, decode_params.by_layer(init()))
  codes = jax.jit(lambda text: decoding.sample(apply, text, given, keys, **options))(TEXT)
  cond = forward(jnp.repeat(TEXT, 2, 0), codes)
  uncond = forward(jnp.broadcast_to(MODEL.padding, (4, 6)), codes)
  np.testing.assert_array_equal(codes[:, :4], jnp.repeat(given, 2, 0))
  np.testing.assert_array_equal(codes[:, 4:], (uncond + guidance * (cond - uncond)).argmax(-1)[:, 4:])
  assert (codes[0] != codes[2]).any()


def test_a_token_changes_only_later_logits():
  base = forward(TEXT, IMAGE)
  for t in (0, 6, 14):
    moved = np.abs(forward(TEXT, IMAGE.at[:, t].set((IMAGE[:, t] + 1) % 16)) - base).max((0, 2)) > 1e-6
    assert not moved[: t + 1].any() and moved[t + 1], t
  assert (forward(TEXT, IMAGE.at[:, 15].set(0)) == base).all()  # the last token is only predicted
  assert (np.abs(forward(TEXT.at[:, 1].set(11), IMAGE) - base).max(2) > 1e-6).all()  # the image depends on the text
  assert forward(TEXT, IMAGE).shape == (2, 16, 16)  # the row of the start token is not predicted


def test_padding_is_not_read():
  logits = jax.jit(lambda params: bind(MODEL, params)(TEXT, IMAGE))
  noise = np.random.default_rng(0).normal(size=16).astype(np.float32)
  other = {**init(), **{name: init()[name].copy() for name in ('text_embed', 'text_positions')}}
  other['text_embed'][MODEL.pad] += noise
  assert (logits(other) == logits(init())).all()
  other['text_positions'][4] += noise
  moved = np.abs(logits(other) - logits(init())).max((1, 2))
  assert moved[0] > 1e-3 and moved[1] == 0


def test_the_empty_caption():
  assert MODEL.padding.tolist() == [0, 2, 1, 1, 1, 1] and MODEL.padding.dtype == np.int32
  own = dalle_mini.build('test', pad=-1, bos=-1, eos=-1)  # as the tokenizers that training makes
  assert own.words == 34 and own.padding.tolist() == [34, 35, 36, 37, 38, 39]
  logits = jax.jit(bind(own))
  assert np.isfinite(logits(jnp.broadcast_to(own.padding, (2, 6)), IMAGE)).all()
  text = jnp.array([[4, 9, 36, 37, 38, 39]] * 2)
  np.testing.assert_array_equal(logits(text, IMAGE), logits(text.at[:, 3].set(36), IMAGE))


def test_every_parameter_gets_a_gradient():
  model = dalle_mini.build('test', remat='full')
  text, image = jnp.arange(42).reshape(7, 6) % 40, jnp.arange(112).reshape(7, 16) % 16
  loss = lambda params: jnp.square(bind(model, params)(text, image)).sum()
  grads = sharding.flatten(jax.jit(jax.grad(loss))(init()))
  # A bias of the keys shifts all scores of a query alike, which softmax forgets.
  assert [k for k, g in grads.items() if not jnp.abs(g).max() > 0 and not k.endswith('key/bias')] == []


def test_weights_in_eight_bits_and_half_precision_are_close():
  small = decode_params.compute_params(init(), jnp.float32, int8=True)
  for part in ('blocks', 'encoder'):
    assert isinstance(small[part]['blocks']['mlp_gate']['kernel'], decode_params.Int8)
  half = jax.jit(bind(dalle_mini.build('test', dtype='bfloat16')))(TEXT, IMAGE)
  assert half.dtype == jnp.float32
  full = forward(TEXT, IMAGE)
  for close, tolerance in ((jax.jit(bind(MODEL, small))(TEXT, IMAGE), 0.1), (half, 0.15)):
    assert 0 < np.abs(close - full).max() < tolerance * np.abs(full).max()


def test_the_published_sizes():
  for name, count in (('mini', 4.38e8), ('mega', 2.59e9)):
    model = dalle_mini.build(name)
    assert (model.length, model.image_length, model.start_token) == (320, 256, -1)
    text, image = (jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (64, 256))
    boxed = jax.eval_shape(model.init, jax.random.key(0), text, image)['params']
    assert sum(x.size for x in jax.tree.leaves(boxed)) == pytest.approx(count, rel=2e-3)
    axes = sharding.logical_axes(boxed)
    assert axes['blocks/blocks/cross/key/kernel'] == ['layers', 'embed', 'heads', 'head_dim']


def test_flops_are_six_for_each_parameter_and_token():
  model = dalle_mini.build('mini')
  t, n, d, mlp = 64, 256, 1024, 3 * 1024 * 2730
  inside = t * (4 * d**2 + mlp) + n * (4 * d**2 + 2 * d**2 + mlp) + t * 2 * d**2  # of cross-attention text gets keys
  scores = 2 * (t * t + n * n + n * t) * d
  head = n * d * 16_385
  assert dalle_mini.flops(model, 2) == pytest.approx(2 * 6 * (12 * (inside + scores) + head))


def test_errors():
  apply = bind(MODEL)
  with pytest.raises(ValueError, match='takes 6 text tokens, not 5'):
    apply(TEXT[:, :5], IMAGE)
  with pytest.raises(ValueError, match='takes 16 to 16 image tokens here, not 15'):
    apply(TEXT, IMAGE[:, :15])
  with pytest.raises(ValueError, match='takes 0 to 15 image tokens here, not 16'):
    apply(TEXT, IMAGE, method='prefill')
  for fields, message in (
    (dict(heads=3), 'a width of 16 is not divisible by 3 heads'),
    (dict(remat='dots'), "remat 'dots' is unknown; there are none, full"),
    (dict(start_token=17), 'start_token is 17; the image embedding has only 17 rows'),
  ):
    with pytest.raises(ValueError, match=message):
      dalle_mini.build('test', **fields).init(jax.random.key(0), TEXT, IMAGE)
  for fields, message in (
    (dict(mlp=0), 'DALLEMini.mlp is 0; expected 1 or more'),
    (dict(text_length=2), 'DALLEMini.text_length is 2; expected 3 or more, as bos and eos count'),
    (dict(text_length=0, bos=-1, eos=-1), 'DALLEMini.text_length is 0; expected 1 or more'),
  ):
    with pytest.raises(ValueError, match=message):
      dalle_mini.build('test', **fields)
