"""A tiny objective to test the loop with; `python -m tests.training.toy RUN_DIR STEPS CHECKPOINT_EVERY` trains it."""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs import common
from dalle_jax.layers.basic import Dense, Embed, constrain
from dalle_jax.training import loop, sharding

BATCH, SEQ, VOCAB = 16, 4, 8


class Net(nn.Module):
  @nn.compact
  def __call__(self, ids):
    x = Embed(VOCAB, 8, name='embed')(ids)
    x = constrain(x, ('batch', 'seq', 'embed'))
    x = jax.nn.gelu(Dense(16, ('embed', 'mlp'), name='up')(x))
    return Dense(VOCAB, ('mlp', 'vocab'), name='down')(x)


class Toy:
  """Learns to copy. `noise` makes the loss depend on ctx.rng, `critic` adds a second player, `counts` mutable state."""

  def __init__(self, noise=0.0, critic=False, nan_at=-1, counts=True):
    self.noise, self.critic, self.nan_at, self.counts, self.net = noise, critic, nan_at, counts, Net()

  def init(self, rng, batch):
    params = {'net': self.net.init(rng, batch['ids'])['params']}
    if self.critic:
      params['critic'] = self.net.init(jax.random.fold_in(rng, 1), batch['ids'])['params']
    return params, {'seen': jnp.int32(0)} if self.counts else {}

  def loss(self, params, ctx, batch):
    logits = sum(self.net.apply({'params': p}, batch['ids']) for p in params.values())
    if self.noise:
      logits = logits + self.noise * jax.random.normal(ctx.rng, logits.shape)
    scale = sum(jax.tree.leaves(ctx.frozen), jnp.float32(1.0)) if ctx.frozen else 1.0
    loss = scale * -jnp.take_along_axis(jax.nn.log_softmax(logits), batch['ids'][..., None], -1).mean()
    loss = loss * jnp.where(ctx.step == self.nan_at, jnp.nan, 1.0)
    accuracy = (logits.argmax(-1) == batch['ids']).mean()
    return loss, ({'accuracy': accuracy}, {name: n + 1 for name, n in ctx.mutable.items()})

  def sample(self, params, ctx, batch):
    ids = self.net.apply({'params': params['net']}, batch['ids']).argmax(-1)
    return jnp.broadcast_to(ids[:, :, None, None] * 30, (*ids.shape, SEQ, 3)).astype(jnp.uint8)

  def tokens(self, batch):
    return batch['ids'].shape[0] * batch['ids'].shape[1]

  def flops(self, batch):
    return 6.0 * 400 * self.tokens(batch)


def batches(start=0):
  """Batch k depends only on k."""
  step = start
  while True:
    yield {'ids': np.random.default_rng(step).integers(0, VOCAB, (BATCH, SEQ)).astype(np.int32)}
    step += 1


def config(run_dir, **train):
  c = common.base()
  c.run_dir, c.data.val_split = str(run_dir), ''
  c.train.update(dict(steps=8, log_every=2, checkpoint_every=4, eval_every=0, ema=0.9, keep=2) | train)
  c.optim.update(lr=1e-2, warmup=2, weight_decay=0.1)
  return c


def run(c, objective=None, **kwargs):
  """The last state."""
  return train(c, objective, **kwargs)[0]


def train(c, objective=None, **kwargs):
  """The last state, and whether a signal asked for a stop."""
  meta = {'config': {'objective': 'toy'}, 'tokenizer': 'words', 'frozen': {}}
  with sharding.use(c.mesh, c.rules) as mesh:
    return loop.train(c, objective or Toy(noise=0.1), kwargs.pop('batches', batches), mesh=mesh, meta=meta, **kwargs)


if __name__ == '__main__':
  run(config(sys.argv[1], steps=int(sys.argv[2]), checkpoint_every=int(sys.argv[3]), log_every=1))
