"""Properties of the DALL-E transformer: cached = teacher-forced, causal, gradients everywhere, the published sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from dalle_jax.functional import decoding
from dalle_jax.layers import attention
from dalle_jax.layers.patterns import KINDS
from dalle_jax.models import dalle, decode_params
from dalle_jax.training import sharding
from tests import runs

TEXT = jax.random.randint(jax.random.key(0), (2, 6), 0, 40)
IMAGE = jax.random.randint(jax.random.key(1), (2, 16), 0, 16)
PATTERNS = (*KINDS, 'paper')


@functools.cache
def init(model):
  """Larger parameters than at the start of training, so that attention is not flat and masks matter."""
  return runs.parameters(model.init, TEXT, IMAGE)['params']


def bind(model, params):
  return functools.partial(model.apply, {'params': params})


LAYOUTS = (  # of public models, with attention masks that depend on where the image begins
  dict(layout='no_start', pad=0, attention='row', head='norm', norms='sandwich', depth=2),
  dict(layout='shifted', attention='row', head='norm', depth=2),
  dict(
    attention='own_row,causal_conv', image_positions='rotary', shift_tokens=True, activation='geglu', head='tied_bias',
    norms='sandwich', reversible=True, divide_max=True, head_dim=12, depth=2,
  ),
)  # fmt: skip
MIXED = dict(attention='full,wrapped', image_positions='learned', head='tied', period=2)


@pytest.mark.parametrize('fields', [{}, MIXED, *LAYOUTS])
def test_cached_logits_are_the_teacher_forced_ones(fields):
  """Every kind of attention is in one of these models."""
  model = dalle.build('test', **fields)
  _, expected = jax.jit(bind(model, init(model)))(TEXT, IMAGE)
  apply = bind(model, decode_params.by_layer(init(model)))

  def step(cache, i):
    logits, cache = apply(IMAGE[:, i], i, cache, method='step')
    return cache, logits

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def cached(start, rooms):
    """Logits of the image tokens from `start` on, in a cache that is extended to have these rooms."""
    first, cache = apply(TEXT, IMAGE[:, :start], method='prefill')
    logits = [first[None]]
    for room in rooms:
      cache, next_ones = jax.lax.scan(step, cache.extend(room), jnp.arange(start, start + room))
      logits, start = [*logits, next_ones], start + room
    return jnp.concatenate(logits).swapaxes(0, 1)

  for start, rooms in ((0, (8, 7)), (5, (10,))):  # image rows may be given
    np.testing.assert_allclose(cached(start, rooms), expected[:, start:], atol=1e-4)


def test_a_caption_is_embedded_without_its_padding():
  """With a padding of its own for each position, or with one for all."""
  for model, padding in ((dalle.build('test'), 34), (dalle.build('test', pad=3), 3)):
    apply = bind(model, init(model))
    long, short = (
      apply(jnp.array([[5, 7, *rest]]), method='embed_caption') for rest in ([padding] * 4, [])
    )  # fmt: skip
    np.testing.assert_allclose(long, short, rtol=1e-6)
  assert model.words == 40 and (model.padding == 3).all()


def test_guided_sampling_is_guided_teacher_forcing():
  """Greedy codes sampled with guidance and the cache are the argmax of the guided teacher-forced logits."""
  model = dalle.build('test', depth=2)
  apply = bind(model, init(model))
  options = dict(empty=model.padding, length=16, n=1, sampling=decoding.Sampling(temperature=0.0, guidance=3.0))
  keys = jax.random.split(jax.random.key(0), 2)
  codes = jax.jit(lambda text: decoding.sample(apply, text, IMAGE[:, :4], keys, **options))(TEXT)
  logits = jax.jit(lambda text: apply(text, codes)[1])
  cond, uncond = logits(TEXT), logits(jnp.broadcast_to(model.padding, TEXT.shape))
  np.testing.assert_array_equal(codes[:, :4], IMAGE[:, :4])
  np.testing.assert_array_equal(codes[:, 4:], (uncond + 3 * (cond - uncond)).argmax(-1)[:, 4:])
  assert (codes[:, 4:] != cond.argmax(-1)[:, 4:]).any()


def test_duplicated_rows_give_the_same_samples(monkeypatch):
  model = dalle.build('test', depth=2)
  apply, keys = bind(model, init(model)), jax.random.split(jax.random.key(0), 4)
  options = dict(empty=model.padding, length=16, n=2, sampling=decoding.Sampling())
  draw = lambda: np.asarray(jax.jit(lambda text: decoding.sample(apply, text, IMAGE[:, :4], keys, **options))(TEXT))
  once = draw()
  monkeypatch.setattr(attention.KVCache, 'copies', 2)
  np.testing.assert_array_equal(draw(), once)


@pytest.mark.parametrize('platform, rows, copies', [('gpu', 1, 2), ('gpu', 2, 1), ('tpu', 1, 1)])
def test_a_gpu_duplicates_a_single_row(platform, rows, copies, monkeypatch):
  monkeypatch.setattr(attention, 'platform', lambda: platform)
  pair = jnp.zeros((rows, 2, 3, 4)), jnp.zeros((rows, 2, 3, 4))
  assert attention.KVCache((pair,), (pair,)).copies == copies


@pytest.mark.parametrize('pattern', PATTERNS)
def test_a_token_changes_only_later_logits(pattern):
  apply = jax.jit(bind(dalle.build('test', attention=pattern), init(dalle.build('test'))))
  joined = lambda text, image: np.concatenate([np.abs(x).sum(-1) for x in apply(text, image)], 1)
  base = joined(TEXT, IMAGE)
  for t in (0, 3, 5):
    moved = np.abs(joined(TEXT.at[:, t].set((TEXT[:, t] + 1) % 40), IMAGE) - base).max(0) > 1e-6
    assert not moved[: t + 1].any() and moved[t + 1] and moved[6:].all(), t  # the whole image attends to all text
  for t in (0, 6, 14):
    moved = np.abs(joined(TEXT, IMAGE.at[:, t].set((IMAGE[:, t] + 1) % 16)) - base).max(0) > 1e-6
    assert not moved[: 6 + t + 1].any() and moved[6 + t + 1], t
  assert not (joined(TEXT, IMAGE.at[:, 15].set(0)) != base).any()  # the last token is only predicted


def test_one_layer_attends_to_what_its_mask_allows():
  model = dalle.build('test', attention='column', depth=1)
  apply = bind(model, init(model))
  logits = jax.jit(lambda image: apply(TEXT, image)[1])
  moved = np.abs(np.subtract(logits(IMAGE.at[:, 1].set((IMAGE[:, 1] + 1) % 16)), logits(IMAGE))).max((0, 2)) > 1e-6
  assert np.flatnonzero(moved).tolist() == [2, 6, 10, 14]  # logits of t come from position t - 1: 1, 5, 9, 13


def gradients(**fields):
  """Those of a loss in which every embedding takes part."""
  model = dalle.build('test', **fields)
  every_text = jnp.arange(42).reshape(7, 6) % 40
  every_image = jnp.arange(112).reshape(7, 16) % 16

  def loss(params):
    text, image = bind(model, params)(every_text, every_image)
    return jnp.square(text).mean() + jnp.square(image).mean()

  return jax.jit(jax.grad(loss))(init(model))


on_one_device = functools.cache(gradients)


@pytest.mark.parametrize('fields', [{}, dict(head='tied', image_positions='learned', remat='full'), LAYOUTS[2]])
def test_every_parameter_gets_a_gradient(fields):
  grads = jax.tree_util.tree_leaves_with_path(on_one_device(**fields))
  dead = [jax.tree_util.keystr(k) for k, g in grads if not jnp.abs(g).max() > 0]
  # A bias of the keys shifts all scores of a query alike, which softmax forgets.
  assert [k for k in dead if "['key']['bias']" not in k] == []


@pytest.mark.parametrize('fields', [{}, LAYOUTS[2]])
def test_shards_of_the_sequence_change_no_gradient(fields):
  """Where they divide neither text nor image, and the vocabulary is sharded, too."""
  with sharding.use(dict(tensor=2, sequence=4), common.RULES):
    sharded = gradients(**fields)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4), sharded, on_one_device(**fields))


def test_half_precision_is_close_and_its_logits_are_float32():
  params = init(dalle.build('test'))
  full, half = (jax.jit(bind(dalle.build('test', dtype=d), params))(TEXT, IMAGE)[1] for d in ('float32', 'bfloat16'))
  assert half.dtype == jnp.float32
  np.testing.assert_allclose(half, full, atol=0.15 * float(np.abs(full).max()))


def test_the_published_sizes():
  model = dalle.build('12b')
  assert (model.depth, model.heads, model.d_model, model.d_model // model.heads) == (64, 62, 3968, 64)
  assert (model.length, model.prefix, model.image_length, model.image_vocab) == (1280, 257, 1024, 8192)
  for name, count in (('12b', 12.0e9), ('300m', 3.4e8)):
    model = dalle.build(name)
    text, image = (jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (model.text_length, model.image_length))
    shapes = jax.eval_shape(model.init, jax.random.key(0), text, image)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == pytest.approx(count, rel=0.1 if name == '300m' else 0.02)


def test_flops_are_six_for_each_parameter_and_token():
  model = dalle.build('small')
  inside = 12 * model.depth * model.d_model**2
  heads = model.d_model * (256 * model.text_vocab + 1024 * model.image_vocab)
  attention = 12 * model.depth * model.d_model * model.length**2
  assert dalle.flops(model, 2) == pytest.approx(2 * (6 * inside * model.length + 6 * heads + attention))


def test_errors():
  model = dalle.build('test')
  apply = bind(model, init(model))
  with pytest.raises(ValueError, match='takes 6 text tokens, not 5'):
    apply(TEXT[:, :5], IMAGE)
  with pytest.raises(ValueError, match='takes 16 to 16 image tokens here, not 15'):
    apply(TEXT, IMAGE[:, :15])
  with pytest.raises(ValueError, match='takes 0 to 15 image tokens here, not 16'):
    apply(TEXT, IMAGE, method='prefill')
  for field in ('heads', 'period', 'unroll', 'conv_kernel'):
    with pytest.raises(ValueError, match=rf'DALLE.{field} is 0; expected 1 or more'):
      dalle.build('test', **{field: 0})
  with pytest.raises(ValueError, match="image_positions 'sinus' is unknown; expected axial, learned or rotary"):
    init(dalle.build('test', image_positions='sinus'))
