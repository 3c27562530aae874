"""Tars give what was packed into them, in one order for all readers, and say in a line what they cannot use."""

import gzip
import io
import itertools
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from dalle_jax.data import ops, pipeline, sources
from dalle_jax.data.sources import folder, tars
from tests.data.fakes import data_config, encode_text


def picture(value, kind='png'):
  file = io.BytesIO()
  Image.new('RGB', (12, 10), (value, 0, 0)).save(file, kind)
  return file.getvalue()


def write(path, members, form=tarfile.GNU_FORMAT):
  with tarfile.open(path, 'w', format=form) as tar:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))


def numbered(numbers):
  return [m for i in numbers for m in ((f'{i:04d}.png', picture(i)), (f'{i:04d}.txt', b'number %d' % i))]


def number(record):
  return int(record['caption'].split()[-1])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  return tmp_path / 'cache' / 'dalle_jax'


@pytest.fixture
def shards(tmp_path):
  """Four tars of ten pictures each, and the pattern of their names."""
  for k in range(4):
    write(tmp_path / f'shard-{k:03d}.tar', numbered(range(10 * k, 10 * k + 10)))
  return f'{tmp_path}/shard-{{000..003}}.tar'


def whole(path, **fractions):
  return tars.load('train', path=str(path), **({'val_fraction': 0.0} | fractions))


# --- Members


