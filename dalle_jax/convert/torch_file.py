"""Reads PyTorch checkpoints (.ckpt, .pt, .pth, .pkl, .bin) without PyTorch and without executing code in them.

There are two layouts: the zip archive of torch 1.6 and later (data.pkl and one record per storage), and the older
stream (pickles, then the storages one after the other). A pickle may call anything. Here it can build tensors, what
`data.restricted` allows (arrays, containers, numbers, strings), and inert records in place of objects from the packages
in STUBBED, which real checkpoints are full of; everything else is refused.

Tensors stay in the file until they are read, so a model of any size can be inspected first.
"""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dalle_jax.data.restricted import GLOBALS, Holder, Refused, plain

STORAGES = {  # storage class -> dtype in the file; bfloat16 becomes float32 when read
  'FloatStorage': 'f4', 'HalfStorage': 'f2', 'BFloat16Storage': 'bf16', 'DoubleStorage': 'f8', 'LongStorage': 'i8',
  'IntStorage': 'i4', 'ShortStorage': 'i2', 'CharStorage': 'i1', 'ByteStorage': 'u1', 'BoolStorage': '?',
}  # fmt: skip
DTYPES = {
  'float32': 'f4', 'float16': 'f2', 'bfloat16': 'bf16', 'float64': 'f8', 'int64': 'i8', 'int32': 'i4', 'int16': 'i2',
  'int8': 'i1', 'uint8': 'u1', 'bool': '?',
}  # fmt: skip
STUBBED = (  # packages whose objects become inert records
  'torch', 'torchvision', 'pytorch_lightning', 'lightning', 'lightning_fabric', 'torchmetrics', 'omegaconf', 'argparse',
  'dall_e', 'taming', 'dalle', 'rudalle', 'pathlib', 'datetime', 'numpy.random',
)  # fmt: skip
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # at the start of the stream layout
LIMIT = 2**29  # bytes of a pickle, which only names tensors and does not hold them


class Stub(Holder):
  """An inert record in place of an object: the name of its class, its constructor arguments, its attributes."""

  kind = ''

  def __new__(cls, *args: Any, **kwargs: Any) -> 'Stub':
    self = object.__new__(cls)
    self.args, self.state = args, {}
    return self

  def __init__(self, *args: Any, **kwargs: Any):
    pass

  def __setstate__(self, state: Any) -> None:
    if isinstance(state, tuple) and len(state) == 2:  # attributes and slots
      state = {**(state[0] or {}), **(state[1] or {})}
    self.state = state if isinstance(state, dict) else {'state': state}

  def append(self, value: Any) -> None:
    self.extend([value])

  def extend(self, values: Any) -> None:
    self.state.setdefault('items', []).extend(values)

  def __setitem__(self, key: Any, value: Any) -> None:
    self.state.setdefault('dict', {})[key] = value

  def __repr__(self) -> str:
    return f'<{self.kind}>'


class Storage:
  """`count` numbers of type `dtype` in the file; `read` returns them as a one-dimensional array."""

  __slots__ = ('count', 'dtype', 'read')
  __hash__ = None  # type: ignore[assignment]

  def __init__(self, dtype: str, count: int):
    self.dtype, self.count = dtype, count
    self.read: Callable[[], np.ndarray] = self._absent

  def __setstate__(self, state: Any) -> None:
    raise Refused('a modified storage')

  @property
  def bytes(self) -> int:
    return self.count * (2 if self.dtype == 'bf16' else np.dtype(self.dtype).itemsize)

  def _absent(self) -> np.ndarray:
    raise ValueError('a storage is missing')


