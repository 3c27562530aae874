"""Reads untrusted pickle, .npy and JSON files without running any code in them.

A pickle is a program that may call anything. Here it can make only arrays, numpy scalars and dtypes, strings, bytes,
numbers, None, lists, tuples, sets and dicts; a request for anything else is refused. Pickles of Python 2 are read too,
with their strings decoded as latin1.

Access to numpy itself would not be safe either: the state that a pickle gives to a dtype can declare objects to be
plain bytes, and an array of that dtype then treats bytes of the file as addresses in memory. So while a pickle is read,
stand-ins take the place of dtypes and arrays, and they become real ones only after they have checked their state.
"""

import io
import json
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_PLAIN = re.compile(r'[<>=|]?(?:([biufc]\d+|[SU]\d*)|O[48]?|\?)')  # the names of dtypes that are admitted
_LATIN1 = ('latin1', 'latin-1', 'iso-8859-1')


class Refused(Exception):
  """A pickle asks for something that is not admitted."""


class Holder:
  """Base class for objects of a reader built on this one; their `args` and `state` may contain stand-ins."""

  args: Any = ()
  state: Any = None


class _Sealed:
  """Takes the place of a global in a pickle. It can at most be called, but neither changed nor inspected."""

  __slots__ = ('_call',)
  __hash__ = None  # type: ignore[assignment]  # so that none can hide in a set or as the key of a dict

  def __init__(self, call: Callable):
    self._call = call

  def __call__(self, *args: Any) -> Any:
    return self._call(*args)

  def __setstate__(self, state: Any) -> None:
    raise Refused('a change of a global')


class _Dtype:
  """Stands in for a dtype. Only the byte order is taken from its state; the name determines everything else."""

  __slots__ = ('value',)
  __hash__ = None  # type: ignore[assignment]

  def __init__(self, name: Any, align: Any = 0, copy: Any = 0):
    name = name.decode('latin1') if isinstance(name, bytes) else name
    if not isinstance(name, str) or not _PLAIN.fullmatch(name):
      raise Refused(f'the dtype {str(name)[:50]!r}')
    self.value = np.dtype(object) if 'O' in name else np.dtype(name)

  def __setstate__(self, state: Any) -> None:
    order: Any = state[1].decode('latin1') if isinstance(state[1], bytes) else state[1]
    if order not in ('<', '>', '=', '|') or any(part is not None for part in state[2:5]):
      raise Refused('a dtype of several parts')
    if order != '|':
      self.value = self.value.newbyteorder(order)


class _Array:
  """Stands in for an array until its state has been read."""

  __slots__ = ('value',)
  __hash__ = None  # type: ignore[assignment]

  def __init__(self, value: np.ndarray | None = None):
    self.value = value

  def __setstate__(self, state: Any) -> None:
    shape, dtype, fortran, data = state[-4:]  # preceded by a version, except in very old files
    self.value = _filled(data, _real(dtype), shape, 'F' if fortran else 'C')


def _real(dtype: Any) -> np.dtype:
  if type(dtype) is not _Dtype:
    raise Refused(f'an array of {type(dtype).__name__}')
  return dtype.value


def _filled(data: Any, dtype: np.dtype, shape: Any, order: Any) -> np.ndarray:
  """Makes an array of `shape` (a tuple or a number) from its bytes in this order or, for dtype object, from a list."""
  shape = (shape,) if isinstance(shape, int) else tuple(shape)
  if not all(isinstance(n, int) and n >= 0 for n in shape):
    raise ValueError(f'the shape {shape} of an array')
  if dtype.hasobject:
    if type(data) is not list or len(data) != math.prod(shape):
      raise Refused('an array of objects without a list of them')
    flat = np.empty(len(data), object)
    for i, value in enumerate(data):  # one by one, as numpy would unpack lists
      flat[i] = value
  else:
    data = data.encode('latin1') if isinstance(data, str) else bytes(data)  # str: from Python 2
    many_empty = math.prod(shape) > 1 and not data  # elements of no bytes: any number would fit
    if len(data) != math.prod(shape) * dtype.itemsize or many_empty:
      raise ValueError(f'{len(data)} bytes for an array of {dtype}{list(shape)}')
    flat = np.frombuffer(data, dtype).copy() if data else np.zeros(math.prod(shape), dtype)
  return flat.reshape(shape, order=order)


def _reconstruct(kind: Any, shape: Any, typecode: Any) -> _Array:
  if kind is not _ARRAY or tuple(shape) != (0,):
    raise Refused('an array of another class')
  return _Array()


