"""Converts the tensors of a public checkpoint to the parameters of our modules by a table of rows (ours, theirs, op).

Every tensor has to be accounted for: one that is missing, unknown, used twice or of the wrong shape is an error that
names it. The expected shapes are those of our modules, which are built from the config next to the checkpoint.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from dalle_jax.training import checkpoint, sharding

Op = Callable[..., np.ndarray]
SHOWN = 12  # problems listed in an error message


@dataclasses.dataclass(frozen=True)
class Row:
  """How one of our tensors is made.

  Attributes:
    ours: its name in our parameter tree.
    theirs: the names in their state dict that it is made from: one tuple per layer of a stacked tensor, otherwise one.
    op: computes our tensor from those arrays.
    stacked: whether our tensor has a leading layer axis.
    missing: the fill value if the checkpoint has none of `theirs`; with None that is an error.
  """

  ours: str
  theirs: tuple[tuple[str, ...], ...]
  op: Op
  stacked: bool = False
  missing: float | None = None


def row(ours: str, theirs: str | Sequence[str], op: Op | None = None, missing: float | None = None) -> Row:
  """A row for a tensor without a layer axis."""
  names = (theirs,) if isinstance(theirs, str) else tuple(theirs)
  return Row(ours, (names,), op or same, missing=missing)


def stacked(rows: Iterable[Row], depth: int, period: int = 1) -> list[Row]:
  """Turns the rows of one block into those of a `layers.transformer.Stack` with `depth` layers.

  In our names `{block}` stands for the block of the period, in theirs `{i}` for the layer number, from 0.
  """
  result = []
  for r in rows:
    for j in range(period):
      layers = range(j, depth, period)
      theirs = tuple(tuple(name.replace('{i}', str(i)) for name in r.theirs[0]) for i in layers)
      ours = r.ours.replace('{block}', f'block_{j}')
      result.append(Row(ours, theirs, r.op, stacked=True, missing=r.missing))
  return result


# --- Operations


def same(x: np.ndarray) -> np.ndarray:
  return x


def linear(x: np.ndarray) -> np.ndarray:
  """[out, in] -> [in, out]."""
  return x.T


def conv(x: np.ndarray) -> np.ndarray:
  """[out, in, h, w] -> [h, w, in, out]."""
  return x.transpose(2, 3, 1, 0)


def part(index: int, count: int, op: Op = same) -> Op:
  """Applies `op` to part `index` of `count` equal parts along the first axis."""
  return lambda x: op(np.split(x, count)[index])


def norm(ours: str, theirs: str) -> list[Row]:
  """Scale and bias of a LayerNorm or GroupNorm."""
  return [row(f'{ours}/scale', f'{theirs}.weight'), row(f'{ours}/bias', f'{theirs}.bias')]


def dense(ours: str, theirs: str, bias: bool = True, missing: float | None = None) -> list[Row]:
  """Kernel and bias of a linear map; our kernel may have separate axes for heads."""
  rows = [row(f'{ours}/kernel', f'{theirs}.weight', linear)]
  return [*rows, row(f'{ours}/bias', f'{theirs}.bias', missing=missing)] if bias else rows


def conv2d(ours: str, theirs: str, bias: bool = True) -> list[Row]:
  rows = [row(f'{ours}/kernel', f'{theirs}.weight', conv)]
  return [*rows, row(f'{ours}/bias', f'{theirs}.bias')] if bias else rows


def fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
  """Whether splitting or merging neighbouring axes converts one shape: [D, D] to [D, H, K], [1, C, 1, 1] to [C]."""
  ends = lambda s: set(np.cumprod([n for n in s if n != 1]).tolist())
  a, b = ends(shape), ends(wanted)
  return math.prod(shape) == math.prod(wanted) and (a <= b or b <= a)


# --- The engine


def convert(
  source: str,
  rows: Sequence[Row],
  theirs: Mapping[str, Any],
  expected: Mapping[str, Any],
  ignore: Sequence[str] = (),
) -> dict[str, np.ndarray]:
  """Returns our parameters by name, as float32 arrays.

  Args:
    source: the name of the checkpoint in error messages.
    theirs: tensors by name: arrays, or anything with `shape` and `numpy()`; they are read one at a time.
    expected: our parameters by name; only their shapes are read.
    ignore: regular expressions for the names of tensors that are left out on purpose.

  Raises ValueError naming every tensor that is missing, unexpected, used twice, or of the wrong shape.
  """
  if problems := _audit(rows, theirs, expected, ignore):
    more = f'; and {len(problems) - SHOWN} more' if len(problems) > SHOWN else ''
    raise ValueError(f'{source} does not fit its config: {"; ".join(problems[:SHOWN])}{more}.')
  params: dict[str, np.ndarray] = {}
  for r in rows:
    shape = tuple(expected[r.ours].shape)
    if _absent(r, theirs):
      params[r.ours] = np.full(shape, r.missing, np.float32)
      continue
    value = np.empty(shape, np.float32)
    for layer, names in enumerate(r.theirs):
      target = value[layer : layer + 1] if r.stacked else value
      target[...] = r.op(*(_read(theirs[name], name) for name in names)).reshape(target.shape)
    params[r.ours] = value
  return params


def _audit(
  rows: Sequence[Row], theirs: Mapping[str, Any], expected: Mapping[str, Any], ignore: Sequence[str]
) -> list[str]:
  """Every reason why the rows do not turn the checkpoint into our parameters; no tensor is read."""
  ignored = {k for k in theirs if any(re.fullmatch(pattern, k) for pattern in ignore)}
  # One tensor may go into several of ours by different operations, such as `part`.
  used = Counter((name, id(r.op)) for r in rows for names in r.theirs for name in names)
  known = {name for name, _ in used}
  ours = Counter(r.ours for r in rows)
  needed = {name for r in rows if not _absent(r, theirs) for names in r.theirs for name in names}
  problems = [f'missing {name}' for name in sorted(needed - set(theirs))]
  problems += [f'unexpected {k} {list(theirs[k].shape)}' for k in sorted(set(theirs) - known - ignored)]
  problems += [f'{name} is used twice' for (name, _), n in used.items() if n > 1]
  problems += [f'our {name} is produced twice' for name, n in ours.items() if n > 1]
  problems += [f'our {name} is not in the network' for name in sorted(set(ours) - set(expected))]
  problems += [f'our {name} has no source' for name in sorted(set(expected) - set(ours))]
  for r in rows:
    if r.ours in expected and not _absent(r, theirs):
      problems += _misshapen(r, theirs, tuple(expected[r.ours].shape))
  return problems


def _absent(r: Row, theirs: Mapping[str, Any]) -> bool:
  """Whether the checkpoint has none of the tensors of a row that may do without them."""
  return r.missing is not None and not any(name in theirs for names in r.theirs for name in names)


def _misshapen(r: Row, theirs: Mapping[str, Any], shape: tuple[int, ...]) -> list[str]:
  """The tensors of a row whose shapes do not give ours, found by running its operation on zeros of those shapes."""
  if r.stacked and len(r.theirs) != shape[0]:
    return [f'our {r.ours} has {shape[0]} layers, theirs {len(r.theirs)}']
  inner, problems = shape[1:] if r.stacked else shape, []
  for names in r.theirs:
    if any(name not in theirs for name in names):
      continue
    zeros = [np.broadcast_to(np.float32(0), theirs[name].shape) for name in names]
    try:
      fit = fits(r.op(*zeros).shape, inner)
    except (ValueError, IndexError):  # the operation needs other axes
      fit = False
    if not fit:
      given = ' and '.join(f'{name} {list(theirs[name].shape)}' for name in names)
      problems.append(f'{given} does not give {list(inner)} for our {r.ours}')
  return problems


def _read(tensor: Any, name: str) -> np.ndarray:
  value = tensor.numpy() if hasattr(tensor, 'numpy') else np.asarray(tensor)
  if value.dtype.kind not in 'fiu' and value.dtype.name != 'bfloat16':
    raise ValueError(f'the tensor {name} has dtype {value.dtype}; expected floating point or integers.')
  return value.astype(np.float32, copy=False)


# --- Networks


@dataclasses.dataclass(frozen=True)
class Imported:
  """An imported checkpoint: everything a run directory holds.

  Attributes:
    config: the part of a config that sampling and fine-tuning need.
    params: arrays by player and name, {'vqgan/encoder/conv_in/kernel': ...}.
    axes: the logical axes of the parameters.
    tokenizer: the caption tokenizer as JSON.
    frozen: frozen networks that belong to the model, by name.
    notes: what the user should know, one line each.
  """

  config: dict[str, Any]
  params: dict[str, np.ndarray]
  axes: dict[str, list]
  tokenizer: str | None = None
  frozen: dict[str, 'Imported'] = dataclasses.field(default_factory=dict)
  notes: tuple[str, ...] = ()

  def network(self, player: str) -> dict[str, Any]:
    """The parameters of one player as a nested dict."""
    prefix = f'{player}/'
    return traverse_util.unflatten_dict(
      {k.removeprefix(prefix): v for k, v in self.params.items() if k.startswith(prefix)}, sep='/'
    )


def named(player: str, flat: Mapping[str, Any]) -> dict[str, Any]:
  """Prefixes every name with that of the player."""
  return {f'{player}/{k}': v for k, v in flat.items()}


def write(imported: Imported, out: Path, origin: str) -> None:
  """Writes the run directory `out`. Raises OSError if that fails."""
  frozen = {name: out / 'frozen' / name for name in imported.frozen}
  for name, other in imported.frozen.items():
    write(other, frozen[name], origin)
  # JAX arrays, as Orbax would copy NumPy arrays, all of them at once.
  arrays = {name: jax.device_put(value, jax.devices('cpu')[0]) for name, value in imported.params.items()}
  params = traverse_util.unflatten_dict(arrays, sep='/')
  paths = {name: str(path) for name, path in frozen.items()}
  run = checkpoint.Run(imported.config, params, imported.tokenizer, 0, origin, paths, imported.axes)
  checkpoint.export_run(out, run)


@dataclasses.dataclass(frozen=True)
class ModuleSpec:
  """A module with the shapes and logical axes of its parameters, by name."""

  module: Any
  shapes: Mapping[str, Any]
  axes: Mapping[str, list]

  @classmethod
  def of(cls, module: Any, *inputs: Any, method: str | None = None) -> 'ModuleSpec':
    """Initialises the module abstractly; each input is a shape (of float32), an array or a `jax.ShapeDtypeStruct`."""
    arrays = [jax.ShapeDtypeStruct(x, np.float32) if isinstance(x, tuple) else x for x in inputs]
    leaves, tree = jax.tree.flatten(arrays)
    return _spec(module, method or '__call__', tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves), tree)


@functools.lru_cache(maxsize=32)  # a network that is imported again is not traced again
def _spec(module: Any, method: str, leaves: tuple[jax.ShapeDtypeStruct, ...], tree: Any) -> ModuleSpec:
  init = lambda key, *inputs: module.init(key, *inputs, method=method)['params']
  boxed = jax.eval_shape(init, jax.random.key(0), *jax.tree.unflatten(tree, leaves))
  return ModuleSpec(module, sharding.flatten(sharding.unbox(boxed)), sharding.logical_axes(boxed))
