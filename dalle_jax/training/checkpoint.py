"""Checkpoints: asynchronous, atomic, restorable onto any mesh, and checked tensor by tensor before they are read.

A run directory holds config.json, checkpoints/STEP/{state, meta} and frozen/NAME, which is itself a run directory with
the parameters of a frozen network. `meta` is JSON with the fields config, tokenizer, frozen, seconds and axes (the
logical axis names of every parameter, from which it can be laid out over any mesh).
"""

import dataclasses
import itertools
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from dalle_jax.training import distributed, hub, sharding

Params = Any
# Orbax logs every step it takes; whatever goes wrong reaches us as an exception.
logging.getLogger('absl').addFilter(lambda record: 'orbax' not in record.pathname)
logging.getLogger('asyncio').addFilter(lambda record: 'orbax' not in record.getMessage())
# Replicas share the writing of large arrays only: slicing an array for that takes a compiled program for each shape.
_TYPES = ocp.type_handlers.create_type_handler_registry(
  (jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)),
  *((kind, ocp.type_handlers.get_type_handler(kind)) for kind in (np.ndarray, np.number, int, float)),
)


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained run: `params` is keyed by player ({'dalle': ...}), `frozen` maps names to run directories.

  `path` is as it was given, and `origin` identifies the training (see the function of that name).
  """

  config: dict
  params: Params
  tokenizer: str | None
  step: int
  path: str
  frozen: dict[str, str] = dataclasses.field(default_factory=dict)
  axes: dict[str, list] = dataclasses.field(default_factory=dict)
  origin: str = ''

  def network(self, name: str) -> Params:
    """The parameters of one network: the player with that name, or the only player."""
    if name in self.params:
      return self.params[name]
    if len(self.params) == 1:
      return next(iter(self.params.values()))
    raise ValueError(f'{self.path} holds the networks {sorted(self.params)}; none is named {name!r}.')


# --- Writing


def manager(run_dir: str | Path, keep: int, background: bool = True) -> ocp.CheckpointManager:
  """A manager that keeps the newest `keep` checkpoints of a run.

  Saving in the `background` needs a copy of all arrays on the host; without it at most 1 GB is in flight at a time.
  Raises ValueError for a directory in which Orbax could not save.
  """
  directory = Path(run_dir).absolute() / 'checkpoints'
  if re.search(r'\[[^/]+\]', str(directory)):  # a pattern for Orbax, which then misses most of what it has just written
    raise ValueError(
      f'checkpoints cannot be saved in {directory.parent}: its name has square brackets; choose another.'
    )
  options = ocp.CheckpointManagerOptions(
    max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=background
  )
  state = ocp.PyTreeCheckpointHandler(save_concurrent_gb=None if background else 1, type_handler_registry=_TYPES)
  handlers = {'state': state, 'meta': ocp.JsonCheckpointHandler()}
  return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


def save(target: ocp.CheckpointManager, step: int, state: Any, meta: Mapping[str, Any]) -> None:
  """Starts an asynchronous save. Raises OSError naming the directory if this or the previous save failed."""
  try:
    target.wait_until_finished()
    target.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(dict(meta))))
  except Exception as e:
    _raise_save_error(target, e)


def finish(target: ocp.CheckpointManager) -> None:
  """Waits for the save in progress. Raises OSError naming the directory if it failed."""
  try:
    target.wait_until_finished()
  except Exception as e:
    _raise_save_error(target, e)


def check(target: ocp.CheckpointManager) -> None:
  """Raises OSError like `save` if a save has failed by now; does not wait for one in progress."""
  if not target.is_saving_in_progress():
    finish(target)


def close(target: ocp.CheckpointManager) -> None:
  """Waits for the save in progress and ends the manager. Raises OSError like `finish`."""
  try:
    target.close()
  except Exception as e:
    _raise_save_error(target, e)


def _raise_save_error(target: ocp.CheckpointManager, e: Exception) -> NoReturn:
  if distributed.is_loss(e):
    raise e
  kept = describe_newest(target.directory.parent)
  if re.search('no space left|quota exceeded', str(e), re.IGNORECASE):
    raise OSError(
      f'the disk is full: {target.directory} has no room for another checkpoint ({kept}); free some space, then run '
      'the same command again.'
    ) from e
  raise OSError(
    f'saving to {target.directory} failed ({kept}): {_one_line(e)}; fix this, then run the same command again.'
  ) from e


def _one_line(e: Exception) -> str:
  text = ' '.join(str(e).split())
  return f'{type(e).__name__}: {text[:300]}'


def export_run(path: str | Path, run: Run, *, mesh: Mesh | None = None, rules: sharding.Rules = ()) -> None:
  """Writes `run` as a run directory that holds only parameters (no optimiser state, no separate EMA) and frozen runs.

  With several processes all must call it, with a run that was loaded onto a mesh of all their devices.
  """
  path = Path(path)
  path.mkdir(parents=True, exist_ok=True)
  for name, source in run.frozen.items():
    if Path(source).absolute() == (path / 'frozen' / name).absolute():
      continue  # it is already there
    export_run(path / 'frozen' / name, load_run(source, mesh=mesh, rules=rules), mesh=mesh, rules=rules)
  meta = {'config': run.config, 'tokenizer': run.tokenizer, 'axes': run.axes, 'seconds': 0.0}
  meta['origin'] = run.origin
  meta['frozen'] = {name: f'frozen/{name}' for name in run.frozen}
  write_json(path / 'config.json', run.config)
  target = manager(path, keep=1, background=False)
  save(target, run.step, {'params': run.params}, meta)
  close(target)


def origin(run_dir: str | Path) -> str:
  """Identifies the training run that the newest checkpoint comes from, also in copies by `export_run`; '' for none."""
  run_dir = Path(run_dir).expanduser()
  meta = read_meta(run_dir)
  if meta is None:
    return ''
  return meta.get('origin') or f'{Path(run_dir).absolute()}, step {steps(run_dir)[0]}, {meta["seconds"]:.3f} s'


def write_json(path: str | Path, value: Any) -> None:
  """Writes JSON atomically, in process 0 only."""
  if jax.process_index() == 0:
    partial = Path(f'{path}.tmp')
    partial.write_text(json.dumps(value, indent=2) + '\n')
    os.replace(partial, path)


# --- Reading


def steps(run_dir: str | Path) -> list[int]:
  """The steps that have a checkpoint, newest first; [] if there are none."""
  path = Path(run_dir) / 'checkpoints'
  names = [p.name for p in path.iterdir() if p.is_dir()] if path.is_dir() else []
  return sorted((int(n) for n in names if n.isdigit()), reverse=True)


def describe_newest(run_dir: str | Path) -> str:
  """What a run would resume from, for messages."""
  newest = next(iter(steps(run_dir)), None)
  return 'there is no checkpoint yet' if newest is None else f'the checkpoint of step {newest} is kept'


def read_meta(run_dir: str | Path, step: int | None = None) -> dict | None:
  """The meta of a checkpoint, by default of the newest one whose meta can be read; None if there is none."""
  for s in steps(run_dir) if step is None else [step]:
    try:
      return json.loads((Path(run_dir) / 'checkpoints' / str(s) / 'meta' / 'metadata').read_text())
    except (OSError, json.JSONDecodeError):
      if step is not None:
        raise
  return None


def nothing_to_load(path: str | Path, run_dir: Path) -> FileNotFoundError:
  """The error for a run, given as `path`, without a checkpoint that can be read."""
  if steps(run_dir):
    return FileNotFoundError(
      f'{path} has no checkpoint that can be read: all of them are damaged; pass the directory of another trained run.'
    )
  return FileNotFoundError(f'{path} has no checkpoints; pass the run_dir of a run that has saved at least once.')


def read_about(path: str | Path) -> dict:
  """The newest meta of the run at `path` (see `load_run`). Raises FileNotFoundError if it has no checkpoint."""
  run_dir = hub.local(path)
  meta = read_meta(run_dir)
  if meta is None:
    raise nothing_to_load(path, run_dir)
  return meta


def read_config(path: str | Path) -> dict:
  """The config of the run at `path`, as `read_about`."""
  return read_about(path)['config']


def _describe(leaf: Any) -> str:
  return f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}'


def differences(expected: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
  """One line for each tensor that a strict load must refuse: missing, unexpected, or with another shape or dtype."""
  lines = [f'missing {k} {_describe(expected[k])}' for k in sorted(set(expected) - set(saved))]
  lines += [f'unexpected {k} {_describe(saved[k])}' for k in sorted(set(saved) - set(expected))]
  for k in sorted(set(expected) & set(saved)):
    if _describe(expected[k]) != _describe(saved[k]):
      lines.append(f'{k} is {_describe(saved[k])}, expected {_describe(expected[k])}')
  return lines


class _Mismatch(ValueError):
  """The checkpoint is intact but belongs to another model."""


def _tree(path: Path) -> Any:
  """The tree of shapes and dtypes in a checkpoint, as recorded by Orbax. Raises for an incomplete directory."""
  found = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).metadata(path / 'state').item_metadata
  if found is None:
    raise OSError('its state is not whole')
  return found.tree


def _saved(path: Path) -> dict[str, Any]:
  """Shapes and dtypes in a checkpoint by tensor name. Raises for an incomplete directory."""
  return sharding.flatten(_tree(path))


def _restore(path: Path, target: Any, *, partial: bool = False) -> Any:
  """Reads the tree `target` of shapes with shardings, checking it against the shapes that were saved.

  With `partial`, tensors that `target` lacks are left unread. Raises _Mismatch for any other difference.
  """
  expected, tree = sharding.flatten(target), _tree(path)
  saved = {k: v for k, v in sharding.flatten(tree).items() if k in expected or not partial}
  if lines := differences(expected, saved):  # Orbax would silently cast dtypes and crop or pad shapes
    lines.sort(key=lambda line: 'params/' not in line)  # moments and EMA only repeat what the parameters say
    raise _Mismatch(f'{path} does not fit this config: {_summary(lines)}.')
  # Orbax is asked for the tree that it saved, as parts of `target` without tensors may differ, e.g. without decay.
  name = lambda keys: jax.tree_util.keystr(keys, simple=True, separator='/')
  item = jax.tree_util.tree_map_with_path(lambda keys, _: expected.get(name(keys), ocp.PLACEHOLDER), tree)
  args = ocp.args.PyTreeRestore(item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))
  read = sharding.flatten(ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(path / 'state', args=args))
  return jax.tree_util.tree_map_with_path(lambda keys, _: read[name(keys)], target)


def _summary(lines: Sequence[str], limit: int = 20) -> str:
  more = f'; and {len(lines) - limit} more' if len(lines) > limit else ''
  return '; '.join(lines[:limit]) + more


def _newest_whole(run_dir: Path, read: Any) -> tuple[int, Any]:
  """Returns (step, read(path)) for the newest checkpoint that can be read; prints a warning for each that cannot."""
  for step in steps(run_dir):
    try:
      return step, read(run_dir / 'checkpoints' / str(step))
    except _Mismatch:
      raise
    except Exception as e:
      if jax.process_count() > 1:  # another process may be able to read its part, and would resume at another step
        raise OSError(
          f'checkpoint {step} of {run_dir} is damaged; remove it to resume from the one before ({_one_line(e)})'
        ) from e
      print(f'warning: checkpoint {step} of {run_dir} is damaged, trying the one before ({_one_line(e)})', flush=True)
  raise nothing_to_load(run_dir, run_dir)


def resume(run_dir: str | Path, target: Any) -> tuple[Any, dict] | None:
  """Reads the newest whole checkpoint of a run as (state, meta), laid out like `target`; None if there are none.

  Newer ones that are damaged are renamed to STEP.damaged (STEP.damaged_2 if that name is taken, and so on), so that the
  step can be saved again. Raises ValueError if the checkpoint belongs to another model, FileNotFoundError if there are
  checkpoints but none can be read.
  """
  run_dir = Path(run_dir).absolute()
  if not steps(run_dir):
    return None
  read = lambda path: (_restore(path, target), read_meta(run_dir, int(path.name)))
  step, (state, meta) = _newest_whole(run_dir, read)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('resumed')
  for later in [s for s in steps(run_dir) if s > step]:
    if jax.process_index() == 0:
      path = run_dir / 'checkpoints' / str(later)
      names = itertools.chain([f'{later}.damaged'], (f'{later}.damaged_{i}' for i in itertools.count(2)))
      path.rename(next(p for p in map(path.with_name, names) if not p.exists()))
  return state, meta


def load_run(
  path: str | Path, *, mesh: Mesh | None = None, rules: sharding.Rules = (), ema: bool = True, step: int | None = None
) -> Run:
  """Loads the networks of a run, whatever mesh they were trained on; with `ema`, their EMA if the run has one.

  `path` is a run directory, or the name of a Hugging Face repository that holds one (see `training.hub`). Without
  `mesh` the arrays are stored on the first device, with it they are laid out by `rules`. Loads the newest whole
  checkpoint unless `step` names one. Raises FileNotFoundError if there is nothing to load, OSError if the checkpoint of
  `step` is damaged.
  """
  run_dir = hub.local(path).absolute()
  if not steps(run_dir):
    raise nothing_to_load(path, run_dir)
  if step is not None and step not in steps(run_dir):
    raise FileNotFoundError(f'{path} has no checkpoint of step {step}; there are {steps(run_dir)}.')

  def read(source: Path) -> tuple[Params, dict]:
    meta = read_meta(run_dir, int(source.name))
    saved = _saved(source)
    key = 'ema' if ema and any(k.startswith('ema/') for k in saved) else 'params'
    flat = {k.removeprefix(f'{key}/'): v for k, v in saved.items() if k.startswith(f'{key}/')}

    def place(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
      if mesh is None:
        where = SingleDeviceSharding(jax.local_devices()[0])
      else:
        spec = sharding.partition(meta['axes'].get(name, ()), leaf.shape, mesh, rules)
        where = NamedSharding(mesh, spec if name in meta['axes'] else PartitionSpec())
      return jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype, sharding=where)

    target = {key: traverse_util.unflatten_dict({k: place(k, v) for k, v in flat.items()}, sep='/')}
    return _restore(source, target, partial=True)[key], meta

  if step is not None:
    try:
      params, meta = read(run_dir / 'checkpoints' / str(step))
    except Exception as e:  # as in _newest_whole
      raise OSError(f'checkpoint {step} of {path} is damaged; pass another step ({_one_line(e)})') from e
  else:
    step, (params, meta) = _newest_whole(run_dir, read)
  frozen = {k: str(run_dir / v) for k, v in meta['frozen'].items()}
  return Run(meta['config'], params, meta['tokenizer'], step, str(path), frozen, meta['axes'], origin(run_dir))


def strict_merge(params: Params, loaded: Params, new: str = '') -> Params:
  """Replaces every tensor of `params` with the one in `loaded`, laid out like the tensor that it replaces.

  What is already laid out so is not copied: the result takes over the arrays of `loaded`.
  Only tensors whose whole name matches the regular expression `new` may be missing and keep their initial values.
  Raises ValueError naming every tensor that is missing, unexpected, or has another shape or dtype.
  """
  ours, theirs = sharding.flatten(params), sharding.flatten(loaded)
  fresh = {k for k in ours if k not in theirs and new and re.fullmatch(new, k)}
  if lines := differences({k: v for k, v in ours.items() if k not in fresh}, theirs):
    raise ValueError(f'the loaded parameters do not fit: {"; ".join(lines)}; names that may be new: {new!r}.')

  def take(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return leaf if name in fresh else jax.device_put(theirs[name], leaf.sharding)

  return jax.tree_util.tree_map_with_path(take, params)
