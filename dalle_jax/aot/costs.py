"""Costs of one run of a compiled program, from its HLO text: FLOPs, memory traffic, collectives.

The compiler's own `cost_analysis` counts the body of a loop once. Here each computation counts as often as it runs. The
trip count of a loop is the one that the compiler notes (`known_trip_count`); without one, it follows from the counter
that the loop's condition compares with a constant: its initial value and the step that the body adds. Of a conditional,
the branch with the most FLOPs counts. Kernels that are not HLO count if `aot.products` knows them.
"""

import dataclasses
import math
import re

import numpy as np

from dalle_jax.aot import products
from dalle_jax.aot.hlo import Array, Computation, Instruction, parse

COLLECTIVES = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'ragged-all-to-all', 'collective-permute')
FREE = {  # opcodes that move no data themselves
  'parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast', 'while', 'conditional', 'call', 'after-all',
  'partition-id', 'replica-id', 'iota', 'opt-barrier', 'add-dependency', 'custom-call',
}  # fmt: skip
LOOPS = {'while', 'conditional', 'call'}  # the computations that they call do the work
STEPS = ('-start', '-update', '-done')
ASYNCHRONOUS = 'custom_call_target="AsyncCollective'  # marks the fusions that the TPU compiler makes of its steps
SLICES = {'dynamic-slice', 'slice', 'gather'}  # read only what they return, not the whole operand


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation.

  Attributes:
    bytes: size of the whole array, on the larger side.
    groups: devices that take part together; for a permutation the pairs (from, to).
    hidden: whether other operations can run at the same time.
  """

  kind: str
  bytes: float
  groups: tuple[tuple[int, ...], ...]
  hidden: bool

  @property
  def sent(self) -> float:
    """Bytes that each device sends."""
    n = len(self.groups[0])
    whole = {'all-reduce': 2.0, 'collective-permute': n / max(n - 1, 1)}.get(self.kind, 1.0)
    return whole * self.bytes * (n - 1) / n


@dataclasses.dataclass
class Region:
  """A computation that runs `times` times, including what it calls outside of loops; the figures are for one run."""

  name: str
  times: int
  flops: float = 0.0  # of matrix products and convolutions
  bytes: float = 0.0  # read from and written to memory
  each: list[tuple[float, float]] = dataclasses.field(default_factory=list)  # (FLOPs, bytes) of each operation
  collectives: list[Collective] = dataclasses.field(default_factory=list)


def regions(text: str, devices: int) -> list[Region]:
  """Returns the entry and the body of every loop, with how often each runs; the program runs on `devices` devices."""
  computations, entry = parse(text)
  result, channels = [], set()

  def visit(name: str, region: Region, fused: bool, hidden: bool) -> None:
    computation = computations[name]
    for one in computation.values():
      opcode, before = one.opcode.removesuffix('-start'), region.flops
      region.flops += products.flops(one, computation)
      traffic = 0.0 if fused or opcode == 'async' else _traffic(one, computation, computations)
      region.bytes += traffic
      if opcode in COLLECTIVES:
        channel = re.search(r'channel_id=(\d+)', one.attributes)
        if channel is None or channel[1] not in channels:  # the steps of an asynchronous collective repeat its channel
          region.collectives.append(_collective(one, computation, devices, hidden or _overlaps(one, computation)))
        channels.add(channel and channel[1])
      elif opcode == 'while':
        (body,), (condition,) = one.called('body'), one.called('condition')
        loop(body, region.times * _trips(one, body, condition, computation, computations))
      elif opcode in ('fusion', 'call', 'async'):
        for inner in one.called('calls') or one.called('to_apply'):
          steps = any(ASYNCHRONOUS in i.attributes for i in computations[inner].values())
          overlaps = steps or _overlaps(one, computation)
          visit(inner, region, fused or opcode == 'fusion', hidden or overlaps)
      elif opcode == 'conditional':
        kinds = ('branch_computations', 'true_computation', 'false_computation')
        branch(sorted({inner for kind in kinds for inner in one.called(kind)}), region, fused, hidden)
      if not fused and opcode not in LOOPS and (traffic or region.flops > before):
        region.each.append((region.flops - before, traffic))

  def branch(names: list[str], region: Region, fused: bool, hidden: bool) -> None:
    before, branches = len(result), []
    for name in names:
      body = Region(name, region.times)
      visit(name, body, fused, hidden)
      branches.append([body, *result[before:]])  # the branch and the loops in it
      del result[before:]
    cost = lambda parts: (sum(r.times * r.flops for r in parts), sum(r.times * r.bytes for r in parts))
    body, *loops = max(branches, key=cost)
    region.flops += body.flops
    region.bytes += body.bytes
    region.collectives += body.collectives
    region.each += body.each
    result.extend(loops)

  def loop(name: str, times: int) -> None:
    region = Region(name, times)
    result.append(region)
    visit(name, region, False, False)

  loop(entry, 1)
  return result


# --- Loops, collectives


def _trips(
  loop: Instruction, body: str, condition: str, around: Computation, computations: dict[str, Computation]
) -> int:
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
  if known:
    return int(known[1])
  names = [condition, *(n for one in computations[condition].values() for n in one.called('calls'))]
  constants = [_constant(one) for n in names for one in computations[n].values()]
  end = max((n for n in constants if n is not None), default=1)
  start, step = 0, 1
  counters = [one for one in computations[condition].values() if one.opcode == 'get-tuple-element']
  roots = [one for one in computations[body].values() if one.root and one.opcode == 'tuple']
  if len(counters) == 1 and roots:
    index = int(re.search(r'index=(\d+)', counters[0].attributes)[1])
    initial = around[loop.operands[0]]
    if initial.opcode == 'tuple':
      start = _constant(around[initial.operands[index]]) or 0
    new = computations[body][roots[0].operands[index]]
    if new.opcode == 'add':
      step = next((n for n in (_constant(computations[body][name]) for name in new.operands) if n), 1)
  return max(1, math.ceil((end - start) / step))


def _constant(one: Instruction) -> int | None:
  return int(one.text) if one.opcode == 'constant' and re.fullmatch(r'\d+', one.text) else None


def _collective(one: Instruction, computation: Computation, devices: int, hidden: bool) -> Collective:
  given = sum(a.bytes for name in one.operands if name in computation for a in computation[name].arrays)
  made = sum(a.bytes for a in one.arrays) - (
    given if one.opcode.endswith('-start') else 0
  )  # a start lists its operands, too
  kind = one.opcode.removesuffix('-start')
  return Collective(kind, max(given, made), _groups(one.attributes, devices), hidden)


def _overlaps(one: Instruction, computation: Computation) -> bool:
  """Whether anything runs between a start and its done; instructions of a compiled program are in schedule order."""
  if not one.opcode.endswith('-start'):
    return False
  after, chain = list(computation.values()), {one.name}
  between = []
  for i in after[after.index(one) + 1 :]:
    if chain & set(i.operands) and i.opcode.endswith('-done'):
      break
    if chain & set(i.operands) and i.opcode.endswith('-update'):
      chain.add(i.name)
    between.append(i)
  return any(products.kernel(i) or (i.opcode not in FREE - LOOPS and not i.opcode.endswith(STEPS)) for i in between)


def _groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
  """Parses the groups of devices; without any, all devices form one group. HLO writes them in one of these ways:

  {{0,1},{2,3}}: listed, also as pairs;
  [2,2]<=[4], [2,2]<=[2,2]T(1,0): all devices in order, reshaped and transposed;
  mesh['a'=2,'b'=2] {'b'}: devices that differ only in these axes of a mesh, perhaps with device_ids=([2,2]T(1,0)), the
  order of its devices.
  """
  listed = re.search(r'(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]+\})\}', attributes)
  if listed:
    return tuple(tuple(int(i) for i in part.split(',')) for part in re.findall(r'\{([\d,]+)\}', listed[1]))
  tiled = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes)
  device_ids = r'(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?'
  mesh = re.search(rf'replica_groups=mesh\[([^\]]*)\]{device_ids} \{{([^}}]*)\}}', attributes)
  if tiled:
    shape, dims, order = (_numbers(part) for part in tiled.groups())
    ids = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)
  elif mesh:
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    ids = np.arange(devices).reshape(_numbers(mesh[2]) or [devices]).transpose(_numbers(mesh[3]))
    within = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", mesh[4])]
    ids = np.moveaxis(ids.reshape(list(sizes.values())), within, range(-len(within), 0))
    ids = ids.reshape(-1, math.prod(ids.shape[len(sizes) - len(within) :]))
  else:
    ids = np.arange(devices)[None]
  return tuple(tuple(int(i) for i in row) for row in ids)


def _numbers(text: str | None) -> list[int] | None:
  return [int(i) for i in text.split(',')] if text else None


# --- Memory traffic


def _traffic(one: Instruction, computation: Computation, computations: dict[str, Computation]) -> float:
  """Bytes that an instruction outside of a fusion reads from and writes to memory."""
  if (one.opcode in FREE and not products.kernel(one)) or one.opcode.endswith(STEPS[1:]):
    return 0.0
  operands = [computation[name].arrays for name in one.operands if name in computation]
  far = lambda arrays: sum(a.bytes for a in arrays if not a.near)
  if one.opcode in SLICES:
    return 2 * far(one.arrays)
  if one.opcode == 'dynamic-update-slice':
    return 2 * far(operands[1])
  if one.opcode in ('slice-start', 'dynamic-slice-start'):  # it returns its operands, then the slice
    moved = one.arrays[len(operands[0])]
    return far((moved,)) + (0.0 if operands[0][0].near else moved.bytes)
  if one.opcode.endswith('-start'):  # a copy: returns its destination and its operand
    return far(one.arrays[:1]) + (far(operands[0]) if operands else 0.0)
  if one.opcode != 'fusion':
    return far(one.arrays) + sum(far(arrays) for arrays in operands)
  (name,) = one.called('calls')
  inner = computations[name]
  inputs = {int(i.text): i for i in inner.values() if i.opcode == 'parameter'}
  read = sum(far(_read(inputs[i], inner, arrays)) for i, arrays in enumerate(operands) if i in inputs)
  return read + sum(far(_written(root, inner, one)) for root in inner.values() if root.root)


def _read(parameter: Instruction, inner: Computation, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
  """What a fusion reads of an operand: only the slices that it takes, and nothing if it only writes a slice into it."""
  users = [one for one in inner.values() if parameter.name in one.operands]
  if not users or arrays[0].near:
    return arrays
  passed = lambda u: u.opcode in ('tuple', *COLLECTIVES) or ASYNCHRONOUS in u.attributes
  users = [u for u in users if not passed(u)]
  if all(u.opcode in SLICES and u.operands[0] == parameter.name for u in users):
    return tuple(a for u in users for a in u.arrays)
  if all(u.opcode == 'dynamic-update-slice' and u.operands[0] == parameter.name for u in users):
    return ()
  return arrays


def _written(root: Instruction, inner: Computation, fusion: Instruction) -> tuple[Array, ...]:
  """What a fusion writes: of an array that it updates in place, only the slice."""
  parts = [inner[name] for name in root.operands] if root.opcode == 'tuple' else [root]
  if len(parts) != len(fusion.arrays):
    return fusion.arrays
  written = []
  for part, array in zip(parts, fusion.arrays, strict=True):
    while part.opcode in ('bitcast', 'get-tuple-element') and part.operands[0] in inner:
      part = inner[part.operands[0]]
    if part.opcode in ('parameter', *COLLECTIVES) or ASYNCHRONOUS in part.attributes:
      continue  # passed on to the next step
    slice_of = inner[part.operands[1]].arrays[0] if part.opcode == 'dynamic-update-slice' else array
    written.append(dataclasses.replace(slice_of, near=array.near))
  return tuple(written)
