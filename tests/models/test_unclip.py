"""The networks of unCLIP: what each depends on and what it must not, sizes, rematerialisation, errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models import clip, prior, unclip, upsampler
from dalle_jax.models.clip_reader import Caption, ClipReader
from dalle_jax.models.unet import UNet
from tests import runs

SIZES = dict(embed_dim=16, text_width=12, text_length=6)
B, T = 2, jnp.array([3, 700])
normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
CAPTION = Caption(normal(0, B, 16), normal(1, B, 6, 12), jnp.arange(6) < jnp.array([[4], [6]]))
EMBED, PICTURE = normal(2, B, 16), normal(3, B, 16, 16, 3)


def made(module, *inputs):
  params = runs.parameters(module.init, *inputs)['params']
  return jax.jit(lambda *x: module.apply({'params': params}, *x))


def change(caption, where):
  """Change the hidden states at these positions of each row."""
  return caption.replace(hidden=jnp.where(where[..., None], caption.hidden + 1, caption.hidden))


def test_the_prior_depends_on_its_caption_and_not_on_padding():
  model = prior.build('test', **SIZES)
  run = made(model, EMBED, T, CAPTION)
  out = run(EMBED, T, CAPTION)
  assert out.shape == (B, 16) and out.dtype == jnp.float32
  np.testing.assert_allclose(run(EMBED, T, change(CAPTION, ~CAPTION.mask)), out, atol=1e-5)
  for other in (
    change(CAPTION, jnp.arange(6)[None] == 3), CAPTION.replace(embed=CAPTION.embed + 1),
  ):  # fmt: skip
    assert (jnp.abs(run(EMBED, T, other) - out).max(1) > 1e-3).all()
  assert (jnp.abs(run(EMBED, T + 100, CAPTION) - out).max(1) > 1e-3).all()
  assert (jnp.abs(run(EMBED + 1, T, CAPTION) - out).max(1) > 1e-3).all()
  with pytest.raises(ValueError, match='takes 6 text tokens, not 5'):
    run(EMBED, T, jax.tree.map(lambda x: x[:, :5] if x.shape[1] == 6 else x, CAPTION))


def test_embeddings_are_standardized_and_back_and_the_statistics_get_no_gradient():
  model = prior.build('test', **SIZES)
  params = runs.parameters(model.init, EMBED, T, CAPTION)['params'] | {'mean': normal(5, 16), 'std': 2 * jnp.ones(16)}
  to = lambda p, x: model.apply({'params': p}, x, method='normal')
  back = model.apply({'params': params}, to(params, EMBED), method='embedding')
  np.testing.assert_allclose(back, EMBED, atol=1e-5)
  np.testing.assert_allclose(to(params, EMBED), (EMBED - params['mean']) / 2, atol=1e-6)
  slopes = jax.grad(lambda p: to(p, EMBED).sum())(params)
  assert all(float(jnp.abs(v).max()) == 0 for v in jax.tree.leaves(slopes))


def test_the_decoder_depends_on_both_and_not_on_padding_or_a_dropped_embedding():
  model = unclip.build('test', **SIZES)
  known = jnp.array([True, False])
  run = made(model, PICTURE, T, EMBED, CAPTION, known)
  out = run(PICTURE, T, EMBED, CAPTION, known)
  assert out.shape == (B, 16, 16, 6) and out.dtype == jnp.float32
  np.testing.assert_allclose(run(PICTURE, T, EMBED, change(CAPTION, ~CAPTION.mask), known), out, atol=1e-5)
  moved = jnp.abs(run(PICTURE, T, EMBED + 1, CAPTION, known) - out).max((1, 2, 3))
  assert moved[0] > 1e-3 and moved[1] == 0
  for other in (change(CAPTION, jnp.arange(6)[None] == 3), CAPTION.replace(embed=CAPTION.embed + 1)):
    assert (jnp.abs(run(PICTURE, T, EMBED, other, known) - out).max((1, 2, 3)) > 1e-4).all()
  assert (jnp.abs(run(PICTURE, T + 50, EMBED, CAPTION, known) - out).max((1, 2, 3)) > 1e-4).all()
  with pytest.raises(ValueError, match=r'takes images \[B, 16, 16, 3\], not \[2, 8, 8, 3\]'):
    run(PICTURE[:, :8, :8], T, EMBED, CAPTION, known)


def test_a_fresh_decoder_predicts_zero():
  model = unclip.build(**runs.UNET, **SIZES)
  inputs = PICTURE, T, EMBED, CAPTION
  fresh = jax.jit(lambda key: model.apply(nn.unbox(model.init(key, *inputs)), *inputs))
  np.testing.assert_array_equal(fresh(jax.random.key(0)), 0)


def test_the_upsampler_depends_on_the_small_image_and_takes_crops():
  model = upsampler.build('test')
  large, low = normal(6, B, 32, 32, 3), normal(7, B, 16, 16, 3)
  run = made(model, large, T, low)
  out = run(large, T, low)
  assert out.shape == large.shape and (jnp.abs(run(large, T, -low) - out).max((1, 2, 3)) > 1e-3).all()
  assert run(large[:, :16, :24], T, low[:, :8, :12]).shape == (B, 16, 24, 3)


def test_a_rematerialised_unet_is_the_same():
  fields = dict(patch=2, head_dim=8, norm_groups=4)
  model, again = (UNet(3, (8,), 1, (0,), remat=remat, **fields) for remat in ('none', 'full'))
  params = runs.parameters(model.init, PICTURE, T)['params']
  of = lambda m: jax.jit(jax.value_and_grad(lambda p: jnp.square(m.apply({'params': p}, PICTURE, T)).mean()))(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), of(model), of(again))


@pytest.mark.parametrize(
  ('fields', 'size', 'message'),
  [
    (dict(channels=(8, 8, 8)), 10, 'a map of 5 x 5 cannot be halved'),
    (dict(channels=(8, 12), attention=(1,), head_dim=8), 8, '12 channels are not divisible into heads of 8'),
    (dict(channels=(8,), attention=(1,)), 8, r'attention has levels \[1\]; expected 0 to 0'),
    (dict(channels=(8,), shift='turn'), 8, "shift 'turn' is unknown"),
    (dict(channels=(8,), patch=3), 8, 'patch 3 does not divide images of 8 x 8'),
    (dict(channels=(8,), remat='dots'), 8, "remat 'dots' is unknown; expected one of none, full"),
    (dict(channels=(9,), norm_groups=3), 8, 'need an even width, not 9'),
  ],
)
def test_unet_errors(fields, size, message):
  model = UNet(3, num_res_blocks=1, **{'norm_groups': 4, **fields})
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)), jnp.zeros(1, jnp.int32))


def reader(raw=False, **special):
  model = clip.build('test', vocab_size=40, text_length=8)
  params = runs.parameters(model.init, jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 8), jnp.int32))['params']
  return ClipReader(model, 32, **special, raw=raw), params


def test_embeddings_have_entries_of_about_one_or_are_as_projected():
  ids, images = jnp.arange(16).reshape(2, 8), jax.random.uniform(jax.random.key(0), (2, 24, 24, 3), minval=-1)
  (unit, params), (raw, _) = reader(), reader(raw=True)
  of = jax.jit(lambda r: (r.encode_text(params, ids), r.encode_image(params, images)), static_argnums=0)
  (caption, seen), (plain, seen_plain) = of(unit), of(raw)
  for scaled, projected in ((caption.embed, plain.embed), (seen, seen_plain)):
    np.testing.assert_allclose(jnp.linalg.norm(scaled, axis=-1), 4.0, rtol=1e-4)
    np.testing.assert_allclose(scaled, 4 * projected / jnp.linalg.norm(projected, axis=-1, keepdims=True), rtol=1e-3)
  assert caption.hidden.shape == (2, 8, 16)
  expected = jax.jit(lambda: unit.model.apply({'params': params}, ids, method='encode_text'))()
  np.testing.assert_allclose(caption.embed / 4, expected, atol=1e-5)


@pytest.mark.parametrize(
  ('special', 'empty', 'ids', 'mask'),
  [
    ({}, [32, 33, 34, 35], [5, 6, 34, 35], [1, 1, 0, 0]),  # a padding for each position
    (dict(pad=0), [0, 0, 0, 0], [5, 6, 0, 0], [1, 1, 0, 0]),
    (dict(pad=31, start=30, end=31), [30, 31, 31, 31], [30, 5, 31, 31], [1, 1, 1, 0]),  # OpenAI's
  ],
)
def test_padding_does_not_count(special, empty, ids, mask):
  r, _ = reader(**special)
  assert r.empty_ids[:4].tolist() == empty and r.empty_ids.dtype == np.int32
  assert r.token_mask(jnp.array([ids]))[0].astype(int).tolist() == mask
