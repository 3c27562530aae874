"""Lays arrays out over devices, given the mesh of the config and the logical axis names of the parameters.

Mesh axes: `data` (replicas), `fsdp` (replicas that also split the parameters), `tensor` (splits within a layer),
`sequence` (splits the sequence of a transformer, or the rows of an image); an axis that is not named has size 1.
The batch is split over (data, fsdp). A single function, `partition`, decides for every tensor; a dimension that is not
divisible is replicated.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ('data', 'fsdp', 'tensor', 'sequence')
BATCH_AXES = ('data', 'fsdp')
Rules = Sequence[tuple[str, str | Sequence[str] | None]]  # (logical axis, mesh axes), in order of precedence


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Makes a mesh over `devices`, by default those of all processes; a size of -1 takes whatever the others leave.

  Raises ValueError if the product of the sizes is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes, count = {**dict.fromkeys(AXES, 1), **sizes}, len(devices)
  asked = ', '.join(f'{k}={v}' for k, v in sizes.items())
  free = [k for k, v in sizes.items() if v == -1]
  fixed = math.prod(v for v in sizes.values() if v != -1)
  if len(free) > 1 or fixed < 1 or min(sizes.values()) < -1:
    raise ValueError(f'mesh ({asked}): sizes must be positive, but one of them may be -1, for the rest.')
  if free and count % fixed == 0:
    sizes[free[0]] = count // fixed
  if math.prod(sizes.values()) != count:
    raise ValueError(f'mesh ({asked}) does not fit {count} devices; set config.mesh so that the product is {count}.')
  # On most TPUs jax.make_mesh refuses sizes that split an axis of the torus, such as fsdp=128 on 16 x 16 chips.
  placed = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
  # Auto axes, because Linen's logical constraints raise with Explicit ones, the default.
  return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


@contextlib.contextmanager
def use(sizes: Mapping[str, int], rules: Rules, devices: Sequence[jax.Device] | None = None) -> Iterator[Mesh]:
  """Makes a mesh and sets it and the rules within the context, where `constrain` in the layers finds them.

  The rules are not part of jit's cache key, so create jitted functions inside, or by `program`. Raises ValueError like
  `make_mesh`.
  """
  mesh = make_mesh(sizes, devices)
  unknown = sorted({a for _, axes in rules for a in as_tuple(axes)} - set(mesh.axis_names))
  if unknown:
    raise ValueError(f'config.rules name mesh axes {unknown}; the mesh has {list(mesh.axis_names)}.')
  with jax.set_mesh(mesh), nn.logical_axis_rules(logical_rules(rules)):
    yield mesh


def within(mesh: Mesh | None, rules: Rules) -> contextlib.AbstractContextManager[Any]:
  """Sets an existing mesh and the rules within the context; does nothing without a mesh."""
  if mesh is None:
    return contextlib.nullcontext()
  stack = contextlib.ExitStack()
  stack.enter_context(jax.set_mesh(mesh))
  stack.enter_context(nn.logical_axis_rules(logical_rules(rules)))
  return stack


def logical_rules(rules: Rules) -> tuple[tuple[str, tuple[str, ...] | None], ...]:
  """The rules as Flax expects them."""
  return tuple((k, as_tuple(v) or None) for k, v in rules)


def rules_without(axis: str) -> contextlib.AbstractContextManager[None]:
  """Removes from the active rules a mesh axis over which an enclosing vmap (`spmd_axis_name`) has already split."""
  rules = nn.get_logical_axis_rules()
  return nn.logical_axis_rules(logical_rules([(k, [a for a in as_tuple(v) if a != axis]) for k, v in rules]))


def as_tuple(axes: str | Sequence[str] | None) -> tuple[str, ...]:
  """The mesh axes of one entry of a rule or of a PartitionSpec."""
  if axes is None:
    return ()
  return (axes,) if isinstance(axes, str) else tuple(axes)


def partition(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: Rules) -> PartitionSpec:
  """The mesh axes of a tensor: for each dimension the first rule whose mesh axes are still free and divide it."""
  result: list[tuple[str, ...]] = [()] * len(shape)
  if len(names) == len(shape):
    for logical, axes in rules:
      axes = as_tuple(axes)
      free = not set(axes) & {a for taken in result for a in taken}
      for i, (name, size) in enumerate(zip(names, shape, strict=True)):
        if name == logical and free and not result[i] and size % math.prod(mesh.shape[a] for a in axes) == 0:
          result[i], free = axes, False
  return PartitionSpec(*(r[0] if len(r) == 1 else r or None for r in result))


def _is_box(x: Any) -> bool:
  return isinstance(x, nn.meta.AxisMetadata)


def unbox(tree: Any) -> Any:
  """Takes the parameters out of the boxes that carry their axis names, without applying constraints."""
  return jax.tree.map(lambda x: x.value if _is_box(x) else x, tree, is_leaf=_is_box)


def flatten(tree: Any) -> dict[str, Any]:
  """Leaves by name: {'vqgan/encoder/kernel': leaf}."""
  leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_box)[0]
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def logical_axes(boxed: Any) -> dict[str, list[str | None]]:
  """The axis names of every boxed leaf, by name; checkpoints store them so that they can be loaded onto any mesh."""
  return {k: list(v.names) for k, v in flatten(boxed).items() if _is_box(v)}


def shardings(tree: Any, axes: Mapping[str, Sequence[str | None]], mesh: Mesh, rules: Rules) -> Any:
  """A NamedSharding for every leaf of an unboxed (abstract) tree; a leaf without axis names is replicated."""

  def leaf(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return NamedSharding(mesh, partition(axes[name], x.shape, mesh, rules) if name in axes else PartitionSpec())

  return jax.tree_util.tree_map_with_path(leaf, tree)


def like_params(tree: Any, params: Any, mesh: Mesh, memory: str | None = None) -> Any:
  """Shardings for an optimiser state: a leaf whose name ends in that of a parameter of its shape is laid out like it.

  `params` is a tree of shapes with shardings. Everything else, e.g. a step count, is replicated on the devices. With
  `memory`, the leaves laid out like parameters are in that kind of memory.
  """
  known = flatten(params)

  def leaf(path, x):
    for i in range(len(path)):
      name = jax.tree_util.keystr(path[i:], simple=True, separator='/')
      if name in known and known[name].shape == x.shape:
        where = known[name].sharding
        return where.with_memory_kind(memory) if memory else where
    return NamedSharding(mesh, PartitionSpec())

  return jax.tree_util.tree_map_with_path(leaf, tree)


def on_device(tree: Any, where: Any) -> Any:
  """Within jit, copies the arrays of `tree` whose shardings, in `where`, are in host memory to their devices."""
  copy = lambda x, s: jax.device_put(x, s.with_memory_kind('device')) if s.memory_kind == 'pinned_host' else x
  return jax.tree.map(copy, tree, where)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec(tuple(a for a in BATCH_AXES if a in mesh.axis_names)))


def batch_shards(mesh: Mesh) -> int:
  """The number of parts that a batch is split into."""
  return math.prod(mesh.shape[a] for a in BATCH_AXES if a in mesh.axis_names)


def part_to_read(mesh: Mesh) -> tuple[int, int]:
  """Returns (which part of every batch this process reads, the number of parts).

  Processes whose devices hold the same rows, because an axis that does not split the batch (tensor, sequence) runs
  across them, read the same part. Raises ValueError if two processes share some of their rows but not all.
  """
  shards, held = batch_shards(mesh), {}
  for device, (rows,) in batch_sharding(mesh).devices_indices_map((shards,)).items():
    held.setdefault(device.process_index, set()).update(range(*rows.indices(shards)))
  parts = sorted({tuple(sorted(rows)) for rows in held.values()})
  if len({len(rows) for rows in parts}) > 1 or sum(map(len, parts)) != shards:
    raise ValueError(
      f'the mesh {dict(mesh.shape)} gives some processes a part of the rows of others; choose tensor and sequence so '
      'that they divide the number of devices of a process, or are a multiple of it.'
    )
  return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def whole(mesh: Mesh | None) -> NamedSharding | None:
  """The sharding of results that every process reads: a copy on each device of the mesh; None without a mesh."""
  return NamedSharding(mesh, PartitionSpec()) if mesh else None


def program(
  function: Callable[..., Any], *fixed: Any, mesh: Mesh | None = None, rules: Rules = (), static: tuple[str, ...] = ()
) -> Callable[..., Any]:
  """`function` after the arguments `fixed`, under jit, with results that every process can read.

  The same arguments give the same program, so that loading another checkpoint of a run compiles nothing; it is kept
  until `jax.clear_caches()`, or until many others have been made. `fixed` are hashable (networks without their
  parameters), `static` names further arguments that are. Within it `rules` hold, whatever the caller's are; the mesh
  is set by the caller (`within`).
  """
  return _program(function, fixed, mesh, logical_rules(rules) if mesh else (), static)


@functools.lru_cache(maxsize=64)
def _program(function: Any, fixed: Any, mesh: Mesh | None, rules: Any, static: tuple[str, ...]) -> Callable[..., Any]:
  @functools.wraps(function)
  def traced(*args: Any, **kwargs: Any) -> Any:
    with nn.logical_axis_rules(rules):
      return function(*fixed, *args, **kwargs)

  return jax.jit(traced, static_argnames=static, out_shardings=whole(mesh))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Makes global arrays, split over (data, fsdp), from the rows that this process reads (`part_to_read`)."""
  sharding = batch_sharding(mesh)
  return {k: jax.make_array_from_process_local_data(sharding, np.asarray(v)) for k, v in batch.items()}


def put_whole(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Makes global arrays, split over (data, fsdp), from a batch of which every process holds all rows."""
  put = lambda x: jax.make_array_from_callback(x.shape, batch_sharding(mesh), lambda index: x[index])
  return {k: put(np.asarray(v)) for k, v in batch.items()}
