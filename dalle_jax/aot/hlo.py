"""A parser for the text of an HLO module."""

import dataclasses
import math
import re
from collections.abc import Iterator

BYTES = {
  'token': 0, 'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4,
  'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8, 'c128': 16,
}  # fmt: skip
_ARRAY = re.compile(r'([a-z][a-z0-9]*)\[([\d,<= ]*)\](?:\{([^{}]*)\})?')
_NAME = re.compile(r'%?([\w.\-]+)$')


@dataclasses.dataclass(frozen=True)
class Array:
  """The type of an array; `near` if it is in the memory of the core and not in HBM."""

  dtype: str
  dims: tuple[int, ...]
  near: bool = False

  @property
  def bytes(self) -> float:
    return math.prod(self.dims) * BYTES.get(self.dtype, 1)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction; `arrays` are its results, `operands` the names of its inputs."""

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  text: str  # between the parentheses; the value of a constant
  attributes: str
  root: bool

  def called(self, kind: str) -> list[str]:
    """The computations that the attribute `kind` names."""
    match = re.search(rf'\b{kind}=(\{{[^}}]*\}}|%?[\w.\-]+)', self.attributes)
    return re.findall(r'[\w.\-]+', match[1]) if match else []


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """Returns the computations of an HLO module by name, and the name of the entry. Raises ValueError if it has none."""
  computations: dict[str, Computation] = {}
  entry, body = '', None
  for line in text.splitlines():
    # A '}' with other text behind it ends an attribute that spans several lines.
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
    raise ValueError('the text is not an HLO module: it has no ENTRY; expected the text of Compiled.as_text().')
  return computations, entry


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
  """The index of the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == '(') - (text[i] == ')')
    if not depth:
      return i
  raise ValueError(f'a parenthesis is not closed in the HLO {text[:80]!r}.')


def _parts(text: str) -> Iterator[str]:
  """Splits at the commas outside of brackets."""
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
