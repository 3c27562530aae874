"""Encoding ahead of time: the codes and captions of every usable picture, once, whatever interrupts it."""

import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dalle_jax.data import pipeline
from dalle_jax.data.sources import tokens
from dalle_jax.pipelines import encode
from tests.data.fakes import Numbered, data_config, encode_text


class FakeVQGAN:
  """Codes are the mean brightness of 4 x 4 cells plus a parameter."""

  num_codes = 1000

  def grid(self, image_size):
    return image_size // 4, image_size // 4

  def apply(self, variables, images, method):
    assert method == 'encode' and images.dtype == jnp.float32
    b, h, w, _ = images.shape
    cells = ((images + 1) * 127.5).reshape(b, h // 4, 4, w // 4, 4, 3).mean((2, 4, 5))
    return jnp.round(cells + variables['params']['offset']).astype(jnp.int32)


@pytest.fixture(autouse=True)
def fake_vqgan(monkeypatch):
  monkeypatch.setattr(encode.image_tokenizer, 'of_run', lambda config: FakeVQGAN())


def run(offset=0.0, sharding=None):
  params = {'offset': jax.device_put(jnp.float32(offset), sharding)}
  return types.SimpleNamespace(config={'model': {'variant': 'test'}}, network=lambda name: params)


def encoded(path):
  source = tokens.Tokens(path)
  return [(source[i]['tokens'].tolist(), source[i]['captions']) for i in range(len(source))]


def expected(indices, offset=0):
  return [([i + offset] * 4, [f'number {i}']) for i in indices]


def test_every_usable_picture_is_encoded_once_and_read_back(tmp_path):
  source = Numbered(11, broken=[4, 10], silent=[2])
  meta = encode.encode_dataset(source, run(), tmp_path, 8, 4)
  assert (meta['count'], meta['skipped'], meta['grid'], meta['num_codes'], meta['dtype']) == (
    9,
    2,
    [2, 2],
    1000,
    'uint16',
  )
  usable = [i for i in range(11) if i not in (4, 10)]
  assert encoded(tmp_path) == [(c, [] if i == 2 else t) for i, (c, t) in zip(usable, expected(usable), strict=True)]
  files = {'meta.json', 'tokens.bin', 'captions.jsonl', 'captions.ends', 'lock'}
  assert {p.name for p in tmp_path.iterdir()} == files
  stream = pipeline.make_loader(
    tokens.Tokens(tmp_path), data_config(), encode_text=encode_text, batch_size=8, seed=0, shuffle=True
  )
  batch = next(stream)
  assert batch['tokens'].shape == (8, 4)
  np.testing.assert_array_equal(batch['tokens'][:, 0], batch['text'][:, 0])
  stream.close()


def test_a_finished_folder_is_left_alone_until_network_source_or_size_change(tmp_path, monkeypatch):
  encode.encode_dataset(Numbered(5), run(), tmp_path, 8, 4)
  with monkeypatch.context() as patch:
    patch.setattr(pipeline, 'make_loader', lambda *_, **__: pytest.fail('encoded again'))
    encode.encode_dataset(Numbered(5), run(), tmp_path, 8, 2)
  encode.encode_dataset(Numbered(5), run(3.0), tmp_path, 8, 4)
  assert encoded(tmp_path) == expected(range(5), 3)
  encode.encode_dataset(Numbered(6), run(3.0), tmp_path, 8, 4)
  assert encoded(tmp_path) == expected(range(6), 3)
  encode.encode_dataset(Numbered(6, silent=[0]), run(3.0), tmp_path, 8, 4)
  assert encoded(tmp_path)[0][1] == []
  assert encode.encode_dataset(Numbered(6), run(3.0), tmp_path, 16, 4)['grid'] == [4, 4]


class Killed(Exception):
  pass


@pytest.mark.parametrize('resumed_batch', [4, 3, 8])
def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch, resumed_batch):
  source = Numbered(23, broken=[5])
  monkeypatch.setattr(encode, 'SAVE_EVERY', 0.0)

  def killed(self, start, *rest):
    if start >= 12:
      self.files[0].write(b'torn bytes after the last save')
      [f.close() for f in self.files]
      raise Killed
    whole(self, start, *rest)

  whole = encode._Writer.append
  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(encode._Writer, 'append', killed)
    encode.encode_dataset(source, run(), tmp_path, 8, 4)
  with pytest.raises(FileNotFoundError):
    tokens.Tokens(tmp_path)  # half a data set does not pass for a whole one
  starts = []
  with monkeypatch.context() as patch:
    patch.setattr(encode._Writer, 'append', lambda self, *a: (starts.append(a[0]), whole(self, *a)))
    meta = encode.encode_dataset(source, run(), tmp_path, 8, resumed_batch)
  assert starts[0] == 12 // resumed_batch * resumed_batch
  assert (meta['count'], meta['skipped']) == (22, 1)
  assert encoded(tmp_path) == expected(i for i in range(23) if i != 5)