@pytest.mark.parametrize('form', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_that_share_a_key_are_a_sample(tmp_path, form):
  long = f'{"d" * 90}/{"e" * 60}'
  told = {'caption': 'in\nJSON ', 'url': 'x'}
  members = [
    ('./b.JPG', picture(40, 'jpeg')), ('./b.txt', '\ufeff one \n\nzwölf\r\n'.encode()), ('b.cls', b'7'),
    ('deep/b.webp', picture(80, 'webp')), ('deep/b.json', json.dumps(told).encode()),
    (f'{long}.png', picture(9)), (f'{long}.json', json.dumps({'caption': ['x', ' y ']}).encode()),
    ('both.json', b'{"caption": "no"}'), ('both.txt', b'yes'), ('both.jpeg', picture(120, 'jpeg')),
    ('silent.png', picture(5)), ('null.png', picture(6)), ('null.json', b'{"caption": null}'),
  ]  # fmt: skip
  write(tmp_path / 'a.tar', members, form)
  source = whole(tmp_path / 'a.tar')
  names = ['b.JPG', 'deep/b.webp', f'{long}.png', 'both.jpeg', 'silent.png', 'null.png']
  assert [source.name(i).removeprefix(f'{tmp_path}/a.tar:').removeprefix('./') for i in range(len(source))] == names
  assert [r['captions'] for r in source] == [['one', 'zwölf'], ['in\nJSON'], ['x', 'y'], ['yes'], [], []]
  assert [source.captions(i) for i in range(6)] == [r['captions'] for r in source]
  assert [r['caption'] for r in source] == ['one', 'in\nJSON', 'x', 'yes', '', '']
  assert source[2]['image'] == picture(9) and abs(int(ops.decode(source[1]['image'])[0, 0, 0]) - 80) < 3
  assert source.report() == ['6 images in 1 tars', '2 of them have no caption']


def test_parts_of_a_sample_may_lie_apart(tmp_path):
  pictures, texts = numbered(range(5))[::2], numbered(range(5))[1::2]
  write(tmp_path / 'a.tar', [*pictures, ('filler.bin', bytes(3 * tars.NEAR)), *texts])
  assert [number(r) for r in whole(tmp_path / 'a.tar')] == list(range(5))
  assert whole(tmp_path / 'a.tar')[3]['image'] == picture(3)


def test_captions_in_json_are_strings_and_numbers(tmp_path):
  nan = float('nan')
  values = ['x', 5, ['a', nan, None, 'b'], None, [], ['a', 1.5], {'a': 1}, [['n']], ['a', True], False, nan, ' ']
  parts = [((f'{i}.png', b''), (f'{i}.json', json.dumps({'caption': v}).encode())) for i, v in enumerate(values)]
  write(tmp_path / 'a.tar', itertools.chain.from_iterable(parts))
  source = whole(tmp_path / 'a.tar')
  assert [source.captions(i) for i in range(6)] == [['x'], ['5'], ['a', 'b'], [], [], ['a', '1.5']]
  assert [source[i]['captions'] for i in (10, 11)] == [[], []]
  assert source.report()[1:] == ['4 of them have no caption']
  for i, given in zip(range(6, 10), (r"{'a': 1}", r"\[\['n'\]\]", r"\['a', True\]", 'False'), strict=True):
    with pytest.raises(ValueError, match=rf'the "caption" in its NAME.json is {given}; expected a string, a number or'):
      source.captions(i)


def test_json_nested_too_deeply_is_a_broken_caption(tmp_path):
  write(tmp_path / 'a.tar', [('a.png', picture(1)), ('a.json', b'[' * 100_000)])
  record = whole(tmp_path / 'a.tar')[0]
  assert record['image'] == picture(1) and 'is not a JSON object' in record['caption_error']


def test_links_and_sparse_files_are_counted(tmp_path):
  write(tmp_path / 'a.tar', numbered([1]))
  kinds = {'b.png': tarfile.LNKTYPE, 'b.txt': tarfile.SYMTYPE, 'c.bin': tarfile.SYMTYPE, 'd.png': tarfile.DIRTYPE}
  with tarfile.open(tmp_path / 'a.tar', 'a') as tar:
    for name, kind in kinds.items():
      info = tarfile.TarInfo(name)
      info.type, info.linkname = kind, '0001.png'
      tar.addfile(info)
    info = tarfile.TarInfo('sparse.png')
    info.pax_headers, info.size = {'GNU.sparse.map': '0,512', 'GNU.sparse.size': '1000000'}, 512
    tar.addfile(info, io.BytesIO(bytes(512)))
    tar.addfile(tarfile.TarInfo('e.png'))
  source = whole(tmp_path / 'a.tar')
  assert source.report() == [
    '2 images in 1 tars',
    f'3 members are links or sparse files and are left out; the first is {tmp_path}/a.tar:b.png',
    '1 of them have no caption',
  ]


def test_the_key_ends_at_the_first_dot_as_webdataset_has_it(tmp_path):
  members = [('v1.0.png', picture(1)), ('a.seg.png', picture(2)), ('a.png', picture(3)), ('a.txt', b'number 3')]
  members += [
    ('dir.d/a.png', picture(4)),
    ('.hidden.png', picture(5)),
    ('._a.png', b'x'),
    ('b/.c/a.png', b'x'),
    ('noext', b'x'),
  ]
  members += [('a.jpg', picture(6, 'jpeg')), ('alone.txt', b'x')]
  write(tmp_path / 'a.tar', members)
  source = whole(tmp_path / 'a.tar')
  assert [source.name(i) for i in range(len(source))] == [f'{tmp_path}/a.tar:{n}' for n in ('a.png', 'dir.d/a.png')]
  assert source.report()[1:] == [
    f'2 images are left out, as the name of a sample ends at its first dot; the first is {tmp_path}/a.tar:v1.0.png',
    '1 members are not the first of their kind in a sample and are left out; the first is '
    f'{tmp_path}/a.tar:a.jpg',
    f'1 samples have no image and are left out; the first is {tmp_path}/a.tar:alone.txt',
    '1 of them have no caption',
  ]  # fmt: skip


# --- Order


def batches(source, count=9, **kwargs):
  settings = dict(encode_text=encode_text, batch_size=8, seed=3, shuffle=True) | kwargs
  config = data_config(workers=settings.pop('workers', 0), augment='random_crop,flip')
  stream = pipeline.make_loader(source, config, **settings)
  found = list(itertools.islice(stream, count))
  stream.close()
  return found


def same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    assert x.keys() == y.keys() and all((x[k] == y[k]).all() for k in x)


def test_the_order_is_that_of_the_pattern_and_workers_and_resumed_steps_change_nothing(shards):
  source = whole(shards)
  assert [number(r) for r in source] == list(range(40))
  straight = batches(source)
  shown = np.concatenate([b['text'][:, 0] for b in straight])
  assert sorted(shown[:40]) == list(range(40)) != list(shown[:40])
  assert all((b['image'][:, 0, 0, 0] == b['text'][:, 0]).all() for b in straight)
  same(straight, batches(source, workers=2))
  same(straight[4:], batches(whole(shards), 5, start_step=4))
  parts = [batches(source, part=p, parts=2) for p in range(2)]
  same(straight, [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts, strict=True)])


def test_a_source_travels_to_workers_as_a_few_bytes_a_sample(shards):
  source = whole(shards)
  source[0]
  again = pickle.loads(pickle.dumps(source))
  assert [r['caption'] for r in again] == [r['caption'] for r in source]
  assert source.rows.nbytes == 29 * len(source)


def test_more_tars_than_may_be_open(shards, monkeypatch):
  monkeypatch.setattr(tars, 'OPEN', 2)
  source = whole(shards)
  opened = len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else None
  assert [number(source[i]) for i in (0, 10, 20, 30, 0, -1, 11)] == [0, 10, 20, 30, 0, 39, 11]
  assert opened is None or len(os.listdir('/proc/self/fd')) <= opened + 2


