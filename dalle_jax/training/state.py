"""The state that training carries from step to step, and its creation, already laid out over the mesh."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle_jax.training import sharding
from dalle_jax.training.optim import Optimizer

Params = Any


class TrainState(struct.PyTreeNode):
  """`step` int32[] counts finished updates; `ema` is {} without EMA; `mutable` is the state of the objective itself."""

  step: jax.Array
  params: Params
  opt_state: optax.OptState
  ema: Params
  mutable: Any


class Context(struct.PyTreeNode):
  """What an objective gets in addition to parameters and batch; `step` is already folded into `rng`."""

  frozen: Mapping[str, Params]
  mutable: Any
  rng: jax.Array
  step: jax.Array
  train: bool = struct.field(pytree_node=False, default=False)


class Objective(Protocol):
  """What training minimises. An objective must have `init` and `loss`, and may have:

    after_update(params, mutable) -> params: runs inside the step, after the optimiser.
    sample(params, ctx, batch) -> uint8[B, H, W, 3]: images for the log.
    tokens(batch) -> int, flops(batch) -> float: of a global batch, for speed and utilisation.
    adopt(params, config, rng) -> params: makes the parameters of another run fit (`config.init`; train.py calls it).
    rows_apart = True: the loss is a mean over independent rows and there is no mutable state, so that gradient
      accumulation may sum per replica and reduce once.

  The module of an objective has `from_config(config, frozen_configs)` and FROZEN, the names of the frozen networks that
  it can use. It may have READS, those of them that a step needs (by default all; the others are copied into the run for
  sampling only).
  """

  def init(self, rng: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[Params, Any]: ...

  def loss(
    self, params: Params, ctx: Context, batch: Mapping[str, jax.Array]
  ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]: ...


def abstract(
  objective: Objective, spec: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh, rules: sharding.Rules
) -> tuple[Params, Any, dict[str, list[str | None]]]:
  """Shapes with shardings of (params, mutable), and the logical axes of the parameters; computes nothing."""
  boxed, mutable = jax.eval_shape(lambda batch: objective.init(jax.random.key(0), batch), spec)
  axes = sharding.logical_axes(boxed)
  params, extra = sharding.unbox(boxed), sharding.unbox(mutable)
  place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  params = jax.tree.map(place, params, sharding.shardings(params, axes, mesh, rules))
  extra = jax.tree.map(place, extra, sharding.shardings(extra, sharding.logical_axes(mutable), mesh, rules))
  return params, extra, axes


def abstract_state(
  params: Params, mutable: Any, optimizer: Optimizer, ema: bool, mesh: Mesh, offload: bool = False
) -> TrainState:
  """The whole state as shapes with shardings; optimiser moments and EMA are laid out like their parameters.

  With `offload` the moments are in host memory between updates.
  """
  replicated = NamedSharding(mesh, PartitionSpec())
  opt = jax.eval_shape(optimizer.init, params)
  where = sharding.like_params(opt, params, mesh, 'pinned_host' if offload else None)
  opt = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), opt, where)
  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
  return TrainState(step, params, opt, params if ema else {}, mutable)


def init(
  objective: Objective,
  shape: TrainState,
  optimizer: Optimizer,
  seed: int,
  spec: Mapping[str, jax.ShapeDtypeStruct],
) -> TrainState:
  """The state at step 0, created under jit with the shardings of `shape`, so that no device ever holds all of it."""

  def create(rng: jax.Array) -> TrainState:
    batch = {k: jnp.zeros(v.shape, v.dtype) for k, v in spec.items()}
    params, mutable = sharding.unbox(objective.init(rng, batch))
    # A copy, because a step that donates its state must not get the same buffer twice.
    ema = jax.tree.map(jnp.copy, params) if jax.tree.leaves(shape.ema) else {}
    return TrainState(jnp.int32(0), params, optimizer.init(params), ema, mutable)

  return jax.jit(create, out_shardings=jax.tree.map(lambda x: x.sharding, shape))(jax.random.key(seed))


def batch_spec(batch: Mapping[str, np.ndarray], parts: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of the global batch, from one of its parts."""
  return {k: jax.ShapeDtypeStruct((v.shape[0] * parts, *v.shape[1:]), v.dtype) for k, v in batch.items()}
