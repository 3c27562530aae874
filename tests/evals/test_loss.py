"""The means that the loop logs of held-out batches."""

import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.evals import loss
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


def test_no_batches_are_refused_at_the_start():
  c = toy.config('')
  c.train.eval_batches = 0
  with pytest.raises(ValueError, match=r'train.eval_batches is 0; expected 1 or more'):
    loss.build(Mean(), c, None, None)
