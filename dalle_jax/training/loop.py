"""The training loop, the same for every objective; read `train` from top to bottom.

`state.Objective` lists what an objective must have and may have.
"""

import contextlib
import functools
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

from dalle_jax.training import checkpoint, distributed, errors, sharding
from dalle_jax.training import metrics as metrics_lib
from dalle_jax.training import plan as plan_lib
from dalle_jax.training.metrics import Diverged
from dalle_jax.training.plan import Plan
from dalle_jax.training.state import Context, Objective, Params, TrainState
from dalle_jax.training.step import make_step
from dalle_jax.training.stop import StopSignal

LARGE_ON_CPU = 300_000_000  # parameters
Evaluator = Callable[[Params, Context], dict[str, Any]]  # name -> number, or uint8[H, W, 3] image


def _attempt(action: Callable[[], None]) -> None:
  """Calls `action`; prints its error as a warning."""
  try:
    action()
  except Exception as e:
    print(f'warning: {" ".join(str(e).split())}', flush=True)


@contextlib.contextmanager
def closing(close: Callable[[], None]) -> Iterator[None]:
  """Calls `close` at the end, whose error does not replace one that came before: it is then a warning."""
  try:
    yield
  except BaseException:
    _attempt(close)
    raise
  close()


def _nonfinite(state: TrainState) -> str | None:
  """The name of the first array of the state that is not finite; None if all are."""
  # One by one: a program for hundreds of arrays takes seconds to compile, those for each of their shapes do not.
  flags = {
    name: _all_finite(x, x.sharding)
    for name, x in sharding.flatten(state).items()
    if jnp.issubdtype(x.dtype, jnp.inexact)
  }
  return next((name for name, finite in jax.device_get(flags).items() if not finite), None)


@functools.partial(jax.jit, static_argnums=1)
def _all_finite(x: jax.Array, where: jax.sharding.Sharding) -> jax.Array:
  return jnp.isfinite(sharding.on_device(x, where)).all()  # parts of the state may be in host memory


def start_or_resume(plan: Plan, initial: Callable[[], Params] | None) -> tuple[TrainState, float]:
  """The state to train from, laid out as planned, and the seconds of training that went into it."""
  config = plan.config
  # 1. The newest whole checkpoint of this run
  if resumed := checkpoint.resume(config.run_dir, plan.state):
    state, meta = resumed
    return state, meta['seconds']
  state = plan.init()
  # 2. The parameters of another run, with fresh ones for those that it may lack
  if initial is not None:
    params = checkpoint.strict_merge(state.params, initial(), config.init.new)
    return state.replace(params=params, ema=jax.tree.map(jnp.copy, params) if config.train.ema else {}), 0.0
  # 3. Fresh parameters
  return state, 0.0


def _check_device(plan: Plan) -> None:
  c, device = plan.config.train, plan.mesh.devices.flat[0]
  if c.offload_optimizer and 'pinned_host' not in {m.kind for m in device.addressable_memories()}:
    raise ValueError(f'{device.device_kind} cannot keep arrays in host memory; set train.offload_optimizer=False.')
  parameters = sum(plan.parameters.values())
  if device.platform == 'cpu' and parameters > LARGE_ON_CPU and not c.allow_cpu:
    raise ValueError(
      f'{parameters:,} parameters would train on the CPU; install jax for your accelerator '
      f"(pip install -e '.[cuda]' or '.[tpu]'), or pass --config.train.allow_cpu=True if you mean it."
    )


def _describe(plan: Plan, frozen: Mapping[str, Params]) -> Iterator[str]:
  device = plan.mesh.devices.flat[0]
  yield f'devices: {plan.mesh.size} x {device.device_kind} ({device.platform}), mesh {dict(plan.mesh.shape)}'
  yield from plan.describe()
  for name, params in frozen.items():
    yield f'{name}: {plan_lib.count(params):,} parameters (frozen network)'