class Tensor:
  """A tensor that is still in its file, with `shape`, `dtype` and `numpy()`."""

  __slots__ = ('_offset', '_storage', '_strides', 'shape')

  def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any):
    shape, strides = tuple(shape), tuple(strides)
    numbers = (offset, *shape, *strides)
    if type(storage) is not Storage or not all(type(n) is int and n >= 0 for n in numbers):
      raise Refused('a tensor without a valid storage')
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if len(shape) > 32 or math.prod(shape) > max(storage.count, LIMIT) or (math.prod(shape) and last >= storage.count):
      raise ValueError(f'a tensor {list(shape)} reaches past the {storage.count} numbers of its storage')
    self._storage, self._offset, self.shape, self._strides = storage, offset, shape, strides

  def __setstate__(self, state: Any) -> None:
    raise Refused('a modified tensor')

  @property
  def dtype(self) -> np.dtype:
    return np.dtype('f4' if self._storage.dtype == 'bf16' else self._storage.dtype)

  def numpy(self) -> np.ndarray:
    """Reads the tensor; its memory may be shared with other tensors. Raises ValueError for a damaged file."""
    if not math.prod(self.shape):
      return np.zeros(self.shape, self.dtype)
    flat = self._storage.read()[self._offset :]
    if self._storage.dtype == 'bf16':
      flat = (flat.astype(np.uint32) << 16).view(np.float32)
    strides = [s * flat.itemsize for s in self._strides]
    return np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)


class _Class:
  """Stands for a function or class of torch: something to call, or only the name of a dtype or storage."""

  __slots__ = ('call', 'name')

  def __init__(self, name: str, call: Callable | None = None):
    self.name, self.call = name, call

  def __call__(self, *args: Any) -> Any:
    if self.call is None:
      raise Refused(f'a call of {self.name}')
    return self.call(*args)

  def __setstate__(self, state: Any) -> None:
    raise Refused(f'a modified {self.name}')


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
  return Tensor(storage, offset, shape, strides)


def _tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *rest) -> Tensor:
  """A tensor whose storage is untyped bytes."""
  kind = DTYPES.get(getattr(dtype, 'name', '').removeprefix('torch.'))
  if kind is None or type(storage) is not Storage or storage.dtype != 'u1':
    raise Refused('a tensor of an unknown dtype')
  width = 2 if kind == 'bf16' else np.dtype(kind).itemsize
  typed, raw = Storage(kind, storage.count // width), storage
  typed.read = lambda: raw.read()[: typed.count * width].view('u2' if kind == 'bf16' else kind)
  return Tensor(typed, offset, shape, strides)


def _first(data: Any, *rest: Any) -> Any:
  return data


TORCH: dict[tuple[str, str], Any] = {
  ('torch._utils', '_rebuild_tensor'): _Class('_rebuild_tensor', _tensor),
  ('torch._utils', '_rebuild_tensor_v2'): _Class('_rebuild_tensor_v2', _tensor),
  ('torch._utils', '_rebuild_tensor_v3'): _Class('_rebuild_tensor_v3', _tensor_v3),
  ('torch._utils', '_rebuild_parameter'): _Class('_rebuild_parameter', _first),
  ('torch._utils', '_rebuild_parameter_with_state'): _Class('_rebuild_parameter_with_state', _first),
  ('torch', 'Size'): _Class('torch.Size', lambda items=(): tuple(items)),
  ('torch', 'device'): _Class('torch.device', lambda *parts: ':'.join(map(str, parts))),
  ('torch.serialization', '_get_layout'): _Class('torch.layout', str),
  ('torch.storage', 'UntypedStorage'): _Class('ByteStorage'),
  ('collections', 'OrderedDict'): OrderedDict,
  ('collections', 'defaultdict'): _Class('defaultdict', lambda *args: {}),
  ('collections', 'Counter'): _Class('Counter', lambda items=(): dict(items)),
}
TORCH |= {('torch', name): _Class(name) for name in STORAGES}
TORCH |= {('torch', name): _Class(f'torch.{name}') for name in DTYPES}


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]
  """The pure Python unpickler, as a damaged file can make the C one allocate any amount of memory."""

  def __init__(self, file: Any, storage: Callable[[tuple], Storage]):
    super().__init__(file, encoding='latin1')
    self._storage, self._stubs = storage, {}

  def find_class(self, module: str, name: str) -> Any:
    known = TORCH.get((module, name)) or GLOBALS.get((module, name))
    if known is not None:
      return known
    if not any(module == root or module.startswith(f'{root}.') for root in STUBBED) or 'load' in name.lower():
      raise Refused(f'{module}.{name}'[:100])
    if (module, name) not in self._stubs:
      self._stubs[module, name] = type('Stub', (Stub,), {'kind': f'{module}.{name}'})
    return self._stubs[module, name]

  def persistent_load(self, saved: Any) -> Storage:
    return self._storage(saved)

  def get_extension(self, code: int) -> None:
    raise Refused('a pickle extension')


