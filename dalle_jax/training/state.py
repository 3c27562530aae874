"""The state that training carries from step to step, and what an objective has to be."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import optax
from flax import struct

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
    convolutional = True: most of a step is convolutions, for which it is compiled on CPUs.

  The module of an objective has `from_config(config, frozen_configs)` and FROZEN, the names of the frozen networks that
  it can use. It may have READS, those of them that a step needs (by default all; the others are copied into the run for
  sampling only).
  """

  def init(self, rng: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[Params, Any]: ...

  def loss(
    self, params: Params, ctx: Context, batch: Mapping[str, jax.Array]
  ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]: ...
