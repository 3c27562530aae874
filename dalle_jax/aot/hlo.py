"""What a compiled program does in one run, read from its HLO text: products, traffic of memory, collectives.

The compiler's own `cost_analysis` counts the body of a loop once. Here each computation counts as often as it runs: the
body of a loop as many times as the compiler notes (`known_trip_count`) or, where it notes nothing, as follow from the
counter that the loop's condition compares with a constant: its start and the step that the body adds. Of a conditional
the branch with the most products counts. Of kernels that are no HLO those of splash attention are known.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

BYTES = {
  'token': 0, 'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4,
  'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8, 'c128': 16,
}  # fmt: skip
COLLECTIVES = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'ragged-all-to-all', 'collective-permute')
FREE = {  # move nothing by themselves
  'parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast', 'while', 'conditional', 'call', 'after-all',
  'partition-id', 'replica-id', 'iota', 'opt-barrier', 'add-dependency', 'custom-call',
}  # fmt: skip
ASYNCHRONOUS = 'custom_call_target="AsyncCollective'  # how the TPU's compiler marks fusions that are steps of one
SPLASH = {'splash_mha_fwd': 2, 'splash_mha_dq': 3, 'splash_mha_dkv': 4}  # products of each block of its grid
SLICES = {'dynamic-slice', 'slice', 'gather'}  # read what they give, not all that they are given
_ARRAY = re.compile(r'([a-z][a-z0-9]*)\[([\d,<= ]*)\](?:\{([^{}]*)\})?')
_NAME = re.compile(r'%?([\w.\-]+)$')


@dataclasses.dataclass(frozen=True)
class Array:
  """`near`: not in HBM but in the memory of the core."""

  dtype: str
  dims: tuple[int, ...]
  near: bool = False

  @property
  def bytes(self) -> float:
    return math.prod(self.dims) * BYTES.get(self.dtype, 1)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """`arrays` are those that it gives, `operands` the names of those that it takes."""

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  text: str  # what is between the parentheses: of a constant its value
  attributes: str
  root: bool

  def called(self, kind: str) -> list[str]:
    """The computations that the attribute `kind` names."""
    found = re.search(rf'\b{kind}=(\{{[^}}]*\}}|%?[\w.\-]+)', self.attributes)
    return re.findall(r'[\w.\-]+', found[1]) if found else []


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective.

  Attributes:
    bytes: of the whole array, on the larger of its two sides.
    groups: devices that take part together; of a permutation the pairs (from, to).
    hidden: something else can run at the same time.
    where: the operation of the model that it is for.
  """

  kind: str
  bytes: float
  groups: tuple[tuple[int, ...], ...]
  hidden: bool
  where: str = ''

  @property
  def sent(self) -> float:
    """Bytes that each device sends."""
    n = len(self.groups[0])
    whole = {'all-reduce': 2.0, 'collective-permute': n / max(n - 1, 1)}.get(self.kind, 1.0)
    return whole * self.bytes * (n - 1) / n


@dataclasses.dataclass
class Region:
  """A computation that runs `times` times, what it calls without a loop included; figures are those of one time."""

  name: str
  times: int
  flops: float = 0.0  # of matrix products and convolutions
  bytes: float = 0.0  # read from and written to memory
  collectives: list[Collective] = dataclasses.field(default_factory=list)


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """The computations of an HLO module by name, and the name of the entry. Raises ValueError without an entry."""
  computations: dict[str, Computation] = {}
  entry, body = '', None
  for line in text.splitlines():
    # One with more behind it goes on with an attribute of several lines.
    if line == '}' or line.startswith('}, execution_thread='):
      body = None
    elif body is None and line.endswith('{') and not line.startswith('HloModule'):
      head = line.removeprefix('ENTRY ').lstrip('%')
      name = re.split(r'[ ({]', head, maxsplit=1)[0]
      body = computations[name] = {}
      entry = name if line.startswith('ENTRY') else entry
    elif body is not None and line.startswith('  ') and ' = ' in line:
      one = _instruction(line.strip())
      body[one.name] = one
  if not entry:
    raise ValueError('the text is no HLO module: it has no ENTRY; give Compiled.as_text().')
  return computations, entry