def test_a_killed_run_of_another_network_is_not_gone_on_with(tmp_path, monkeypatch):
  monkeypatch.setattr(encode, 'SAVE_EVERY', 0.0)
  with monkeypatch.context() as patch, pytest.raises(Killed):

    def finish(self):
      raise Killed

    patch.setattr(encode._Writer, 'finish', finish)
    encode.encode_dataset(Numbered(9), run(), tmp_path, 8, 4)
  encode.encode_dataset(Numbered(9), run(1.0), tmp_path, 8, 4)
  assert encoded(tmp_path) == expected(range(9), 1)


def test_a_second_command_waits_for_the_first_and_finds_the_folder_finished(tmp_path, monkeypatch, capsys):
  commands, whole, starts = [], encode._Writer.append, []
  encode_again = lambda: encode.encode_dataset(Numbered(9), run(), tmp_path, 8, 4)

  def append(self, start, *rest):
    starts.append(start)
    if not commands:
      commands.append(threading.Thread(target=encode_again))
      commands[0].start()
      commands[0].join(0.5)
      assert commands[0].is_alive() and starts == [0]
    whole(self, start, *rest)

  monkeypatch.setattr(encode._Writer, 'append', append)
  encode_again()
  commands[0].join()
  assert starts == [0, 4, 8] and encoded(tmp_path) == expected(range(9))
  assert f'{tmp_path} is being encoded by another command; waiting' in capsys.readouterr().out


def test_files_that_something_else_writes_to_are_not_finished(tmp_path, monkeypatch):
  """As on a file system without locks."""
  whole = encode._Writer.append

  def append(self, *rest):
    whole(self, *rest)
    with (tmp_path / 'tokens.partial').open('ab') as file:
      file.write(b'codes')

  monkeypatch.setattr(encode._Writer, 'append', append)
  with pytest.raises(ValueError, match=r'tokens.partial has 87 bytes after 72 were written: something else writes'):
    encode.encode_dataset(Numbered(9), run(), tmp_path, 8, 4)
  assert not (tmp_path / 'meta.json').exists()


def test_a_mesh_under_the_parameters_splits_the_batch(tmp_path):
  mesh = jax.make_mesh((4, 2, 1), ('data', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3)
  meta = encode.encode_dataset(Numbered(11), run(2.0, NamedSharding(mesh, PartitionSpec())), tmp_path, 8, 3)
  assert meta['count'] == 11 and encoded(tmp_path) == expected(range(11), 2)


def test_parts_of_processes_may_lie_anywhere_in_the_batch(tmp_path, monkeypatch):
  mesh = jax.make_mesh((4, 2, 1), ('data', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3)
  elsewhere = np.array([6, 0, 3, 7, 1, 5, 2, 4])
  monkeypatch.setattr(encode.sharding, 'put_batch', lambda batch, mesh: {k: v[elsewhere] for k, v in batch.items()})
  encode.encode_dataset(Numbered(11), run(2.0, NamedSharding(mesh, PartitionSpec())), tmp_path, 8, 8)
  assert encoded(tmp_path) == expected(range(11), 2)


def test_fingerprints_see_every_value_and_no_sharding():
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  tree = {'a': {'kernel': jnp.arange(64.0).reshape(8, 8)}, 'b': jnp.ones(3, jnp.bfloat16)}
  base = encode.fingerprint(tree)
  split = jax.device_put(tree['a']['kernel'], NamedSharding(mesh, PartitionSpec('data')))
  assert encode.fingerprint({'a': {'kernel': split}, 'b': tree['b']}) == base
  swapped = tree['a']['kernel'].at[0, 0].set(1.0).at[0, 1].set(0.0)
  renamed = {'c': tree['a'], 'b': tree['b']}
  others = [{'a': {'kernel': swapped}, 'b': tree['b']}, renamed, {'a': tree['a'], 'b': tree['b'] * 2}]
  assert len({base, *map(encode.fingerprint, others)}) == 4


def test_nothing_usable_is_one_line(tmp_path):
  with pytest.raises(ValueError, match='none of 3 records is usable'):
    encode.encode_dataset(Numbered(3, broken=range(3)), run(), tmp_path, 8, 4)
  with pytest.raises(ValueError, match=r'encode.batch_size is 0; expected 1 or more'):
    encode.encode_dataset(Numbered(3), run(), tmp_path, 8, 0)
