"""The loss by hand, caption dropout, logged samples, and what cannot be trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from dalle_jax.functional import losses
from dalle_jax.functional.pixels import to_float
from dalle_jax.models import vqgan
from dalle_jax.objectives import dalle_mini
from dalle_jax.training.state import Context
from tests import runs

VQGAN = runs.VQGAN | {'image_size': 8, 'patch': 2}  # 4 x 4 codes of 16
BATCH = {
  'text': jax.random.randint(jax.random.key(0), (4, 6), 3, 34).at[:, 0].set(0),
  'image': jax.random.randint(jax.random.key(1), (4, 8, 8, 3), 0, 256).astype(jnp.uint8),
}
CODES = jax.random.randint(jax.random.key(2), (4, 16), 0, 16)


def config(**loss):
  c = common.base()
  c.objective, c.model, c.loss = 'dalle_mini', ConfigDict(dict(variant='test')), ConfigDict(loss)
  c.data.image_size = 8
  c.tokenizer.update(vocab_size=34, length=6, pad=1, start=0, end=2)
  return c


def build(whole=True, **loss):
  return dalle_mini.from_config(config(**loss), {'vqgan': {'model': VQGAN | {'decoder_only': not whole}}})


def context(train=True):
  frozen = {'vqgan': runs.parameters(vqgan.build(**VQGAN).init, to_float(BATCH['image'][:1]))['params']}
  return Context(frozen, {}, jax.random.key(4), jnp.int32(0), train=train)


PARAMS = runs.parameters(lambda key: build().init(key, BATCH)[0])


def test_sizes_come_from_the_tokenizers():
  m = build().model
  assert (m.text_vocab, m.text_length, m.image_vocab, m.grid) == (34, 6, 16, (4, 4))
  assert m.padding.tolist() == [0, 2, 1, 1, 1, 1] and set(PARAMS) == {'dalle'}
  assert build().tokens(BATCH) == 4 * (6 + 16) and build().flops(BATCH) > 0


def test_the_loss_is_that_of_the_image():
  batch = {'text': BATCH['text'], 'tokens': CODES}
  logits = jax.jit(build().model.apply)
  for dropout, text in ((0.0, batch['text']), (1.0, jnp.broadcast_to(build().model.padding, (4, 6)))):
    loss, (metrics, _) = jax.jit(build(caption_dropout=dropout).loss)(PARAMS, context(), batch)
    image, accuracy = losses.token_loss(logits({'params': PARAMS['dalle']}, text, CODES), CODES)
    assert float(loss) == pytest.approx(float(image), rel=1e-5) and loss == metrics['image_loss']
    assert float(metrics['accuracy']) == pytest.approx(float(accuracy), rel=1e-5)


def test_sample_puts_reconstructions_next_to_samples():
  images = jax.jit(build(guidance=2.0).sample)(PARAMS, context(), BATCH)
  assert images.shape == (4, 8, 16, 3) and images.dtype == jnp.uint8
  assert (np.asarray(images[:, :, :8]) != np.asarray(images[:, :, 8:])).any()


def test_errors():
  with pytest.raises(ValueError, match='has only a decoder, so it cannot encode images; convert the model again with'):
    build(whole=False).loss(PARAMS, context(), BATCH)
  with pytest.raises(ValueError, match=r'config.loss has no field text_weight; its fields are caption_dropout'):
    build(text_weight=0.5)
  with pytest.raises(ValueError, match=r'the objective dalle_mini needs an image tokenizer'):
    dalle_mini.from_config(config(), {})
