"""The means that the loop logs of held-out batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.data import pipeline
from dalle_jax.evals import loss
from dalle_jax.training import sharding
from dalle_jax.training.state import Context
from tests.training import toy


class Numbers:
  """Record i is an image of one pixel that is i."""

  def __init__(self, count):
    self.count = count

  def __len__(self):
    return self.count

  def __getitem__(self, i):
    return {'image': np.full((1, 1, 3), i, np.uint8), 'caption': ''}


class Mean:
  def loss(self, params, ctx, batch):
    return batch['image'].astype(jnp.float32).mean(), ({}, {})


@pytest.mark.parametrize(
  ('records', 'devices', 'expected'),
  [
    (8, 1, 3.5),
    (15, 1, (8 * 3.5 + 7 * 77 / 8) / 15),  # the last batch is 8 to 14, and 0 once more
    (5, 1, 2.0),  # fewer than a batch: no repeats
    (5, 2, 13 / 8),  # 5 rows do not divide between two devices: 0 to 4, and 0 to 2 once more
  ],
)
def test_a_batch_counts_by_its_fresh_rows(records, devices, expected):
  c = toy.config('')
  c.data.image_size = 1
  batches = lambda: pipeline.make_loader(
    Numbers(records), c.data, encode_text=None, batch_size=8, seed=0, shuffle=False
  )
  with sharding.use(dict(data=devices), c.rules, jax.devices()[:devices]) as mesh:
    evaluate = loss.build(Mean(), c, batches, mesh)
    found = evaluate({}, Context({}, {}, jax.random.key(0), jnp.int32(0)))
  assert found == {'val_loss': pytest.approx(expected)}


def test_no_batches_are_refused_at_the_start():
  c = toy.config('')
  c.train.eval_batches = 0
  with pytest.raises(ValueError, match=r'train.eval_batches is 0; expected 1 or more'):
    loss.build(Mean(), c, None, None)