# --- Splits


def test_splits_are_those_of_a_folder_of_the_same_names_however_the_tars_are_cut(shards, tmp_path):
  (tmp_path / 'folder').mkdir()
  for name, data in numbered(range(40)):
    (tmp_path / 'folder' / name).write_bytes(data)
  write(tmp_path / 'one.tar', numbered(range(39, -1, -1)))
  fractions = dict(val_fraction=0.2, test_fraction=0.2)
  for split in sources.SPLITS:
    expected = [number(r) for r in folder.load(split, path=str(tmp_path / 'folder'), **fractions)]
    assert [number(r) for r in tars.load(split, path=shards, **fractions)] == expected
    assert [number(r) for r in tars.load(split, path=str(tmp_path / 'one.tar'), **fractions)] == expected[::-1]
  with pytest.raises(ValueError, match="has the split 'dev'"):
    tars.load('dev', path=shards)


# --- Paths


def test_patterns_folders_and_single_tars(shards, tmp_path):
  root = tmp_path / 'more' / 'deep'
  root.mkdir(parents=True)
  write(root / 'x.tar', numbered([7]))
  (root / '._x.tar').write_bytes(b'not a tar, but what macOS leaves beside one')
  for path, first, count in (
    (shards, 0, 40), (f'{tmp_path}/shard-00*.tar', 0, 40), (f'{tmp_path}/shard-*', 0, 40), (tmp_path / 'more', 7, 1),
    (f'{tmp_path}/shard-{{001..002}}.tar', 10, 20), (f'{tmp_path}/shard-0{{0..0}}{{2..3}}.tar', 20, 20),
    (tmp_path / 'shard-003.tar', 30, 10), (f'{tmp_path}/**/x.tar', 7, 1),
  ):  # fmt: skip
    source = whole(path)
    assert (number(source[0]), len(source)) == (first, count), path
  config = data_config(source='tars', path=shards, source_args=dict(val_fraction=0.1))
  assert len(sources.load(config, 'train')) + len(sources.load(config, 'val')) == 40


def test_tars_that_are_not_there(tmp_path, shards):
  for path, message in (
    (f'{tmp_path}/shard-{{002..009}}.tar', '6 of 8 tars are missing, the first is .*/shard-004.tar; expected tars of'),
    (f'{tmp_path}/x.tar', '1 of 1 tars are missing'),
    (f'{tmp_path}/s*-{{002..005}}.tar', '2 of 4 tars are missing, the first is .*/s.-004.tar; expected tars of'),
    (f'{tmp_path}/y-*.tar', r'has no tars; expected .*shard-\{000..099\}.tar'),
  ):
    with pytest.raises(FileNotFoundError, match=message) as e:
      tars.load('train', path=path)
    assert '\n' not in str(e.value)


# --- Damage


@pytest.mark.parametrize('cut', ['data', 'header', 'end', 'noise'])
def test_a_tar_that_is_cut_off_serves_what_is_whole(shards, tmp_path, cut):
  path = tmp_path / 'shard-002.tar'
  data = bytearray(path.read_bytes())
  with tarfile.open(path) as tar:
    last = tar.getmember('0027.txt')
    pictures = tar.getmember('0027.png')
  end = last.offset_data + tarfile.BLOCKSIZE
  at = {'data': pictures.offset_data + 9, 'header': pictures.offset + 100, 'end': end, 'noise': pictures.offset}[cut]
  data[at:] = b'noise' * 1000 if cut == 'noise' else b''
  path.write_bytes(data)
  source = whole(shards)
  left = [i for i in range(40) if not (27 if cut != 'end' else 28) <= i < 30]
  assert [number(r) for r in source] == left
  (line,) = source.report()[1:]
  assert line.startswith(f'1 tars are cut off or damaged, and used only up to there; the first is {path} at')


@pytest.mark.parametrize('after, whole_tar', [(bytes(10_240), True), (bytes(2**21), False), ('tar', False)])
def test_a_tar_that_goes_on_after_its_end_is_reported(shards, tmp_path, after, whole_tar):
  path = tmp_path / 'shard-002.tar'
  data = path.read_bytes()
  path.write_bytes(data + (data if after == 'tar' else after))
  source = whole(shards)
  assert len(source) == 40 and any('are cut off or damaged' in line for line in source.report()) != whole_tar


