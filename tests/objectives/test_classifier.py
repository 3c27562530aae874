"""Binary cross-entropy and its metrics by hand, learning, and what the config and the data must have."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import common
from dalle_jax.evals import characters
from dalle_jax.functional.pixels import to_float
from dalle_jax.objectives import classifier
from dalle_jax.training.state import Context
from tests import runs

RNG = np.random.default_rng(0)
LABELS = RNG.random((16, 3)) < 0.5
COLORS = np.where(LABELS, 220, 30).astype(np.uint8)  # label c is the brightness of channel c
BATCH = {'image': COLORS[:, None, None, :] + RNG.integers(0, 30, (16, 16, 16, 3), np.uint8), 'labels': LABELS}
CONTEXT = Context({}, {}, jax.random.key(0), jnp.int32(0), train=True)


def config(**model):
  c = common.base()
  c.model = ConfigDict(dict(variant='test', **model))
  c.data.image_size = 16
  return c


@pytest.fixture(scope='module')
def built():
  objective = classifier.from_config(config(labels=3), {})
  return objective, runs.parameters(objective.init, BATCH)[0]


def test_loss_and_metrics_by_hand(built):
  objective, params = built
  logits = np.asarray(
    jax.jit(objective.model.apply)({'params': params['classifier']}, to_float(BATCH['image'])), np.float64
  )
  p = 1 / (1 + np.exp(-logits))
  loss, (metrics, _) = jax.jit(objective.loss)(params, CONTEXT, BATCH)
  assert float(loss) == pytest.approx(-np.log(np.where(LABELS, p, 1 - p)).mean(), rel=1e-4)
  expected = characters.scores(p > 0.5, LABELS)
  assert float(metrics['f1']) == pytest.approx(expected['f1_micro'])
  assert float(metrics['exact']) == pytest.approx(expected['frame_accuracy'])


def test_no_label_and_none_predicted_is_right(built):
  objective, params = built
  head = {'kernel': jnp.zeros((8, 3)), 'bias': jnp.full(3, -1.0)}
  none = {**BATCH, 'labels': np.zeros((16, 3), bool)}
  _, (metrics, _) = jax.jit(objective.loss)({'classifier': {**params['classifier'], 'head': head}}, CONTEXT, none)
  assert metrics['f1'] == metrics['exact'] == 1.0


def test_it_learns(built):
  objective, params = built
  tx = optax.adam(1e-2)

  @jax.jit
  def step(params, state):
    (_, (metrics, _)), grads = jax.value_and_grad(objective.loss, has_aux=True)(params, CONTEXT, BATCH)
    updates, state = tx.update(grads, state)
    return optax.apply_updates(params, updates), state, metrics

  state = tx.init(params)
  for _ in range(30):
    params, state, metrics = step(params, state)
  assert metrics['exact'] == 1.0


def test_errors(built):
  objective, params = built
  with pytest.raises(ValueError, match='needs labels, and this data has none'):
    objective.loss(params, CONTEXT, {'image': BATCH['image']})
  with pytest.raises(
    ValueError, match=r'labels of the data are \[16, 2\], expected \[16, 3\]; set config.model.labels'
  ):
    objective.loss(params, CONTEXT, {**BATCH, 'labels': LABELS[:, :2]})
  with pytest.raises(ValueError, match=r'takes single images.*unit="frame"'):
    objective.init(jax.random.key(0), {'image': np.zeros((2, 5, 16, 16, 3), np.uint8)})
  with pytest.raises(ValueError, match=r'needs config.model.labels, the number of labels in the data'):
    classifier.from_config(config(), {})
  c = config(labels=3)
  c.loss = ConfigDict(dict(margin=1.0))
  with pytest.raises(ValueError, match='unknown fields margin; the objective classifier has none'):
    classifier.from_config(c, {})
