"""Losses by hand, caption dropout, tokens inside the step and before it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from dalle_jax.functional import corruption, losses
from dalle_jax.functional.pixels import to_float
from dalle_jax.models import vqgan
from dalle_jax.objectives import dalle
from dalle_jax.training.state import Context
from tests import runs

VQGAN = runs.VQGAN | {'image_size': 16, 'patch': 2}  # 8 x 8 codes of 16
BATCH = {
  'text': jax.random.randint(jax.random.key(0), (8, 6), 0, 40),
  'image': jax.random.randint(jax.random.key(1), (8, 16, 16, 3), 0, 256).astype(jnp.uint8),
}


def config(**loss):
  c = common.base()
  c.model, c.loss = ConfigDict(dict(variant='test')), ConfigDict(loss)
  c.data.image_size, c.tokenizer.vocab_size, c.tokenizer.length = 16, 34, 6
  return c


def build(**loss):
  return dalle.from_config(config(**loss), {'vqgan': {'model': VQGAN}})


@functools.cache
def loss_of(**loss):
  return jax.jit(build(**loss).loss)


@pytest.fixture(scope='module')
def frozen():
  return runs.parameters(vqgan.build(**VQGAN).init, to_float(BATCH['image']))['params']


@pytest.fixture(scope='module')
def params():
  return runs.parameters(build().init, BATCH, scale=0.02)[0]


def context(frozen, train=True):
  return Context({'vqgan': frozen}, {}, jax.random.key(4), jnp.int32(0), train=train)


def test_sizes_come_from_the_tokenizers():
  m = build().model
  assert (m.text_vocab, m.text_length, m.image_vocab, m.grid) == (40, 6, 16, (8, 8))
  assert build().tokens(BATCH) == 8 * (6 + 64)


def test_the_loss_is_an_eighth_of_text_and_seven_of_image(frozen, params):
  objective, tokenizer = build(), vqgan.build(**VQGAN)
  loss, (metrics, _) = loss_of()(params, context(frozen), BATCH)
  encode = jax.jit(lambda images: tokenizer.apply({'params': frozen}, to_float(images), method='encode'))
  codes = encode(BATCH['image']).reshape(8, -1)
  text_logits, image_logits = jax.jit(objective.model.apply)({'params': params['dalle']}, BATCH['text'], codes)
  text, _ = losses.token_loss(text_logits, BATCH['text'])
  image, accuracy = losses.token_loss(image_logits, codes)
  assert float(loss) == pytest.approx(float(text / 8 + image * 7 / 8), rel=1e-5)
  for name, value in dict(text_loss=text, image_loss=image, accuracy=accuracy).items():
    assert float(metrics[name]) == pytest.approx(float(value), rel=1e-5)
  ahead, _ = loss_of()(params, context(frozen), {'text': BATCH['text'], 'tokens': codes})
  assert float(ahead) == pytest.approx(float(loss), rel=1e-5)


def test_dropped_captions_are_padding_and_leave_the_text_loss(frozen, params):
  run = lambda p, batch, train=True: loss_of(caption_dropout=p)(params, context(frozen, train), batch)[1][0]
  other = {**BATCH, 'text': (BATCH['text'] + 1) % 34}
  whole, moved = run(1.0, BATCH), run(1.0, other)
  assert whole['image_loss'] == moved['image_loss'] and whole['text_loss'] == 0.0
  empty = {**BATCH, 'text': jnp.broadcast_to(build().model.padding, (8, 6))}
  assert float(whole['image_loss']) == pytest.approx(float(run(0.0, empty)['image_loss']), rel=1e-6)
  assert build().model.padding.tolist() == [34, 35, 36, 37, 38, 39]
  assert run(1.0, BATCH, train=False)['image_loss'] == run(0.0, BATCH)['image_loss']


def test_captions_of_which_no_token_is_predicted_add_nothing(frozen):
  c = config(caption_dropout=0.5)
  c.model.layout, c.tokenizer.length = 'no_start', 1
  objective = dalle.from_config(c, {'vqgan': {'model': VQGAN}})
  batch = {'text': BATCH['text'][:, :1] % 34, 'tokens': jnp.ones((8, 64), int)}
  params = runs.parameters(objective.init, batch, scale=0.02)[0]
  loss, (metrics, _) = jax.jit(objective.loss)(params, context(frozen), batch)
  assert metrics['text_loss'] == 0 and loss == 0.875 * metrics['image_loss'] > 0


def test_the_loss_of_a_batch_is_the_mean_over_its_micro_batches(frozen, params, monkeypatch):
  """Though some of them keep fewer captions than others, and one keeps none."""
  batch = {'text': BATCH['text'].at[:, 0].set(jnp.array([0, 39, 1, 2, 38, 37, 3, 4])), 'tokens': jnp.ones((8, 64), int)}
  drop = lambda rng, text, rate, padding: (text, (text[:, 0] > 30).astype(jnp.float32))
  monkeypatch.setattr(corruption, 'drop_captions', drop)
  loss = jax.jit(lambda rows: build(caption_dropout=0.5).loss(params, context(frozen), rows)[1][0]['text_loss'])
  micro = [loss({k: v[i : i + 2] for k, v in batch.items()}) for i in range(0, 8, 2)]
  assert micro[1] == micro[3] == 0 and min(micro[0], micro[2]) > 0
  assert float(loss(batch)) == pytest.approx(np.mean(micro), rel=1e-5)


def test_noise_is_an_input_and_never_a_target(frozen, params):
  run = lambda p, batch, train=True: loss_of(token_noise=p)(params, context(frozen, train), batch)[1][0]
  tokens = jnp.tile(jnp.arange(16), (8, 4))
  clean, noisy, other = (run(p, BATCH | {'tokens': t}) for p, t in ((0.0, tokens), (0.5, tokens), (1.0, tokens)))
  assert len({float(m['image_loss']) for m in (clean, noisy, other)}) == 3
  assert clean['text_loss'] == noisy['text_loss'] == other['text_loss']
  # The input is the same noise for all, so the logits are the same, and only the targets make a difference.
  nll = [float(run(1.0, BATCH | {'tokens': jnp.full((8, 64), k)})['image_loss']) for k in range(16)]
  assert len(set(nll)) == 16 and np.mean(nll) > np.log(16)
  assert run(0.5, BATCH | {'tokens': tokens}, train=False)['image_loss'] == clean['image_loss']


def test_sample_puts_reconstructions_next_to_samples(frozen, params):
  for guidance in (1.0, 2.0):
    images = jax.jit(build(guidance=guidance).sample)(params, context(frozen), BATCH)
    assert images.shape == (8, 16, 32, 3) and images.dtype == jnp.uint8
  recon = jax.jit(vqgan.build(**VQGAN).apply)({'params': frozen}, to_float(BATCH['image'])).recon
  expected = np.clip(np.round((np.asarray(recon) + 1) * 127.5), 0, 255)
  np.testing.assert_allclose(images[:, :, :16].astype(np.int32), expected, atol=1)


def test_errors():
  with pytest.raises(ValueError, match=r'config.loss has no field dropout; its fields are text_weight'):
    build(dropout=0.1)
  with pytest.raises(ValueError, match=r'config.loss.caption_dropout is 5.0; expected a fraction'):
    build(caption_dropout=5.0)
  with pytest.raises(ValueError, match=r'set config.frozen.vqgan to the run of a VQGAN'):
    dalle.from_config(config(), {})
  c = config()
  c.tokenizer.vocab_size = 0
  with pytest.raises(ValueError, match=r'needs captions; set config.tokenizer.vocab_size'):
    dalle.from_config(c, {'vqgan': {'model': VQGAN}})
  for name, value, found in (('image_vocab', 5, 16), ('grid', (2, 2), '.8, 8.'), ('text_length', 99, 6)):
    c = config()
    c.model[name] = value
    with pytest.raises(ValueError, match=rf'config.model.{name} is .*, but the tokenizers and images .* give {found};'):
      dalle.from_config(c, {'vqgan': {'model': VQGAN}})
