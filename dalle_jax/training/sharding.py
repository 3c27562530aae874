"""From a mesh in the config and logical axis names on the parameters to arrays laid out over devices.

Mesh axes: `data` (replicas), `fsdp` (replicas that also split the parameters), `tensor` (splits inside a layer),
`sequence` (splits the stream of a transformer, the rows of a picture); one that is not named has size 1.
The batch is split over (data, fsdp). One translator, `partition`, decides for every tensor; what does not divide
is replicated.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
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
  """A mesh over `devices`, by default all of all processes; a size of -1 takes those that the others leave.

  Raises ValueError when the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes, count = {**dict.fromkeys(AXES, 1), **sizes}, len(devices)
  asked = ', '.join(f'{k}={v}' for k, v in sizes.items())
  free = [k for k, v in sizes.items() if v == -1]
  fixed = math.prod(v for v in sizes.values() if v != -1)
  if len(free) > 1 or fixed < 1 or min(sizes.values()) < -1:
    raise ValueError(f'mesh ({asked}): sizes must be positive, at most one -1 for "the rest".')
  if free and count % fixed == 0:
    sizes[free[0]] = count // fixed
  if math.prod(sizes.values()) != count:
    raise ValueError(f'mesh ({asked}) does not fit {count} devices; set config.mesh so that the product is {count}.')
  # jax.make_mesh refuses, on most TPUs, sizes that part an axis of the torus, such as fsdp=128 of 16 x 16 chips.
  placed = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
  # Auto axes: with Explicit ones, the default, Linen's logical constraints raise.
  return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


@contextlib.contextmanager
def use(sizes: Mapping[str, int], rules: Rules, devices: Sequence[jax.Device] | None = None) -> Iterator[Mesh]:
  """Makes the mesh and sets it and the rules while the context lasts, so that `constrain` in the layers sees them.

  The rules are no part of jit's cache key: make jitted functions inside. Raises ValueError as `make_mesh`.
  """
  mesh = make_mesh(sizes, devices)
  unknown = sorted({a for _, axes in rules for a in _as_tuple(axes)} - set(mesh.axis_names))
  if unknown:
    raise ValueError(f'config.rules name mesh axes {unknown}; the mesh has {list(mesh.axis_names)}.')
  with jax.set_mesh(mesh), nn.logical_axis_rules(logical_rules(rules)):
    yield mesh


def within(mesh: Mesh | None, rules: Rules) -> contextlib.AbstractContextManager[Any]:
  """Sets a mesh that is there already, and the rules, while the context lasts; nothing without a mesh."""
  if mesh is None:
    return contextlib.nullcontext()
  stack = contextlib.ExitStack()
  stack.enter_context(jax.set_mesh(mesh))
  stack.enter_context(nn.logical_axis_rules(logical_rules(rules)))
  return stack


def logical_rules(rules: Rules) -> tuple[tuple[str, tuple[str, ...] | None], ...]:
  """The rules in the form of Flax."""
  return tuple((k, _as_tuple(v) or None) for k, v in rules)


def rules_without(axis: str) -> contextlib.AbstractContextManager[None]:
  """The rules in use without a mesh axis that a vmap around (`spmd_axis_name`) has already split by."""
  rules = nn.get_logical_axis_rules()
  return nn.logical_axis_rules(logical_rules([(k, [a for a in _as_tuple(v) if a != axis]) for k, v in rules]))


def _as_tuple(axes: str | Sequence[str] | None) -> tuple[str, ...]:
  return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def partition(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: Rules) -> PartitionSpec:
  """Mesh axes of a tensor: the first rule whose mesh axes are still free and divide the dimension wins."""
  result: list[tuple[str, ...]] = [()] * len(shape)
  if len(names) == len(shape):
    for logical, axes in rules:
      axes = _as_tuple(axes)
      free = not set(axes) & {a for taken in result for a in taken}
      for i, (name, size) in enumerate(zip(names, shape, strict=True)):
        if name == logical and free and not result[i] and size % math.prod(mesh.shape[a] for a in axes) == 0:
          result[i], free = axes, False
  return PartitionSpec(*(r[0] if len(r) == 1 else r or None for r in result))


