"""One jitted update of an objective: gradients over micro batches, the optimiser, the EMA of the parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from dalle_jax.training import host, sharding
from dalle_jax.training.plan import Plan
from dalle_jax.training.state import Context, Params, TrainState

Batch = Mapping[str, Any]


def make_step(
  plan: Plan,
) -> Callable[[TrainState, Mapping[str, Params], Batch], tuple[TrainState, dict[str, jax.Array], jax.Array]]:
  """Makes the jitted update `(state, frozen, batch) -> (state, metrics, whether all of them are finite)`.

  The update donates `state`. With `train.accum` > 1, gradients and metrics are means over that many micro batches,
  computed one after another; `data.group` consecutive rows stay in the same micro batch. If the rows of the objective
  are independent (`rows_apart`) and no parameter is split over 'data', each replica of the mesh sums the gradients of
  its own rows, and they are reduced once per update. Players that are frozen stay as they are, whatever `after_update`
  returns. Of `train.xla_options`, those that the compiler does not know are left out.
  """
  objective, optimizer, mesh, shardings = plan.objective, plan.optimizer, plan.mesh, plan.shardings
  seed, group, accum, ema = plan.config.seed, plan.config.data.group, plan.config.train.accum, plan.config.train.ema
  after_update = getattr(objective, 'after_update', lambda params, mutable: params)
  specs = [s.spec for player in optimizer.schedules for s in jax.tree.leaves(shardings.params[player])]
  split = any('data' in sharding.as_tuple(axes) for spec in specs for axes in spec)  # no replica has all parameters
  apart = getattr(objective, 'rows_apart', False) and mesh.shape.get('data', 1) > 1 and not split

  put = lambda x, *axes: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))

  def gradients(params: Params, context: Context, batch: Batch):
    trained = {player: params[player] for player in optimizer.schedules}
    loss_of = lambda trained: objective.loss({**params, **trained}, context, batch)
    (loss, (metrics, mutable)), grads = jax.value_and_grad(loss_of, has_aux=True)(trained)
    return grads, {'loss': loss, **metrics}, mutable

  def accumulated(params: Params, context: Context, batch: Batch, axes: Sequence[str]):
    """Means over the micro batches of a batch that is split over the mesh `axes`."""

    def split(x: jax.Array) -> jax.Array:
      # Micro batches are strided: each device keeps its rows, so nothing moves. (B, ...) -> (accum, B / accum, ...)
      x = x.reshape(-1, accum, group, *x.shape[1:]).swapaxes(0, 1)
      return put(x.reshape(accum, -1, *x.shape[3:]), None, axes)

    def body(carry, inputs):
      total, mutable = carry
      index, micro = inputs
      own = context.replace(mutable=mutable, rng=jax.random.fold_in(context.rng, index))
      grads, metrics, mutable = gradients(params, own, micro)
      total = jax.tree.map(lambda t, g, s: put(t + g, *s.spec), total, grads, where)
      return (total, mutable), metrics

    where = {player: shardings.params[player] for player in optimizer.schedules}
    zeros = {player: jax.tree.map(jnp.zeros_like, params[player]) for player in where}
    inputs = jnp.arange(accum), jax.tree.map(split, dict(batch))
    (grads, mutable), metrics = jax.lax.scan(body, (zeros, context.mutable), inputs)
    return jax.tree.map(lambda x: x / accum, grads), jax.tree.map(lambda x: x.mean(0), metrics), mutable

  def by_replica(params: Params, context: Context, batch: Batch):
    """The same, but each replica of the mesh axis 'data' accumulates separately: as [data, ...], reduced at the end."""
    count = mesh.shape['data']
    batch = jax.tree.map(lambda x: put(x.reshape(count, -1, *x.shape[1:]), 'data', 'fsdp'), dict(batch))
    one = lambda rng, rows: accumulated(params, context.replace(rng=rng), rows, ('fsdp',))[:2]
    with sharding.rules_without('data'):
      means = jax.vmap(one, spmd_axis_name='data')(jax.random.split(context.rng, count), batch)
    return (*jax.tree.map(lambda x: x.mean(0), means), context.mutable)

  def step(state: TrainState, frozen: Mapping[str, Params], batch: Batch):
    rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), state.step)  # init uses the seed itself
    context = Context(frozen, state.mutable, rng, state.step, train=True)
    if accum == 1:
      grads, metrics, mutable = gradients(state.params, context, batch)
    elif apart:
      if jax.tree.leaves(state.mutable):
        raise ValueError(
          f'{type(objective).__name__} has mutable state, {", ".join(sharding.flatten(state.mutable))}, whose updates '
          'separate replicas would lose; it must not set rows_apart.'
        )
      grads, metrics, mutable = by_replica(state.params, context, batch)
    else:
      grads, metrics, mutable = accumulated(state.params, context, batch, sharding.BATCH_AXES)

    trained = {player: state.params[player] for player in optimizer.schedules}
    opt_state = sharding.on_device(state.opt_state, shardings.opt_state)
    updates, opt_state = optimizer.tx.update(grads, opt_state, trained)
    written = after_update({**state.params, **jax.tree.map(jnp.add, trained, updates)}, mutable)
    params = {**state.params, **{player: written[player] for player in trained}}  # frozen ones stay as they are
    average = state.ema
    if ema:
      decay = jnp.minimum(ema, (1.0 + state.step) / (10.0 + state.step))  # a short memory while the model changes fast
      average = optax.incremental_update(params, average, 1 - decay)
    for player, schedule in optimizer.schedules.items():
      suffix = f'/{player}' if len(optimizer.schedules) > 1 else ''
      metrics[f'grad_norm{suffix}'] = optax.global_norm(grads[player])
      metrics[f'lr{suffix}'] = jnp.asarray(schedule(state.step), jnp.float32)
    finite = jnp.isfinite(jnp.stack([jnp.asarray(m, jnp.float32) for m in metrics.values()])).all()
    return TrainState(state.step + 1, params, opt_state, average, mutable), metrics, finite

  where = NamedSharding(mesh, PartitionSpec())
  options = host.convolution_options(where) if getattr(objective, 'convolutional', False) else {}
  options |= host.known_options(plan.config.train.xla_options, where)
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None, None), compiler_options=options)
