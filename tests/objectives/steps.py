"""The training step of an objective without data, files or loop."""

import math

import jax
import jax.numpy as jnp

from configs import common
from dalle_jax.training import optim, sharding
from dalle_jax.training.plan import Plan
from dalle_jax.training.state import TrainState
from dalle_jax.training.step import make_step
from tests import runs


def start(objective, c, batch, scale=0.1):
  """A state of random parameters; a fresh one takes as long to compile as a step."""
  params, mutable = runs.parameters(objective.init, batch, scale=scale)
  opt_state = jax.jit(optim.build(c.optim, 10, list(params)).init)(params)
  return TrainState(jnp.int32(0), params, opt_state, {}, mutable)


def take(objective, c, batch, sizes=None, *, count, frozen=None, ema=0.0, accum=1, start=None):
  """`count` steps on the same batch, over a mesh of these sizes or on one device; from `start` or a fresh state.

  Returns the states (the first is that before training), the metrics of each step, and the shapes with shardings of a
  state.
  """
  sizes = sizes or {}
  c = c.copy_and_resolve_references()
  c.train.update(steps=10, accum=accum, ema=ema)
  with sharding.use(sizes, common.RULES, jax.devices()[: math.prod(sizes.values())]) as mesh:
    plan = Plan(c, objective, batch, mesh)
    state = plan.init() if start is None else jax.device_put(start, plan.shardings)
    run = make_step(plan)
    states, metrics, batch = [jax.device_get(state)], [], sharding.put_batch(batch, mesh)
    for _ in range(count):
      state, found, _ = run(state, frozen or {}, batch)
      states.append(jax.device_get(state))
      metrics.append(jax.device_get(found))
  return states, metrics, plan.state