def train(
  config: ConfigDict,
  objective: Objective,
  batches: Callable[[int], Iterator[dict[str, np.ndarray]]],
  *,
  mesh: Mesh,
  frozen: Mapping[str, Params] | None = None,
  evals: Sequence[Evaluator] = (),
  meta: Mapping[str, Any] | None = None,
  initial: Callable[[], Params] | None = None,
) -> tuple[TrainState, bool]:
  """Trains `objective` until `config.train.steps`, from the newest checkpoint in `config.run_dir` if there is one.

  Args:
    batches: given a step, returns an endless iterator over this process's batches from that step on.
    mesh: from `sharding.use`, inside whose context this is called.
    frozen: parameters of networks that do not train, passed to every step.
    evals: called every `eval_every` steps with the EMA parameters (the plain ones without EMA).
    meta: stored in every checkpoint: config, tokenizer, frozen; the config is also written to RUN_DIR/config.json.
    initial: loads parameters of another run to start from (`checkpoint.strict_merge` with `config.init.new`), unless
      there is a checkpoint. They become those that are trained, so nobody else may hold them.

  Returns:
    The last state, and whether SIGTERM or Ctrl-C asked for a stop, which may also come after the last step.

  Raises:
    Diverged: a metric is not finite; the last checkpoint is from before that.
    ValueError: the config does not fit the devices or the checkpoint in the run directory.
  """
  c, run_dir = config.train, Path(config.run_dir)
  frozen = frozen or {}
  print_once = lambda text: print(text, flush=True) if jax.process_index() == 0 else None
  started = time.monotonic()
  with StopSignal() as stop:
    # --- Shapes and sizes ---------------------------------------------------------------------------------------------
    stream = batches(0)
    first = next(stream)
    part, parts = sharding.part_to_read(mesh)
    plan = Plan(config, objective, first, mesh, parts)
    for line in _describe(plan, frozen):
      print_once(line)
    _check_device(plan)
    # --- Start or resume ----------------------------------------------------------------------------------------------
    state, seconds = start_or_resume(plan, initial)
    start = int(state.step)
    due = lambda every, step: bool(every and step % every == 0)
    missed = False
    if evals and start and due(c.eval_every, start):  # after the checkpoint, so the run may have ended before it
      missed = bool(multihost_utils.broadcast_one_to_all(np.int32(not metrics_lib.logged(run_dir, start))))
    if start >= c.steps and not missed:
      print_once(f'{run_dir} is complete: {start} of {c.steps} steps; raise train.steps to continue.')
      return state, stop.received_by_any()
    distributed.keeps(lambda: checkpoint.describe_newest(run_dir))
    print_once(f'resuming at step {start}' if start else f'starting in {run_dir}')
    if start:
      stream = batches(start)
      first = next(stream)
    # --- The loop -----------------------------------------------------------------------------------------------------
    step_fn = make_step(plan)
    saves = checkpoint.manager(run_dir, c.keep)
    if meta:  # only now, when the config is known to fit the run
      checkpoint.write_json(run_dir / 'config.json', meta['config'])
    writer, progress = metrics_lib.Writer(run_dir, start), metrics_lib.Progress(start, c.steps)
    log = metrics_lib.Log(writer, progress, c.nan_guard)
    tokens = getattr(objective, 'tokens', lambda batch: 0)(plan.batch)
    flops = getattr(objective, 'flops', lambda batch: 0.0)(plan.batch)
    peak = c.peak_flops or metrics_lib.peak_flops(mesh.devices.flat[0])
    meter = metrics_lib.SpeedMeter(start, tokens, flops, peak * mesh.size if peak else None)
    elapsed = lambda: seconds + time.monotonic() - started

    def derived(step: int, more: Mapping[str, float] | None = None) -> dict[str, float]:
      """What is logged with the metrics of `step`."""
      return {**meter.read(step), 'seconds': elapsed(), **(more or {})}

    def evaluate(step: int) -> dict[str, float]:
      """Writes the images of all evaluations and returns their numbers."""
      rng = jax.random.fold_in(jax.random.key(config.seed), 2)  # the same noise at every evaluation
      context = Context(frozen, state.mutable, rng, state.step, train=False)
      numbers = {}
      for evaluator in evals:
        for name, value in evaluator(state.ema or state.params, context).items():
          if isinstance(value, np.ndarray):
            writer.image(step, name, value)
          else:
            numbers[name] = float(value)
      return numbers

    def save(step: int) -> bool:
      """Starts saving the state; False if it is not finite, and therefore not saved."""
      log.check()
      if parts < jax.process_count():  # processes that read the same part must have skipped the same broken records
        skipped = sorted(getattr(stream, 'skipped', {}).items())
        distributed.check_same({'the records that they could not read': str(skipped)}, among=part)
      if nonfinite := _nonfinite(state):
        if c.nan_guard:
          raise Diverged(f'{nonfinite} is not finite after step {step}')
        print_once(f'warning: {nonfinite} is not finite after step {step}; the state is not saved')
        return False
      checkpoint.save(saves, step, state, {**(meta or {}), 'axes': plan.axes, 'seconds': elapsed()})
      return True

    stopped = stop.received_by_any()  # by a signal whose KeyboardInterrupt got lost
    saved = start > 0  # whether the newest state that was to be saved was
    # All are closed, the writer last: on a full disk it fails, too, but the error of the checkpoint says more.
    with closing(writer.close), closing(lambda: checkpoint.close(saves)), closing(progress.close):
      try:
        if missed and not stopped:
          with meter.pause(state.step):
            writer.write(start, evaluate(start) | {'seconds': elapsed()})
        with stop.deferred():
          for step in range(start + 1, start + 1 if stopped else c.steps + 1):
            batch = sharding.put_batch(first if step == start + 1 else next(stream), mesh)
            state, metrics, finite = step_fn(state, frozen, batch)
            log.push(step, metrics, finite)
            if step == start + 1:
              jax.block_until_ready(metrics)
              progress.print(f'first step after {time.monotonic() - started:.1f} s (compilation included)')
              if c.log_every > 1:
                meter.restart(step)
            log.read()  # what became due one step ago
            checkpoint.check(saves)
            stopping, last = stop.agreed(), step == c.steps
            evaluates = bool(evals) and due(c.eval_every, step)
            # An evaluation step's metrics are logged with its results: no line means that the evaluation was missed.
            if not evaluates and (last or due(c.log_every, step)):
              log.schedule(functools.partial(derived, step))
            if stopping or last or due(c.checkpoint_every, step):
              log.read()
              with meter.pause(state.step):
                saved = save(step)
            if evaluates and not stopping:  # after saving, because the run may have to end during the evaluation
              log.check()
              with meter.pause(state.step):
                numbers = evaluate(step)
              log.schedule(functools.partial(derived, step, numbers))
            progress.update()
            if stopping:
              break
          log.read()
          checkpoint.finish(saves)
          stopped = stop.received_by_any()
          if stopped:
            how = 'and saved' if saved else f'without saving; {checkpoint.describe_newest(run_dir)}'
            progress.print(f'stopped at step {int(state.step)} {how}; run the same command to resume.')
      except Diverged as e:
        _attempt(lambda: checkpoint.finish(saves))
        where = checkpoint.describe_newest(run_dir)
        raise Diverged(f'{e}; stopped, {where}. Lower optim.lr, or set optim.clip and optim.warmup.') from None
      except (Exception, KeyboardInterrupt) as e:
        if distributed.joined():  # closing would wait for the other processes, and they wait for this one
          errors.report(e, debug=False)
        raise
    return state, stopped
