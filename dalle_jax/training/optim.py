"""Builds the optimiser from the config: clipping, a preconditioner, weight decay and a schedule for each player.

A player is a top-level key of the parameters. `config.optim` applies to all players; `config.optim.groups.NAME`
overrides any of its fields for the player NAME, or excludes it from training with `frozen=True`.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from dalle_jax.training import config as config_lib

Schedule = Callable[[Any], Any]  # step -> learning rate

PRECONDITIONERS: dict[str, Callable[[Mapping], optax.GradientTransformation]] = {
  'adam': lambda c: optax.scale_by_adam(c['b1'], c['b2'], c['eps']),
  'adamw': lambda c: optax.scale_by_adam(c['b1'], c['b2'], c['eps']),
  'adafactor': lambda c: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
  'lion': lambda c: optax.scale_by_lion(c['b1'], c['b2']),
  'sgd': lambda c: optax.trace(c['b1']),
}
DECAYED = {'adamw', 'adafactor', 'lion', 'sgd'}
SCHEDULES = ('constant', 'cosine', 'linear', 'rsqrt', 'halving')


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """`tx` updates the players that train, which are the keys of `schedules`; the `frozen` ones have no state."""

  tx: optax.GradientTransformation
  schedules: dict[str, Schedule]
  frozen: frozenset[str]

  def init(self, params: Mapping[str, Any]) -> optax.OptState:
    """The optimiser state, from the whole tree of players."""
    return self.tx.init({player: params[player] for player in self.schedules})


def schedule(config: Mapping[str, Any], steps: int) -> Schedule:
  """The learning rate as a function of the step: linear warmup, then `config['schedule']`.

  'cosine' and 'linear' reach lr * lr_end after `steps`; 'halving' halves the rate every `half_life` steps.
  """
  kind, lr, warmup = config['schedule'], config['lr'], config['warmup']
  rest, end = max(steps - warmup, 1), lr * config['lr_end']
  if kind == 'constant':
    after = optax.constant_schedule(lr)
  elif kind == 'cosine':
    after = optax.cosine_decay_schedule(lr, rest, config['lr_end'])
  elif kind == 'linear':
    after = optax.linear_schedule(lr, end, rest)
  elif kind == 'rsqrt':
    shift = max(warmup, 1)
    after = lambda step: (
      lr * (shift / (jnp.maximum(step, 0) + shift)) ** 0.5
    )  # join_schedules also evaluates negative steps
  elif kind == 'halving':
    if config['half_life'] < 1:
      raise ValueError(
        f'optim.half_life is {config["half_life"]}; schedule "halving" needs a half-life of 1 or more steps.'
      )
    after = optax.exponential_decay(lr, config['half_life'], 0.5, staircase=True)
  else:
    raise ValueError(f'optim.schedule {kind!r} is unknown; expected one of {", ".join(SCHEDULES)}.')
  if not warmup:
    return after
  # (step + 1) / warmup, so that the first update already moves the parameters
  return optax.join_schedules([lambda step: lr * (step + 1) / warmup, after], [warmup])


def decay_mask(pattern: str) -> Callable[[Any], Any]:
  """Which leaves decay, by name. The default pattern takes kernels: no biases, norms, embeddings or positions."""
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator='/')
  return lambda params: jax.tree_util.tree_map_with_path(lambda p, _: bool(re.search(pattern, name(p))), params)


def transform(config: Mapping[str, Any], steps: int) -> optax.GradientTransformation:
  """Chains clipping by the global norm, the preconditioner, weight decay and the learning rate, which scales both.

  With `every` > 1 it updates only at steps 0, every, 2 * every, ...; the gradients of other steps are dropped.
  """
  name = config['name']
  if name not in PRECONDITIONERS:
    raise ValueError(f'optim.name {name!r} is unknown; expected one of {", ".join(PRECONDITIONERS)}.')
  for field in ('lr', 'lr_end', 'warmup', 'clip', 'weight_decay', 'eps'):
    if not config[field] >= 0:
      raise ValueError(f'optim.{field} is {config[field]}; expected 0 or more.')
  for field in ('b1', 'b2'):
    if not 0 <= config[field] < 1:
      raise ValueError(f'optim.{field} is {config[field]}; expected 0 or more and less than 1.')
  config_lib.check_regex('optim.decay', config['decay'])
  if config['weight_decay'] and name not in DECAYED:
    raise ValueError(f'optim.name {name!r} has no weight decay; use adamw, or set optim.weight_decay=0.0.')
  # An absent part keeps its place in the chain, which the names of the state's tensors contain: a checkpoint still fits
  # when clipping or decay is switched on or off.
  clip, decay = optax.identity(), optax.identity()
  if config['clip']:
    clip = optax.clip_by_global_norm(config['clip'])
  if config['weight_decay']:
    decay = optax.add_decayed_weights(config['weight_decay'], decay_mask(config['decay']))
  parts = [clip, PRECONDITIONERS[name](config), decay]
  every, rate = config['every'], schedule(config, steps)
  if every < 1:
    raise ValueError(f'optim.every is {every}; expected 1 or more steps per update.')
  if every == 1:
    return optax.chain(*parts, optax.scale_by_learning_rate(rate))
  whole = optax.chain(*parts, optax.scale_by_learning_rate(lambda updates: rate(updates * every)))
  return optax.conditionally_mask(whole, lambda step: step % every == 0)


def build(config: Mapping[str, Any], steps: int, players: list[str]) -> Optimizer:
  """Builds the optimiser of `players` from `config.optim`; each player is clipped by its own gradient norm.

  Raises ValueError for an unknown optimiser, schedule, player or field of a group, or a value of another type or out of
  range.
  """
  config = {**config, 'frozen': False}
  groups = {k: dict(v) for k, v in config.pop('groups').items()}
  if unknown := sorted(set(groups) - set(players)):
    raise ValueError(f'optim.groups has {unknown}, but the players are {players}.')
  merged = {p: ConfigDict(config) for p in players}
  for player, fields in groups.items():
    if extra := sorted(set(fields) - set(config)):
      raise ValueError(f'optim.groups.{player} has the unknown fields {extra}; expected {sorted(config)}.')
    for field, value in fields.items():
      try:
        merged[player][field] = value
      except TypeError as e:  # another type than that of `config`
        raise ValueError(f'optim.groups.{player}.{field} is {value!r}; expected a value like {config[field]!r}.') from e
  frozen = {p for p, c in merged.items() if c.frozen}
  trained = {p: c for p, c in merged.items() if p not in frozen}
  if not trained:
    raise ValueError(f'optim.groups freezes all players, {players}; leave one to train.')
  tx = optax.partition({p: transform(c, steps) for p, c in trained.items()}, lambda params: {k: k for k in params})
  return Optimizer(tx, {p: schedule(c, steps) for p, c in trained.items()}, frozenset(frozen))
