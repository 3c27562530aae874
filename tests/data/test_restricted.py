"""Files of strangers give data, whoever wrote them and when, and nothing in them is ever run."""

import io
import os
import pickle
import struct
from typing import ClassVar

import numpy as np
import pytest

from dalle_jax.data import restricted


class Python2(pickle._Pickler):
  """Writes as Python 2 did: text and bytes are both its plain strings."""

  dispatch: ClassVar = dict(pickle._Pickler.dispatch)

  def _string(self, value):
    raw = value.encode('latin1') if isinstance(value, str) else value
    self.write(pickle.BINSTRING + struct.pack('<i', len(raw)) + raw)
    self.memoize(value)

  dispatch[str] = dispatch[bytes] = _string


def python2(value):
  file = io.BytesIO()
  Python2(file, protocol=2).dump(value)
  return file.getvalue().replace(b'cnumpy._core.', b'cnumpy.core.')


def write_npy(path, value, dumps=python2):
  """As numpy.save writes an array of objects; the pickle in it is `dumps` of the array."""
  array = value if isinstance(value, np.ndarray) else np.array(value, object)
  with path.open('wb') as file:
    header = {'descr': '|O', 'fortran_order': False, 'shape': array.shape}
    np.lib.format.write_array_header_1_0(file, header)
    file.write(dumps(array))


def objects(*values):
  array = np.empty(len(values), object)
  array[:] = values
  return array


DATA = [
  *(None, True, 3, 10**40, 2.5, 1j, 'zw\u00f6lf', b'bytes', b'', [1, [2]], (1, ('a',)), {'a': {1: []}}),
  *({1, 2}, frozenset('a'), np.float32(2), np.int64(-1), np.bool_(True), np.str_('x'), np.str_(''), np.bytes_(b'y')),
  *(np.arange(3.0), np.arange(6, dtype='>i4').reshape(2, 3), np.array('a'), np.array(['a', 'bc']), np.array([b'a'])),
  *(np.zeros((0, 3), np.uint8), np.asfortranarray(np.arange(6).reshape(2, 3)), np.ones(2, bool), np.dtype('>f4')),
  *(np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2), objects(None, [1], np.arange(2)), objects({'a': np.ones(1)})),
  {'id': [np.arange(2, dtype=np.float32), (np.arange(3), 'x')]},
]


@pytest.mark.parametrize('protocol', range(6))
def test_data_comes_back_as_it_was(tmp_path, protocol):
  for value in DATA:
    (tmp_path / 'a.pkl').write_bytes(pickle.dumps(value, protocol))
    back = restricted.load(tmp_path / 'a.pkl', 'data')
    assert type(back) is type(value) and repr(back) == repr(value)
    if isinstance(value, np.ndarray):
      assert back.dtype == value.dtype and back.flags.writeable


def test_python_2_and_old_numpy_are_read(tmp_path):
  table = {'Pororo/1': ['caf\u00e9'], 'v': [np.arange(4, dtype=np.float32)], 's': np.float64(0.5)}
  (tmp_path / 'a.pkl').write_bytes(python2(table))
  write_npy(tmp_path / 'a.npy', table)
  assert b'numpy.core.multiarray' in (tmp_path / 'a.npy').read_bytes()
  for name in ('a.pkl', 'a.npy'):
    assert repr(restricted.load(tmp_path / name, 'data', dict)) == repr(table)
  write_npy(tmp_path / 'b.npy', objects(np.arange(2), [3], np.int64(4)))
  assert repr(restricted.load(tmp_path / 'b.npy', 'data')) == repr(objects(np.arange(2), [3], np.int64(4)))


def test_plain_arrays_and_json(tmp_path):
  np.save(tmp_path / 'a.npy', np.array([b'a', b'b']))
  assert restricted.load(tmp_path / 'a.npy', 'names').tolist() == [b'a', b'b']
  np.save(tmp_path / 'b.npy', np.arange(6).reshape(2, 3))
  opened = restricted.open_array(tmp_path / 'b.npy', 'numbers')
  assert isinstance(opened, np.memmap) and opened.tolist() == [[0, 1, 2], [3, 4, 5]]
  (tmp_path / 'a.json').write_text('{"train": ["a"]}')
  assert restricted.load(tmp_path / 'a.json', 'ids', dict) == {'train': ['a']}


def test_what_is_shared_stays_so_and_a_list_may_hold_itself(tmp_path):
  inner, array = [1], np.arange(2)
  inner.append(inner)
  (tmp_path / 'a.pkl').write_bytes(pickle.dumps([inner, (inner, array), array]))
  back = restricted.load(tmp_path / 'a.pkl', 'data')
  assert back[0] is back[1][0] and back[0][1] is back[0] and back[1][1] is back[2]
  nested = ('x', array)
  for _ in range(200):
    nested = (nested, nested)  # 2 ** 200 to one who does not notice
  (tmp_path / 'b.pkl').write_bytes(pickle.dumps(nested))
  assert len(restricted.load(tmp_path / 'b.pkl', 'data')) == 2


# --- Hostile ones


class Runs:
  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


def refused(path, message):
  with pytest.raises(ValueError, match=message) as e:
    restricted.load(path, 'a dict')
  assert '\n' not in str(e.value) and str(path) in str(e.value) and 'is refused' in str(e.value)