def regions(text: str, devices: int) -> list[Region]:
  """The entry and the body of every loop, with how often each runs; `devices` run the program together."""
  computations, entry = parse(text)
  found, channels = [], set()

  def visit(name: str, region: Region, fused: bool, hidden: bool) -> None:
    computation = computations[name]
    for one in computation.values():
      opcode = one.opcode.removesuffix('-start')
      region.flops += _flops(one, computation)
      region.bytes += 0.0 if fused else _traffic(one, computation, computations)
      if opcode in COLLECTIVES:
        channel = re.search(r'channel_id=(\d+)', one.attributes)
        if channel is None or channel[1] not in channels:  # the steps of an asynchronous one repeat it
          region.collectives.append(_collective(one, computation, devices, hidden or opcode != one.opcode))
        channels.add(channel and channel[1])
      elif opcode == 'while':
        (body,), (condition,) = one.called('body'), one.called('condition')
        loop(body, region.times * _trips(one, body, condition, computation, computations))
      elif opcode in ('fusion', 'call', 'async'):
        for inner in one.called('calls') or one.called('to_apply'):
          beside = opcode == 'async' or any(ASYNCHRONOUS in i.attributes for i in computations[inner].values())
          visit(inner, region, fused or opcode == 'fusion', hidden or beside)
      elif opcode == 'conditional':
        kinds = ('branch_computations', 'true_computation', 'false_computation')
        branch(sorted({inner for kind in kinds for inner in one.called(kind)}), region, fused, hidden)

  def branch(names: list[str], region: Region, fused: bool, hidden: bool) -> None:
    before, taken = len(found), []
    for name in names:
      alone = Region(name, region.times)
      visit(name, alone, fused, hidden)
      taken.append([alone, *found[before:]])
      del found[before:]
    most = max(taken, key=lambda parts: (sum(r.times * r.flops for r in parts), sum(r.times * r.bytes for r in parts)))
    region.flops, region.bytes = region.flops + most[0].flops, region.bytes + most[0].bytes
    region.collectives += most[0].collectives
    found.extend(most[1:])

  def loop(name: str, times: int) -> None:
    region = Region(name, times)
    found.append(region)
    visit(name, region, False, False)

  loop(entry, 1)
  return found


# --- One instruction


def _instruction(line: str) -> Instruction:
  root = line.startswith('ROOT ')
  name, rest = line.removeprefix('ROOT ').split(' = ', 1)
  end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
  shape, rest = rest[:end], rest[end:].lstrip()
  opening = rest.index('(')
  closing = _closing(rest, opening)
  inside = rest[opening + 1 : closing]
  names = (_NAME.search(part.strip()) for part in _parts(inside))
  operands = tuple(found[1] for found in names if found)
  return Instruction(
    name.lstrip('%'), rest[:opening], _arrays(shape), operands, inside, rest[closing + 1 :].lstrip(', '), root
  )


def _closing(text: str, start: int) -> int:
  """Where the parenthesis that opens at `start` closes."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == '(') - (text[i] == ')')
    if not depth:
      return i
  raise ValueError(f'HLO: a parenthesis is not closed in {text[:80]!r}.')


def _parts(text: str) -> Iterator[str]:
  """Splits at the commas that no bracket surrounds."""
  depth, start = 0, 0
  for i, c in enumerate(text):
    depth += (c in '([{') - (c in ')]}')
    if c == ',' and not depth:
      yield text[start:i]
      start = i + 1
  if text.strip():
    yield text[start:]


def _arrays(shape: str) -> tuple[Array, ...]:
  arrays = []
  for dtype, dims, layout in _ARRAY.findall(shape):
    sizes = tuple(int(d.strip('<= ')) for d in dims.split(',') if d)
    space = re.search(r'S\((\d+)\)', layout)
    arrays.append(Array(dtype, sizes, bool(space and space[1] != '0')))
  return tuple(arrays)


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


def _flops(one: Instruction, computation: Computation) -> float:
  if one.opcode == 'dot':
    left = computation[one.operands[0]].arrays[0].dims
    found = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', one.attributes)
    contracted = math.prod(left[int(i)] for i in found[1].split(',') if i) if found else 1
    return 2.0 * math.prod(one.arrays[0].dims) * contracted
  if one.opcode == 'convolution':
    return _convolution_flops(one, computation)
  products = next((n for name, n in SPLASH.items() if one.name.startswith(name)), 0)
  if one.opcode == 'custom-call' and products:
    given = [computation[name].arrays[0] for name in one.operands]
    grid = given[0].dims
    *rows, length, head_dim = next(x.dims for x in given if 'f' in x.dtype and len(x.dims) > 2)  # queries
    return 2.0 * products * math.prod(rows) * head_dim * math.prod(grid[1:]) * (length / grid[1]) ** 2
  return 0.0


def _convolution_flops(one: Instruction, computation: Computation) -> float:
  """Twice the products with what is not padding: the TPU's compiler writes batched products as convolutions."""
  left, right = (computation[name].arrays[0].dims for name in one.operands[:2])
  lhs, rhs, out = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', one.attributes).groups()
  window = dict(re.findall(r'(\w+)=([\dx_\-]+)', (re.search(r'window=\{([^}]*)\}', one.attributes) or ['', ''])[1]))
  taken = 1.0  # pairs of an output position and a position of the kernel that meet the input
  for i in range(len(out) - 2):
    axis = str(i)
    field = lambda name, default, i=i: window[name].split('x')[i] if name in window else default
    steps = np.arange(one.arrays[0].dims[out.index(axis)])[:, None] * int(field('stride', '1'))
    inside = np.arange(right[rhs.index(axis)])[None] * int(field('rhs_dilate', '1'))
    spread, size = int(field('lhs_dilate', '1')), left[lhs.index(axis)]
    at = steps + inside - int(field('pad', '0_0').split('_')[0])
    taken *= np.sum((at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0))
  batch, features = (one.arrays[0].dims[out.index(c)] for c in 'bf')
  return 2.0 * batch * features * right[rhs.index('i')] * float(taken)


