"""What a config trains on a mesh, before anything is computed: where the loop and the ahead-of-time check begin."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dalle_jax.training import config as config_lib
from dalle_jax.training import optim, sharding
from dalle_jax.training.state import Objective, Params, TrainState


class Plan:
  """An objective with its optimiser, and the shapes with shardings of all that a step reads and writes.

  Attributes:
    config, objective, mesh: as given.
    batch: the global batch.
    optimizer: that of `config.optim`.
    axes: name of a parameter -> its logical axes.
    state: the training state; moments and EMA are laid out like their parameters. With `train.offload_optimizer` the
      moments are in host memory between updates.
  """

  def __init__(self, config: ConfigDict, objective: Objective, batch: Mapping[str, Any], mesh: Mesh, parts: int = 1):
    """Plans the training of an objective on batches of which `batch`, arrays or shapes, is one of the `parts` read.

    Raises ValueError for fields of `config.train` or `config.optim` that are out of range, and for a batch that the
    mesh and `train.accum` do not divide.
    """
    _check_config(config)
    self.config, self.objective, self.mesh = config, objective, mesh
    self.batch = {
      name: jax.ShapeDtypeStruct((parts * len(x), *x.shape[1:]), x.dtype, sharding=sharding.batch_sharding(mesh))
      for name, x in batch.items()
    }
    self._check_batch()
    boxed, mutable = jax.eval_shape(lambda batch: objective.init(jax.random.key(0), batch), self.batch)
    self.axes = sharding.logical_axes(boxed)
    params, mutable = self._placed(boxed), self._placed(mutable)
    self.optimizer = optim.build(config.optim, config.train.steps, list(params))
    moments = jax.eval_shape(self.optimizer.init, params)
    memory = 'pinned_host' if config.train.offload_optimizer else None
    moments = jax.tree.map(place, moments, sharding.like_params(moments, params, mesh, memory))
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    self.state = TrainState(step, params, moments, params if config.train.ema else {}, mutable)

  def _check_batch(self) -> None:
    size, shards = next(iter(self.batch.values())).shape[0], sharding.batch_shards(self.mesh)
    accum, group = self.config.train.accum, self.config.data.group
    least = shards * (accum * group if accum > 1 else 1)
    if size % least:
      raise ValueError(
        f'data.batch_size {size} is not divisible by {shards} (mesh data x fsdp) x {accum} (train.accum) x {group} '
        f'(data.group, if accumulating); the nearest is {max(1, round(size / least)) * least}.'
      )

  def _placed(self, boxed: Any) -> Any:
    tree, axes = sharding.unbox(boxed), sharding.logical_axes(boxed)
    return jax.tree.map(place, tree, sharding.shardings(tree, axes, self.mesh, self.config.rules))

  @property
  def shardings(self) -> TrainState:
    """Those of the state."""
    return jax.tree.map(lambda x: x.sharding, self.state)

  @property
  def parameters(self) -> dict[str, int]:
    """The number of parameters of each player."""
    return {name: count(tree) for name, tree in self.state.params.items()}

  def describe(self) -> Iterator[str]:
    """A line for each player."""
    for name, number in self.parameters.items():
      yield f'{name}: {number:,} parameters{" (frozen)" if name in self.optimizer.frozen else ""}'

  def init(self) -> TrainState:
    """The state at step 0, created under jit with its shardings, so that no device ever holds all of it."""

    def create(rng: jax.Array) -> TrainState:
      batch = {k: jnp.zeros(v.shape, v.dtype) for k, v in self.batch.items()}
      params, mutable = sharding.unbox(self.objective.init(rng, batch))
      # A copy, because a step that donates its state must not get the same buffer twice.
      ema = jax.tree.map(jnp.copy, params) if self.config.train.ema else {}
      return TrainState(jnp.int32(0), params, self.optimizer.init(params), ema, mutable)

    return jax.jit(create, out_shardings=self.shardings)(jax.random.key(self.config.seed))


def _check_config(config: ConfigDict) -> None:
  c = config.train
  for name in ('steps', 'accum', 'log_every', 'keep'):
    if c[name] < 1:
      raise ValueError(f'train.{name} is {c[name]}; expected 1 or more.')
  for name in ('checkpoint_every', 'eval_every'):
    if c[name] < 0:
      raise ValueError(f'train.{name} is {c[name]}; expected 0 or more.')
  if not 0 <= c.ema < 1:
    raise ValueError(f'train.ema is {c.ema}; expected 0 or more and less than 1.')
  config_lib.check_regex('init.new', config.init.new)


def count(params: Params) -> int:
  """The number of parameters."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def place(x: jax.ShapeDtypeStruct, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
  """The same shape with a sharding."""
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
