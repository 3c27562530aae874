"""The training loop: one for every objective, read from top to bottom.

What an objective must and may have is listed at `state.Objective`.
"""

import contextlib
import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dalle_jax.training import checkpoint, distributed, errors, optim, sharding
from dalle_jax.training import metrics as metrics_lib
from dalle_jax.training import state as state_lib
from dalle_jax.training.metrics import Diverged
from dalle_jax.training.state import Context, Objective, Params, TrainState
from dalle_jax.training.step import make_step

LARGE_ON_CPU = 300_000_000  # parameters
Evaluator = Callable[[Params, Context], dict[str, Any]]  # name -> number, or uint8[H, W, 3] picture


class StopSignal:
  """Notes SIGTERM and the first Ctrl-C; a second one acts as usual. With several processes, one stops all."""

  def __enter__(self):
    self.seen, self.asked, self.old = False, False, {}
    if threading.current_thread() is threading.main_thread():
      self.old = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
    return self

  def _note(self, number, frame):
    self.seen = True
    self.__exit__()

  def __exit__(self, *_):
    for number, handler in self.old.items():
      signal.signal(number, handler)

  def agreed(self) -> bool:
    """Whether to stop now, at the same step in all processes."""
    if not distributed.joined():
      return self.seen
    if self.seen and not self.asked:
      self.asked = True
      distributed.ask_to_stop()
    return distributed.reached_stop()

  def seen_by_any(self) -> bool:
    """Whether any process has been asked to stop; all processes must call it together."""
    if not distributed.joined():
      return self.seen
    return bool(multihost_utils.process_allgather(np.array(self.seen)).any())


def _finite(tree: Any) -> jax.Array:
  leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
  return _all_finite(tuple(leaves), tuple(x.sharding for x in leaves)) if leaves else jnp.asarray(True)


@functools.partial(jax.jit, static_argnums=1)
def _all_finite(leaves: tuple[jax.Array, ...], where: tuple[Any, ...]) -> jax.Array:
  leaves = sharding.on_device(leaves, where)  # parts of the state may be in the memory of the host
  return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()


def _nonfinite_name(state: TrainState) -> str:
  return next((k for k, v in sharding.flatten(state).items() if not bool(_finite(v))), 'the state')