@pytest.mark.parametrize('protocol', range(6))
def test_a_call_is_refused_and_not_made_wherever_it_hides(tmp_path, protocol):
  mark = tmp_path / 'mark'
  call = Runs(os.system, f'touch {mark}')
  hidden = [call, [call], {'a': (1, call)}, {1: {2: call}}, objects(1, call), {call}]
  for value in hidden:
    (tmp_path / 'a.pkl').write_bytes(pickle.dumps(value, protocol))
    refused(tmp_path / 'a.pkl', r'asks for (posix|nt)\.system')
    write_npy(tmp_path / 'a.npy', value, lambda array: pickle.dumps(array, protocol))
    refused(tmp_path / 'a.npy', r'asks for (posix|nt)\.system')
  assert not mark.exists()


@pytest.mark.parametrize(
  'module, name',
  [
    ('builtins', 'eval'),
    ('__builtin__', 'getattr'),
    ('builtins', 'type'),
    ('functools', 'partial'),
    ('copyreg', '_reconstructor'),
    ('numpy', 'load'),
    ('numpy', 'memmap'),
    ('numpy', 'matrix'),
    ('numpy.dtypes', 'ObjectDType'),
    ('ml_dtypes', 'bfloat16'),
    ('numpy._core.multiarray', 'fromfile'),
    ('numpy.core._internal', '_convert_to_stringdtype_kwargs'),
    ('numpy', 'dtype.__init__'),
    ('numpy.core.multiarray', '_reconstruct.__globals__'),
    ('dalle_jax.data.restricted', '_Dtype'),
  ],
)
def test_only_globals_of_the_list_are_there(tmp_path, module, name):
  short = lambda s: pickle.SHORT_BINUNICODE + bytes([len(s)]) + s.encode()
  (tmp_path / '0.pkl').write_bytes(f'c{module}\n{name}\n.'.encode())
  (tmp_path / '4.pkl').write_bytes(b'\x80\x04' + short(module) + short(name) + pickle.STACK_GLOBAL + b'.')
  for file in ('0.pkl', '4.pkl'):
    refused(tmp_path / file, f'asks for {module}.{name}'.replace('.', r'\.'))


def test_what_a_dtype_claims_of_itself_is_not_believed(tmp_path):
  """To numpy, an array of this dtype has addresses in its bytes: it would read and run what lies there."""
  dtype = b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR"
  no_objects = b"(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
  array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
  state = b'(I1\n(I1\nt' + dtype + no_objects + b"I00\nS'AAAAAAAA'\ntb."
  (tmp_path / 'a.pkl').write_bytes(array + state)
  refused(tmp_path / 'a.pkl', 'objects without a list')
  parts = b"(I3\nS'|'\nN(S'a'\nt(dS'a'\n(" + dtype + b'I0\ntsI8\nI1\nI0\ntb.'
  (tmp_path / 'b.pkl').write_bytes(b"cnumpy\ndtype\n(S'S8'\nI0\nI1\ntR" + parts)
  refused(tmp_path / 'b.pkl', 'several parts')
  for name in (b'V8', b'M8[s]', b'O,f4', b'(2,)f4', b'f4,f4', b'T'):
    (tmp_path / 'c.pkl').write_bytes(b"cnumpy\ndtype\n(S'" + name + b"'\ntR.")
    refused(tmp_path / 'c.pkl', 'the dtype')


@pytest.mark.parametrize(
  'body, message',
  [
    (b'cnumpy\nndarray\n.', 'global as a value'),
    (b'cnumpy\nndarray\n(I3\ntR.', 'a call of numpy.ndarray'),
    (b"cnumpy\nndarray\n(dS'x'\nI1\nsb.", 'a change of a global'),
    (b"cnumpy.core.multiarray\n_reconstruct\n(N(dS'_call'\nI1\nstb.", 'a change of a global'),
    (b'cnumpy.core.multiarray\n_reconstruct\n(c__builtin__\nset\n(I0\ntNtR.', 'another class'),
    (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I9999999999\ntS'b'\ntR.", 'another class'),
    (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR.", 'never filled'),
    (b"c_codecs\nencode\n(Va\nS'rot13'\ntR.", 'the encoding'),
  ],
)
def test_admitted_globals_cannot_be_misused(tmp_path, body, message):
  (tmp_path / 'a.pkl').write_bytes(body)
  refused(tmp_path / 'a.pkl', message)


# --- Damaged ones


def test_damaged_and_wrong_files_are_one_line(tmp_path):
  whole = pickle.dumps({'a': np.arange(100)})
  np.save(tmp_path / 'whole.npy', np.arange(100))
  header = (tmp_path / 'whole.npy').read_bytes()
  deep = b'(' * 5000 + b'I1\n' + b't' * 5000 + b'.'
  many = b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'f8'\nI0\nI1\ntRS'abc'\ntR."
  for body in (b'', b'text', whole[:-40], header[:300], header[:20], b'PK\x03\x04zip', deep, many):
    for name in ('a.pkl', 'a.npy', 'a.json'):
      (tmp_path / name).write_bytes(body)
      with pytest.raises(ValueError, match='expected a dict') as e:
        restricted.load(tmp_path / name, 'a dict', dict)
      assert '\n' not in str(e.value) and str(tmp_path / name) in str(e.value)
      with pytest.raises(ValueError, match='cannot be read'):
        restricted.open_array(tmp_path / name, 'an array')
  for read in (restricted.load, restricted.open_array):
    with pytest.raises(FileNotFoundError, match=r'gone\.npy is missing; expected a dict'):
      read(tmp_path / 'gone.npy', 'a dict')
  write_npy(tmp_path / 'objects.npy', {'a': 1})
  with pytest.raises(ValueError, match='cannot be read'):
    restricted.open_array(tmp_path / 'objects.npy', 'an array')
  with pytest.raises(ValueError, match=r'contains a dict; expected a list\.'):
    restricted.load(tmp_path / 'objects.npy', 'a list', list)