def _kind(saved: Any) -> tuple[str, str, int]:
  """The dtype, key and count in a storage's persistent id: ('storage', class, key, device, count, ...)."""
  if not isinstance(saved, tuple) or len(saved) < 5 or saved[0] != 'storage':
    raise ValueError('a persistent id does not name a storage')
  name, key, count = getattr(saved[1], 'name', ''), saved[2], saved[4]
  if name not in STORAGES or type(count) is not int or count < 0:
    raise ValueError(f'a storage of type {str(name)[:50]!r}')
  return STORAGES[name], str(key), count


def _array(data: Any, storage: Storage) -> np.ndarray:
  if len(data) != storage.bytes:
    raise ValueError(f'a storage has {len(data)} bytes, expected {storage.bytes}')
  return np.frombuffer(data, 'u2' if storage.dtype == 'bf16' else storage.dtype)


def _in_one_line(path: Path, read: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
  """Wraps `read` so that every error becomes a one-line ValueError that names the file."""

  def guarded() -> np.ndarray:
    try:
      return read()
    except Exception as e:  # a damaged archive makes zipfile raise nearly anything
      raise ValueError(f'{path} is damaged ({_line(e)}); download it again.') from e

  return guarded


# --- The two layouts


def _zip(path: Path) -> Any:
  with zipfile.ZipFile(path) as archive:
    names = {i.filename: i for i in archive.infolist()}
    pickles = [n for n in names if n.endswith('/data.pkl') and n.count('/') == 1]
    if len(pickles) != 1:
      raise ValueError('it does not contain exactly one data.pkl')
    root = pickles[0].removesuffix('data.pkl')
    order = f'{root}byteorder'
    if order in names and archive.read(order) != b'little':
      raise ValueError('its numbers are big-endian')
    if names[pickles[0]].file_size > LIMIT:
      raise ValueError(f'its pickle has {names[pickles[0]].file_size} bytes, more than {LIMIT}')
    text = archive.read(pickles[0])
  storages: dict[str, Storage] = {}

  def storage(saved: Any) -> Storage:
    dtype, key, count = _kind(saved)
    if key not in storages:
      made = Storage(dtype, count)
      name = f'{root}data/{key}'
      record = names.get(name)
      if record is None or record.file_size != made.bytes or record.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f'the storage {key[:50]} is missing, truncated or compressed')

      def read() -> np.ndarray:
        with zipfile.ZipFile(path) as archive:  # verifies the checksum
          return _array(archive.read(name), made)

      made.read = _in_one_line(path, read)
      storages[key] = made
    return storages[key]

  return _Unpickler(io.BytesIO(text), storage).load()