def _frombuffer(buffer: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> _Array:
  """What numpy calls in pickles of protocol 5."""
  if type(buffer) not in (bytes, bytearray) or _real(dtype).hasobject:
    raise Refused('an array of a foreign buffer')
  array = _filled(buffer, _real(dtype), shape, 'F' if order == 'F' else 'C')
  return _Array(array if axes is None else array.transpose(axes))


def _scalar(dtype: Any, data: Any = None) -> Any:
  if _real(dtype).hasobject:
    raise Refused('a scalar of objects')
  return _filled(b'' if data is None else data, _real(dtype), (), 'C')[()]


def _encode(text: str, encoding: str = '') -> bytes:
  """What makes bytes in pickles that Python 3 writes in protocols of Python 2."""
  if type(text) is not str or encoding not in _LATIN1:
    raise Refused(f'the encoding {str(encoding)[:50]!r}')
  return text.encode('latin1')


def _inert(*args: Any) -> Any:
  raise Refused('a call of numpy.ndarray')


_ARRAY = _Sealed(_inert)  # the class, only as an argument of _reconstruct
GLOBALS: dict[tuple[str, str], _Sealed] = {('numpy', 'ndarray'): _ARRAY, ('numpy', 'dtype'): _Sealed(_Dtype)}
for _core in ('numpy.core', 'numpy._core'):  # before and since numpy 2
  GLOBALS[f'{_core}.multiarray', '_reconstruct'] = _Sealed(_reconstruct)
  GLOBALS[f'{_core}.multiarray', 'scalar'] = _Sealed(_scalar)
  GLOBALS[f'{_core}.numeric', '_frombuffer'] = _Sealed(_frombuffer)
for _builtin in ('builtins', '__builtin__'):  # of Python 3 and 2
  for _kind in (set, frozenset, complex):
    GLOBALS[_builtin, _kind.__name__] = _Sealed(_kind)
  GLOBALS[_builtin, 'bytes'] = _Sealed(lambda: b'')  # protocol 2 calls it only for empty bytes
GLOBALS['_codecs', 'encode'] = _Sealed(_encode)


class _Unpickler(pickle.Unpickler):
  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in GLOBALS:
      raise Refused(f'{module}.{name}'[:100])
    return GLOBALS[module, name]


_HOLDERS = {list, dict, OrderedDict, tuple, _Array, _Dtype, _Sealed}  # types that `plain` has to inspect


def _holds(kind: type) -> bool:
  return kind in _HOLDERS or issubclass(kind, Holder)


def plain(value: Any, done: dict[int, tuple[Any, Any]]) -> Any:
  """Replaces the stand-ins in `value` by real arrays and dtypes; lists, dicts and arrays are changed in place.

  `done` is id -> (before, after), as a pickle may contain a list many times, or a list that contains itself.
  """
  kind = type(value)
  if not _holds(kind) or (kind in (list, tuple) and not any(map(_holds, set(map(type, value))))):
    return value
  if id(value) in done:
    return done[id(value)][1]
  if kind is _Sealed:
    raise Refused('a global as a value')
  after: Any
  if kind is tuple:
    after = tuple(plain(v, done) for v in value)
  else:
    after = value.value if kind in (_Array, _Dtype) else value
  done[id(value)] = (value, after)
  if kind is list:
    value[:] = [plain(v, done) for v in value]
  elif isinstance(value, dict):
    for key in value:
      value[key] = plain(value[key], done)
  elif isinstance(value, Holder):
    value.args, value.state = plain(value.args, done), plain(value.state, done)
  elif kind is _Array:
    if after is None:
      raise Refused('an array that was never filled')
    if after.dtype.hasobject:
      flat = after.ravel('K')  # a view with one axis: numpy would unpack an array that is assigned to a 0-d one
      for i, v in enumerate(flat):
        flat[i] = plain(v, done)
  return after


def _unpickled(file: io.BufferedIOBase) -> Any:
  return plain(_Unpickler(file, encoding='latin1').load(), {})


def _read(path: Path) -> Any:
  if path.suffix == '.json':
    return json.loads(path.read_bytes())
  with path.open('rb') as file:
    if file.peek(6)[:6] != b'\x93NUMPY':
      return _unpickled(file)
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(file)
    if not dtype.hasobject:
      file.seek(0)
      return np.lib.format.read_array(file, allow_pickle=False)
    value = _unpickled(file)
    if not isinstance(value, np.ndarray) or value.shape != shape:
      raise ValueError('its array does not have the shape given in its header')
  return value if value.shape else value.item()


def load(path: str | Path, expected: str, kind: type | tuple[type, ...] = object) -> Any:
  """Reads a pickle, .npy or .json file. For a 0-d array of dtype object, returns the object in it.

  Args:
    path: the file; only JSON is recognised by its suffix.
    expected: a description of what the file should contain, for messages.
    kind: the class of the result.

  Raises FileNotFoundError, or ValueError for a file that is damaged, contains another kind of object or asks for
  anything but data (the message names the global). All messages have one line.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'{path} is missing; expected {expected}.')
  try:
    value = _read(path)
  except Refused as e:
    raise ValueError(
      f'{path} is refused, as it asks for {_line(e)}; expected {expected}, made only of arrays, strings, numbers, '
      'lists, tuples, sets and dicts. Do not trust this file; download it again.'
    ) from None
  except Exception as e:  # a damaged pickle makes the reader raise nearly anything
    raise ValueError(f'{path} cannot be read ({_line(e)}); expected {expected}. Is it complete?') from e
  if not isinstance(value, kind):
    raise ValueError(f'{path} contains a {type(value).__name__}; expected {expected}.')
  return value


def open_array(path: str | Path, expected: str) -> np.ndarray:
  """Maps the array of a .npy file, never one of objects. Raises FileNotFoundError or ValueError, one line."""
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'{path} is missing; expected {expected}.')
  try:
    return np.lib.format.open_memmap(path, mode='r')
  except Exception as e:
    raise ValueError(f'{path} cannot be read ({_line(e)}); expected {expected}. Is it complete?') from e


def _line(error: Exception) -> str:
  return ' '.join(f'{error}'.split())[:200] or type(error).__name__