def test_what_is_compressed_or_no_tar_or_has_no_picture(tmp_path):
  write(tmp_path / 'plain.tar', numbered([1]))
  (tmp_path / 'packed.tar').write_bytes(gzip.compress((tmp_path / 'plain.tar').read_bytes()))
  with pytest.raises(ValueError, match=r'packed.tar is compressed \(gzip\); unpack it'):
    whole(tmp_path)
  (tmp_path / 'packed.tar').rename(tmp_path / 'packed.tar.gz')
  with pytest.raises(ValueError, match=r'packed.tar.gz is compressed'):
    whole(tmp_path)
  (tmp_path / 'packed.tar.gz').unlink()
  for content in (b'', b'no tar at all' * 100):
    (tmp_path / 'text.tar').write_bytes(content)
    with pytest.raises(ValueError, match=r'text.tar is not a tar \(.*\); expected tars of NAME.jpg') as e:
      whole(tmp_path)
    assert '\n' not in str(e.value)
  write(tmp_path / 'text.tar', [('a.txt', b'x')])
  with pytest.raises(ValueError, match=r'has no images; expected tars of .*1 samples have no image'):
    whole(tmp_path / 'text.tar')
  source = whole(tmp_path)
  assert len(source) == 1 and f'1 tars have no images; the first is {tmp_path}/text.tar' in source.report()


def test_broken_samples_are_skipped_by_their_name(tmp_path, caplog):
  members = dict(numbered(range(6))) | {'0002.png': b'torn', '0004.txt': b'\xff\xfe\xfa'}
  del members['0003.txt'], members['0001.txt']
  write(tmp_path / 'a.tar', [*members.items(), ('0001.json', b'["no object"]')])
  stream = pipeline.make_loader(
    whole(tmp_path / 'a.tar'), data_config(), encode_text=encode_text, batch_size=6, seed=0, shuffle=False
  )
  (batch,) = list(stream)
  assert list(batch['text'][:, 0]) == [0, 5, 5, 5, 5, 5]
  assert sorted(stream.skipped) == [f'{tmp_path}/a.tar:{i:04d}.png' for i in (1, 2, 3, 4)]
  lines = ' '.join(r.getMessage() for r in caplog.records)
  images = pipeline.make_loader(
    whole(tmp_path / 'a.tar'), data_config(), encode_text=None, batch_size=6, seed=0, shuffle=False
  )
  assert list(next(images)['image'][:, 0, 0, 0]) == [0, 1, 3, 3, 4, 5]  # only the torn image is skipped
  images.close()
  assert '0004.png is skipped' in lines and 'its NAME.txt is not UTF-8' in lines
  assert '0001.png is skipped' in lines and 'its NAME.json is not a JSON object with a "caption"' in lines


# --- Index


@pytest.fixture
def scans(monkeypatch):
  """The tars that were read through."""
  read, scan = [], tars.scan
  monkeypatch.setattr(tars, 'scan', lambda path: (read.append(os.path.basename(path)), scan(path))[1])
  return read


def forget():
  tars._index.cache_clear()  # as a new process would


def test_an_index_is_kept_and_made_anew_when_its_tar_changes(shards, tmp_path, scans):
  assert len(whole(shards)) == 40 and sorted(scans) == [f'shard-{k:03d}.tar' for k in range(4)]
  index = tmp_path / 'shard-001.tar.index'
  written = index.read_bytes()
  assert sorted(p.name for p in tmp_path.glob('*.index*')) == [f'shard-{k:03d}.tar.index' for k in range(4)]
  forget()
  source = whole(shards)
  assert source.name(13).endswith('shard-001.tar:0013.png') and len(scans) == 4
  for torn in (b'', written[:-1], written[: len(written) // 2], b'[]\n', b'\xff'):
    index.write_bytes(torn)
    forget()
    assert [number(r) for r in whole(shards)] == list(range(40)) and index.read_bytes() == written
  assert scans[4:] == ['shard-001.tar'] * 5
  write(tmp_path / 'shard-001.tar', numbered(range(10, 15)))
  assert len(whole(shards)) == 35
  os.utime(tmp_path / 'shard-002.tar', ns=(0, 0))
  assert len(whole(shards)) == 35 and scans[9:] == ['shard-001.tar', 'shard-002.tar']


def test_an_index_that_cannot_be_beside_its_tar_is_in_the_cache_or_in_memory(shards, tmp_path, scans, cache):
  for k in range(4):
    (tmp_path / f'shard-{k:03d}.tar.index').mkdir()  # for root, whom no permission stops
  assert len(whole(shards)) == 40 and len(list(cache.glob('*.tar.index'))) == 4
  forget()
  assert len(whole(shards)) == 40 and len(scans) == 4
  for file in cache.iterdir():
    file.unlink()
    file.mkdir()
  forget()
  source = whole(shards)
  assert source.name(39).endswith('0039.png') and number(source[39]) == 39 and len(scans) > 4
  assert not list(tmp_path.rglob('*.tmp'))