def _collective(one: Instruction, computation: Computation, devices: int, hidden: bool) -> Collective:
  given = sum(a.bytes for name in one.operands if name in computation for a in computation[name].arrays)
  made = sum(a.bytes for a in one.arrays) - (given if one.opcode.endswith('-start') else 0)  # it lists both
  where = re.search(r'op_name="([^"]*)"', one.attributes)
  kind = one.opcode.removesuffix('-start')
  return Collective(kind, max(given, made), _groups(one.attributes, devices), hidden, where[1] if where else '')


def _groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
  """Groups of devices, all devices if none are named. They are written in one of these ways:

  {{0,1},{2,3}}, the same as pairs; [2,2]<=[4], [2,2]<=[2,2]T(1,0), devices in order, reshaped and transposed;
  mesh['a'=2,'b'=2] {'b'}, those that differ in some axes of a mesh, perhaps with device_ids=([2,2]T(1,0)), its order.
  """
  listed = re.search(r'(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]+\})\}', attributes)
  if listed:
    return tuple(tuple(int(i) for i in part.split(',')) for part in re.findall(r'\{([\d,]+)\}', listed[1]))
  tiled = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes)
  order = r'(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?'
  mesh = re.search(rf'replica_groups=mesh\[([^\]]*)\]{order} \{{([^}}]*)\}}', attributes)
  if tiled:
    shape, dims, turned = (_numbers(part) for part in tiled.groups())
    ids = np.arange(math.prod(dims)).reshape(dims).transpose(turned).reshape(shape)
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


# --- Traffic


def _traffic(one: Instruction, computation: Computation, computations: dict[str, Computation]) -> float:
  """Bytes that an instruction outside of fusions reads from and writes to memory."""
  kernel = 'custom_call_target="tpu_custom_call"' in one.attributes
  if (one.opcode in FREE and not kernel) or one.opcode.endswith(('-done', '-update')):
    return 0.0
  operands = [computation[name].arrays for name in one.operands if name in computation]
  far = lambda arrays: sum(a.bytes for a in arrays if not a.near)
  if one.opcode in SLICES:
    return 2 * far(one.arrays)
  if one.opcode == 'dynamic-update-slice':
    return 2 * far(operands[1])
  if one.opcode in ('slice-start', 'dynamic-slice-start'):  # it gives what it takes, and then the slice
    moved = one.arrays[len(operands[0])]
    return far((moved,)) + (0.0 if operands[0][0].near else moved.bytes)
  if one.opcode.endswith('-start'):  # a copy: what it gives is the place it goes to, and what it takes once more
    return far(one.arrays[:1]) + (far(operands[0]) if operands else 0.0)
  if one.opcode != 'fusion':
    return far(one.arrays) + sum(far(arrays) for arrays in operands)
  (name,) = one.called('calls')
  inner = computations[name]
  inputs = {int(i.text): i for i in inner.values() if i.opcode == 'parameter'}
  read = sum(far(_read(inputs[i], inner, arrays)) for i, arrays in enumerate(operands) if i in inputs)
  return read + sum(far(_written(root, inner, one)) for root in inner.values() if root.root)


def _read(parameter: Instruction, inner: Computation, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
  """What a fusion reads of an operand: the slices that it takes; nothing of what it only writes a slice into."""
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
  """What a fusion writes: of an array that it changes in place, the slice."""
  parts = [inner[name] for name in root.operands] if root.opcode == 'tuple' else [root]
  if len(parts) != len(fusion.arrays):
    return fusion.arrays
  written = []
  for part, array in zip(parts, fusion.arrays, strict=True):
    while part.opcode in ('bitcast', 'get-tuple-element') and part.operands[0] in inner:
      part = inner[part.operands[0]]
    if part.opcode in ('parameter', *COLLECTIVES) or ASYNCHRONOUS in part.attributes:
      continue  # passed on from step to step
    slice_of = inner[part.operands[1]].arrays[0] if part.opcode == 'dynamic-update-slice' else array
    written.append(dataclasses.replace(slice_of, near=array.near))
  return tuple(written)
