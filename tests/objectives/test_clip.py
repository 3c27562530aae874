"""The contrastive loss runs over the global batch, whatever the mesh; the scale has a ceiling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from dalle_jax.functional.contrastive import contrastive
from dalle_jax.objectives import clip
from dalle_jax.training import sharding
from dalle_jax.training.state import Context
from tests import runs

BATCH = {
  'image': np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8),
  'text': np.random.default_rng(1).integers(0, 32, (16, 8)).astype(np.int32),
}


def build(text_pool='last', **tokenizer):
  c = common.base()
  c.model = ConfigDict(dict(variant='test', text_pool=text_pool))
  c.data.image_size = 16
  c.tokenizer.update(vocab_size=32, length=8, **tokenizer)
  return clip.from_config(c, {})


def test_loss_by_hand():
  a, b = (np.random.default_rng(s).normal(size=(5, 3)) for s in (0, 1))
  a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
  logits = 4.0 * a @ b.T
  log_softmax = lambda x: x - np.log(np.exp(x).sum(1, keepdims=True))
  expected = -(np.diag(log_softmax(logits)) + np.diag(log_softmax(logits.T))).mean() / 2
  loss, accuracy = contrastive(jnp.asarray(a), jnp.asarray(b), jnp.float32(4.0))
  assert float(loss) == pytest.approx(expected, rel=1e-5)
  right = (logits.argmax(1) == np.arange(5)).mean() + (logits.argmax(0) == np.arange(5)).mean()
  assert float(accuracy) == pytest.approx(right / 2)


def test_the_batch_is_the_global_one():
  """Eight devices with two pairs each give the loss and the gradients of one device with sixteen."""
  objective = build()
  params, _ = runs.parameters(objective.init, BATCH)
  ctx = Context({}, {}, jax.random.key(0), jnp.int32(0), train=True)

  def run(batch):
    grad = jax.jit(jax.value_and_grad(lambda p, b: objective.loss(p, ctx, b)[0]))
    return jax.device_get(grad(params, batch))

  loss, grads = run(BATCH)
  with sharding.use(dict(data=8, fsdp=1, tensor=1), common.RULES) as mesh:
    sharded = run(sharding.put_batch(BATCH, mesh))
  np.testing.assert_allclose(sharded[0], loss, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), sharded[1], grads)
  part, _ = run({k: v[:2] for k, v in BATCH.items()})
  assert abs(part - loss) > 0.5  # ln 2 against ln 16


def test_the_scale_stays_below_its_ceiling_and_comes_down_from_it():
  objective = build()
  params, _ = runs.parameters(objective.init, BATCH)
  at_the_top = objective.after_update({'clip': params['clip'] | {'logit_scale': jnp.float32(9.0)}}, {})
  slope = jax.jit(jax.grad(lambda p: objective.loss(p, Context({}, {}, None, jnp.int32(0)), BATCH)[0]))(at_the_top)
  assert abs(float(slope['clip']['logit_scale'])) > 1e-3
  params = objective.after_update({'clip': {'logit_scale': jnp.float32(9.0), 'rest': jnp.ones(2)}}, {})
  assert float(jnp.exp(params['clip']['logit_scale'])) == pytest.approx(100.0, rel=1e-4)
  assert params['clip']['rest'].shape == (2,)


def test_errors():
  c = common.base()
  with pytest.raises(ValueError, match=r'needs captions; set config.tokenizer.vocab_size'):
    clip.from_config(c, {})
  build('max_id', pad=0, end=31)
  # Otherwise a word or the padding has a higher id.
  for tokenizer in (dict(), dict(end=31), dict(pad=0), dict(pad=0, end=2)):
    with pytest.raises(ValueError, match='"max_id" would not read captions to their end'):
      build('max_id', **tokenizer)
  c.loss = ConfigDict(dict(margin=1.0))
  with pytest.raises(ValueError, match='unknown fields margin; the objective clip has none'):
    clip.from_config(c, {})