def train(
  config: ConfigDict,
  objective: Objective,
  batches: Callable[[int], Iterator[dict[str, np.ndarray]]],
  *,
  mesh: Mesh,
  frozen: Mapping[str, Params] | None = None,
  evals: Sequence[Evaluator] = (),
  meta: Mapping[str, Any] | None = None,
  initial: Params | None = None,
) -> tuple[TrainState, bool]:
  """Trains `objective` until `config.train.steps`, from the newest checkpoint in `config.run_dir` if there is one.

  Args:
    batches: from a step, the batches of this process from that step on, for ever.
    mesh: of `sharding.use`, inside whose context this is called.
    frozen: parameters of networks that do not train, passed to every step.
    evals: called every `eval_every` steps with the EMA parameters (the plain ones without EMA).
    meta: stored in every checkpoint: config, tokenizer, frozen.
    initial: parameters of another run to start from (`checkpoint.strict_merge` with `config.init.new`).

  Returns:
    The last state, and whether SIGTERM or Ctrl-C asked for a stop, which may also come after the last step.

  Raises:
    Diverged: a metric is not finite; the last checkpoint is from before.
    ValueError: the config does not fit the devices, or not the checkpoint in the run directory.
  """
  c, run_dir = config.train, Path(config.run_dir)
  for name in ('steps', 'accum', 'log_every', 'keep'):
    if c[name] < 1:
      raise ValueError(f'train.{name} is {c[name]}; expected 1 or more.')
  frozen = frozen or {}
  say = lambda text: print(text, flush=True) if jax.process_index() == 0 else None
  started = time.monotonic()
  # --- Shapes and sizes -----------------------------------------------------------------------------------------------
  stream = batches(0)
  first = next(stream)
  part, parts = sharding.part_to_read(mesh)
  spec = state_lib.batch_spec(first, parts)
  size, shards, group = next(iter(spec.values())).shape[0], sharding.batch_shards(mesh), config.data.group
  least = shards * (c.accum * group if c.accum > 1 else 1)
  if size % least:
    raise ValueError(
      f'data.batch_size {size} is not divisible by {shards} (mesh data x fsdp) x {c.accum} (train.accum) x {group} '
      f'(data.group, if accumulating); the nearest is {max(1, round(size / least)) * least}.'
    )
  params, mutable, axes = state_lib.abstract(objective, spec, mesh, config.rules)
  optimizer = optim.build(config.optim, c.steps, list(params))
  target = state_lib.abstract_state(params, mutable, optimizer, c.ema > 0, mesh, c.offload_optimizer)
  count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
  device = mesh.devices.flat[0]
  if c.offload_optimizer and 'pinned_host' not in {m.kind for m in device.addressable_memories()}:
    raise ValueError(
      f'{device.device_kind} cannot keep arrays in the memory of the host; set train.offload_optimizer=False.'
    )
  say(f'devices: {mesh.size} x {device.device_kind} ({device.platform}), mesh {dict(mesh.shape)}')
  for name, tree in params.items():
    say(f'{name}: {count(tree):,} parameters{" (frozen)" if name in optimizer.frozen else ""}')
  for name, tree in frozen.items():
    say(f'{name}: {count(tree):,} parameters (frozen network)')
  if device.platform == 'cpu' and count(params) > LARGE_ON_CPU and not c.allow_cpu:
    raise ValueError(
      f'{count(params):,} parameters would train on the CPU; install jax for your accelerator '
      f"(pip install -e '.[cuda]' or '.[tpu]'), or pass --config.train.allow_cpu=True if you mean it."
    )
  # --- Resume, or start -----------------------------------------------------------------------------------------------
  found = checkpoint.resume(run_dir, target)  # 1. this run's newest whole checkpoint
  if found:
    state, seconds = found[0], found[1]['seconds']
  else:
    state, seconds = state_lib.init(objective, target, optimizer, config.seed, spec), 0.0  # 3. fresh parameters
    if initial is not None:  # 2. another run's parameters
      merged = checkpoint.strict_merge(state.params, initial, config.init.new)
      state = state.replace(params=merged, ema=jax.tree.map(jnp.copy, merged) if c.ema else {})
  start = int(state.step)
  missed = bool(found and evals and c.eval_every and start % c.eval_every == 0)
  if missed:  # it comes after the checkpoint: a run may have ended in the middle of it
    missed = bool(multihost_utils.broadcast_one_to_all(np.int32(not metrics_lib.logged(run_dir, start))))
  if start >= c.steps and not missed:
    say(f'{run_dir} is complete: {start} of {c.steps} steps; raise train.steps to go on.')
    return state, False
  distributed.keeps(lambda: checkpoint.describe_newest(run_dir))
  say(f'resuming at step {start}' if start else f'starting in {run_dir}')
  if start:
    stream = batches(start)
    first = next(stream)
  # --- The loop -------------------------------------------------------------------------------------------------------
  shardings = jax.tree.map(lambda x: x.sharding, target)
  step_fn = make_step(
    objective,
    optimizer,
    seed=config.seed,
    accum=c.accum,
    ema=c.ema,
    mesh=mesh,
    shardings=shardings,
    group=group,
    xla_options=c.xla_options,
  )
  saves = checkpoint.manager(run_dir, c.keep)
  writer, progress = metrics_lib.Writer(run_dir, start), metrics_lib.Progress(start, c.steps)
  log = metrics_lib.Log(writer, progress, c.nan_guard)
  tokens = getattr(objective, 'tokens', lambda batch: 0)(spec)
  flops = getattr(objective, 'flops', lambda batch: 0.0)(spec)
  peak = c.peak_flops or metrics_lib.peak_flops(device)
  elapsed = lambda: seconds + time.monotonic() - started
  last = [start, time.monotonic()]  # step and time of the last reading, for the speed of training alone

  @contextlib.contextmanager
  def pause() -> Iterator[None]:
    jax.block_until_ready(state.step)
    begun = time.monotonic()
    yield
    last[1] += time.monotonic() - begun

  def speed(step: int, more: Mapping[str, float] | None = None) -> dict[str, float]:
    rate = (step - last[0]) / max(time.monotonic() - last[1], 1e-9)  # steps/s
    last[:] = [step, time.monotonic()]
    values = {'steps_per_second': rate} | ({'tokens_per_second': rate * tokens} if tokens else {})
    if flops and peak:
      values['utilisation'] = rate * flops / (peak * mesh.size)
    return values | {'seconds': elapsed(), **(more or {})}

  def evaluate(step: int) -> dict[str, float]:
    rng = jax.random.fold_in(jax.random.key(config.seed), 2)  # the same noise at every evaluation
    context = Context(frozen, state.mutable, rng, state.step, train=False)
    results = [e(state.ema or state.params, context) for e in evals]
    found = {name: value for result in results for name, value in result.items()}
    pictures = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
    for name, picture in pictures.items():
      writer.image(step, name, picture)
    return {name: float(value) for name, value in found.items() if name not in pictures}

  def save(step: int) -> bool:
    """Starts saving the state; False if it is not finite, and therefore not saved."""
    log.check()
    if parts < jax.process_count():  # those that read the same part must have skipped the same broken records
      skipped = sorted(getattr(stream, 'skipped', {}).items())
      distributed.check_same({'the records that they could not read': str(skipped)}, among=part)
    if not bool(_finite(state)):
      if c.nan_guard:
        raise Diverged(f'{_nonfinite_name(state)} is not finite after step {step}')
      say(f'warning: the state is not finite after step {step}; it is not saved')
      return False
    checkpoint.save(saves, step, state, {**(meta or {}), 'axes': axes, 'seconds': elapsed()})
    return True

  saved = True  # the last state that was to be saved
  try:
    if missed:
      with pause():
        writer.write(start, evaluate(start) | {'seconds': elapsed()})
    with StopSignal() as stop:
      for step in range(start + 1, c.steps + 1):
        batch = sharding.put_batch(first if step == start + 1 else next(stream), mesh)
        state, metrics, finite = step_fn(state, frozen, batch)
        log.push(step, metrics, finite)
        if step == start + 1:
          jax.block_until_ready(metrics)
          progress.say(f'first step after {time.monotonic() - started:.1f} s (compilation included)')
          last[:] = [step, time.monotonic()] if c.log_every > 1 else last
        log.read()  # what became due one step ago
        stopping = stop.agreed()
        evaluates = bool(evals and c.eval_every and step % c.eval_every == 0)
        # The metrics of an evaluation step are logged with its results: no line means that the evaluation was missed.
        if (step % c.log_every == 0 or step == c.steps) and not evaluates:
          log.schedule(functools.partial(speed, step))
        if stopping or step == c.steps or (c.checkpoint_every and step % c.checkpoint_every == 0):
          log.read()
          with pause():
            saved = save(step)
        if evaluates and not stopping:  # after saving, as a run may have to end in the middle of it
          log.check()
          with pause():
            values = evaluate(step)
          log.schedule(functools.partial(speed, step, values))
        progress.update()
        if stopping:
          break
      log.read()
      checkpoint.finish(saves)
      stopped = stop.seen_by_any()
      if stopped:
        kept = 'and saved' if saved else f'without saving; {checkpoint.describe_newest(run_dir)}'
        progress.say(f'stopped at step {int(state.step)} {kept}; run the same command to go on.')
  except Diverged as e:
    checkpoint.finish(saves)
    where = checkpoint.describe_newest(run_dir)
    raise Diverged(f'{e}; stopped, {where}. Lower optim.lr, or set optim.clip and optim.warmup.') from None
  except (Exception, KeyboardInterrupt) as e:
    if distributed.joined():  # to close what is open waits for the others, and they wait for this process
      errors.report(e, debug=False)
    raise
  finally:
    progress.close()
    writer.close()
    saves.close()
  return state, stopped