def _stream(file: io.BufferedReader, path: Path) -> Any:
  refuse = lambda saved: _kind(saved) and None
  limited = _Limited(file)
  magic, version = (_Unpickler(limited, refuse).load() for _ in range(2))
  if magic != MAGIC or version != PROTOCOL:
    raise ValueError('it does not begin like a PyTorch checkpoint')
  system = _Unpickler(limited, refuse).load()
  if not isinstance(system, dict) or not system.get('little_endian', True):
    raise ValueError('its numbers are big-endian')
  storages: dict[str, Storage] = {}
  views: dict[str, Storage] = {}

  def storage(saved: Any) -> Storage:
    dtype, key, count = _kind(saved)
    made = storages.setdefault(key, Storage(dtype, count))
    view = saved[5] if len(saved) > 5 else None
    if view is None:
      return made
    name, offset, size = view  # part of a storage, as torch wrote it before 0.4
    if not all(type(n) is int and n >= 0 for n in (offset, size)) or offset + size > count:
      raise ValueError('a view reaches past its storage')
    part = views.setdefault(str(name), Storage(dtype, size))
    part.read = lambda: made.read()[offset : offset + size]
    return part

  value = _Unpickler(limited, storage).load()
  keys = _Unpickler(limited, refuse).load()
  if not isinstance(keys, list):
    raise ValueError('the list of its storages is missing')
  for key in map(str, keys):
    head = file.read(8)
    if key not in storages or len(head) != 8 or struct.unpack('<q', head)[0] != storages[key].count:
      raise ValueError(f'the storage {key[:50]} is missing or truncated')
    made, start = storages[key], file.tell()
    if start + made.bytes > path.stat().st_size:
      raise ValueError(f'the storage {key[:50]} is truncated')

    def read(made: Storage = made, start: int = start) -> np.ndarray:
      with path.open('rb') as again:
        again.seek(start)
        return _array(again.read(made.bytes), made)

    made.read = _in_one_line(path, read)
    file.seek(start + made.bytes)
  return value


class _Limited:
  """A file of pickles that returns at most LIMIT bytes at once."""

  def __init__(self, file: io.BufferedReader):
    self._file = file
    self.readline = file.readline

  def read(self, count: int) -> bytes:
    if count > LIMIT:
      raise ValueError(f'its pickle asks for {count} bytes, more than {LIMIT}')
    return self._file.read(count)


def load(path: str | Path) -> Any:
  """Reads a torch.save file, with `Tensor` for tensors and `Stub` for objects of other packages.

  Raises FileNotFoundError, or ValueError with a one-line message for a file that is damaged, in another format, or asks
  for anything but data, which the message names.
  """
  path = Path(path).expanduser()
  expected = 'a checkpoint written by torch.save'
  if not path.is_file():
    raise FileNotFoundError(f'{path} is missing; expected {expected}.')
  try:
    with path.open('rb') as file:
      head = file.peek(4)[:4]
      value = _zip(path) if head == b'PK\x03\x04' else _stream(file, path)
    return plain(value, {})
  except Refused as e:
    raise ValueError(
      f'{path} is refused because it asks for {_line(e)}; expected {expected} with only tensors, containers, numbers '
      'and strings. Do not trust this file; get it from another source.'
    ) from None
  except MemoryError:
    raise ValueError(
      f'{path} cannot be read (it asks for too much memory); expected {expected}. Is it complete?'
    ) from None
  except Exception as e:  # a damaged pickle makes the reader raise nearly anything
    raise ValueError(f'{path} cannot be read ({_line(e)}); expected {expected}. Is it complete?') from e


def _line(error: Exception) -> str:
  return ' '.join(f'{error}'.split())[:200] or type(error).__name__


def flat(tree: Any, prefix: str = '') -> dict[str, Tensor]:
  """Flattens nested dicts and lists to tensors by dotted name."""
  if isinstance(tree, Tensor):
    return {prefix: tree}
  items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
  tensors = {}
  for key, value in items:
    tensors |= flat(value, f'{prefix}.{key}' if prefix else str(key))
  return tensors


def module(stub: Any, prefix: str = '') -> dict[str, Tensor]:
  """The state_dict of a pickled module. Raises ValueError for any other object."""
  state = stub.state if isinstance(stub, Stub) else {}
  if not isinstance(state.get('_parameters'), Mapping) or not isinstance(state.get('_modules'), Mapping):
    raise ValueError(f'{stub!r:.100} is not a PyTorch module.')
  direct = {**state['_parameters'], **state.get('_buffers', {})}
  tensors = {f'{prefix}{name}': t for name, t in direct.items() if isinstance(t, Tensor)}
  for name, child in state['_modules'].items():
    if child is not None:
      tensors |= module(child, f'{prefix}{name}.')
  return tensors