def _is_box(x: Any) -> bool:
  return isinstance(x, nn.meta.AxisMetadata)


def unbox(tree: Any) -> Any:
  """Takes the parameters out of the boxes that carry their axis names (and applies no constraint)."""
  return jax.tree.map(lambda x: x.value if _is_box(x) else x, tree, is_leaf=_is_box)


def flatten(tree: Any) -> dict[str, Any]:
  """Leaves by name: {'vqgan/encoder/kernel': leaf}."""
  leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_box)[0]
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def logical_axes(boxed: Any) -> dict[str, list[str | None]]:
  """The axis names of every boxed leaf, by name; what a checkpoint stores, so that any mesh can load it."""
  return {k: list(v.names) for k, v in flatten(boxed).items() if _is_box(v)}


def shardings(tree: Any, axes: Mapping[str, Sequence[str | None]], mesh: Mesh, rules: Rules) -> Any:
  """A NamedSharding for every leaf of an unboxed (abstract) tree; a leaf without axis names is replicated."""

  def leaf(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return NamedSharding(mesh, partition(axes[name], x.shape, mesh, rules) if name in axes else PartitionSpec())

  return jax.tree_util.tree_map_with_path(leaf, tree)


def like_params(tree: Any, params: Any, mesh: Mesh, memory: str | None = None) -> Any:
  """Shardings of an optimiser state: a leaf whose name ends in that of a parameter of its shape lies like it.

  `params` is a tree of shapes with shardings. Everything else, a step count say, is replicated, and on the devices;
  what lies like parameters is in the `memory` of that kind, if it is given.
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
  """Under jit: arrays with shardings `where`, those in the memory of the host copied to the devices of their mesh."""
  copy = lambda x, s: jax.device_put(x, s.with_memory_kind('device')) if s.memory_kind == 'pinned_host' else x
  return jax.tree.map(copy, tree, where)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec(tuple(a for a in BATCH_AXES if a in mesh.axis_names)))


def batch_shards(mesh: Mesh) -> int:
  """Into how many parts a batch is split."""
  return math.prod(mesh.shape[a] for a in BATCH_AXES if a in mesh.axis_names)


def part_to_read(mesh: Mesh) -> tuple[int, int]:
  """(which part of every batch this process reads, of how many).

  Processes whose devices hold the same rows, because an axis that splits no batch (tensor, sequence) goes across them,
  read the same part. Raises ValueError where two processes hold some rows both, and others not.
  """
  shards, held = batch_shards(mesh), {}
  for device, (rows,) in batch_sharding(mesh).devices_indices_map((shards,)).items():
    held.setdefault(device.process_index, set()).update(range(*rows.indices(shards)))
  parts = sorted({tuple(sorted(rows)) for rows in held.values()})
  if len({len(rows) for rows in parts}) > 1 or sum(map(len, parts)) != shards:
    raise ValueError(
      f'the mesh {dict(mesh.shape)} gives some processes a part of the rows of others; choose tensor and sequence so '
      'that they divide the devices of a process, or are a multiple of them.'
    )
  return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def whole(mesh: Mesh | None) -> NamedSharding | None:
  """For what every process reads: a copy on each device of the mesh; None without one."""
  return NamedSharding(mesh, PartitionSpec()) if mesh else None


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """The rows that this process reads (`part_to_read`) as global arrays split over (data, fsdp)."""
  sharding = batch_sharding(mesh)
  return {k: jax.make_array_from_process_local_data(sharding, np.asarray(v)) for k, v in batch.items()}


def put_whole(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """A batch of which every process holds all rows as global arrays split over (data, fsdp)."""
  put = lambda x: jax.make_array_from_callback(x.shape, batch_sharding(mesh), lambda index: x[index])
  return {k: put(np.asarray(v)) for k, v in batch.items()}
