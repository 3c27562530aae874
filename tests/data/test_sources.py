"""Every kind of source gives records, splits that do not overlap, and one clear line when it cannot."""

import hashlib
import json
import os
import pickle
import sys
import tarfile
import types

import numpy as np
import pytest
from PIL import Image

from dalle_jax.data import ops, pipeline, sources
from dalle_jax.data.sources import emoji, folder, tfds, tokens
from tests.data.fakes import data_config


def picture(path, value=0, size=(12, 10)):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new('RGB', size, (value, 0, 0)).save(path)


@pytest.fixture
def pictures(tmp_path):
  for i in range(12):
    picture(tmp_path / f'p{i:02d}.png', i)
    (tmp_path / f'p{i:02d}.txt').write_text(f'number {i}\n')
  return tmp_path


# --- By name


def test_sources_are_found_by_the_name_of_their_file(pictures):
  source = sources.load(data_config(source='shapes', source_args=dict(image_size=24, count=5)), 'val')
  assert len(source) == 5 and source[0]['image'].shape == (24, 24, 3)
  assert len(sources.load(data_config(source='folder', path=str(pictures)), 'train')) == 11


@pytest.mark.parametrize(
  'config, message',
  [
    (dict(source='webcam'), "'webcam' is unknown; there are clevr_sv, didemo, emoji"),
    (dict(source=''), "'' is unknown"),
    (dict(source='shapes', source_args=dict(colour=1)), "'shapes' does not take colour; it takes image_size"),
    (dict(source='shapes', path='x'), 'does not take path'),
    (dict(source='folder'), 'needs path; set config.data.path'),
    (dict(source='tfds'), 'needs name; write config.data.source as tfds:NAME'),
  ],
)
def test_a_wrong_source_is_one_line(config, message):
  with pytest.raises(ValueError, match=message) as e:
    sources.load(data_config(**config), 'train')
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('kind', ['shapes', 'story_shapes', 'pororo', 'flintstones'])
@pytest.mark.parametrize('argument, value', [('seed', -1), ('seed', 0.5), ('count', -1), ('image_size', 48.5)])
def test_arguments_that_are_not_whole_numbers_are_one_line(kind, argument, value, tmp_path):
  if not sources.takes(kind, argument):
    return
  path = str(tmp_path) if sources.takes(kind, 'path') else ''
  with pytest.raises(ValueError, match=f'^source_args.{argument} is {value}; expected a whole number, 0 or more.$'):
    sources.load(data_config(source=kind, path=path, source_args={argument: value}), 'train')


# --- Splits


def test_splits_depend_on_each_name_alone():
  names = [f'picture {i}' for i in range(2000)]
  parts = {s: sources.divide(names, s, 0.1, 0.2) for s in sources.SPLITS}
  assert sorted(i for p in parts.values() for i in p) == list(range(2000))
  assert [round(len(parts[s]) / 2000, 1) for s in sources.SPLITS] == [0.7, 0.1, 0.2]
  some = names[::3]
  again = {some[i] for i in sources.divide(some, 'val', 0.1, 0.2)}
  assert again == {names[i] for i in parts['val']} & set(some)
  digest = hashlib.sha256(repr(parts['val']).encode()).hexdigest()
  assert digest.startswith('6e9c21bf44a579ad'), 'the split of existing data sets has changed'


def test_a_few_pictures_still_fill_every_split_that_has_a_fraction():
  for count in (3, 4, 10):
    parts = {s: sources.divide([str(i) for i in range(count)], s, 0.01, 0.01) for s in sources.SPLITS}
    assert all(parts.values())
    assert sorted(i for p in parts.values() for i in p) == list(range(count))
  for name in 'abcdef':  # whichever of the two has the lower hash
    parts = [sources.divide([name, name, 'zz'], s, 0.01, 0.0) for s in ('train', 'val')]
    assert sorted(parts) in ([[0, 1], [2]], [[0, 1], [2]])
  with pytest.raises(ValueError, match="split 'val' of 2 images is empty"):
    sources.divide(['one', 'one'], 'val', 0.05, 0.0)
  with pytest.raises(ValueError, match=r"split 'val' of 1 images is empty.*val_split=\"\""):
    sources.divide(['one'], 'val', 0.05, 0.0)
  with pytest.raises(ValueError, match="split 'test' of 9 images is empty"):
    sources.divide([str(i) for i in range(9)], 'test', 0.05, 0.0)
  with pytest.raises(ValueError, match='must leave some for train'):
    sources.divide(['a', 'b'], 'train', 0.5, 0.5)
  with pytest.raises(ValueError, match="has the split 'dev'"):
    sources.divide(['a', 'b'], 'dev', 0.1, 0.1)


# --- Folder


def test_folder_reads_pictures_captions_and_sub_folders(tmp_path):
  for i, name in enumerate(('b.JPG', 'a.jpeg', 'deep/er/c.png', 'd.webp')):
    picture(tmp_path / name, 40 * i)
    (tmp_path / name).with_suffix('.txt').write_text(f'\ufeff caption {i} \n\nsecond\r\n', encoding='utf-8')
  picture(tmp_path / 'silent.png')
  for other in ('._a.jpg', 'notes.md', 'alone.txt'):
    (tmp_path / other).write_text('x')
  picture(tmp_path / 'deep' / '.ipynb_checkpoints' / 'c-checkpoint.png')
  source = folder.load('train', path=str(tmp_path), val_fraction=0.0)
  assert [source.name(i).removeprefix(f'{tmp_path}/') for i in range(len(source))] == [
    'a.jpeg', 'b.JPG', 'd.webp', 'deep/er/c.png', 'silent.png',
  ]  # fmt: skip
  assert source[1]['captions'] == ['caption 0', 'second'] and source[1]['caption'] == 'caption 0'
  assert abs(int(ops.decode(source[3]['image'])[0, 0, 0]) - 80) < 3
  assert source[4]['caption'] == '' and source[4]['captions'] == []


def test_only_ends_of_lines_end_a_caption():
  text = '\ta fox\u2028in\x85the\x0csnow\r\n\r\na fish\ra bird\n'.encode()
  assert sources.caption_lines(text, 'NAME.txt') == ['a fox\u2028in\x85the\x0csnow', 'a fish', 'a bird']


def test_folder_follows_links_but_reads_every_folder_once(tmp_path):
  root, other = tmp_path / 'root', tmp_path / 'other'
  for path in (root / 'z' / 'a.png', other / 'b.png', other / 'deep' / 'c.png'):
    picture(path)
  for link, target in (
    (root / 'a', root / 'z'), (root / 'z' / 'up', root), (root / 'm', other), (root / 'n', other / 'deep'),
    (root / '.hidden', other), (other / 'back', root), (root / 'gone', tmp_path / 'missing'),
  ):  # fmt: skip
    link.symlink_to(target)
  source = folder.load('all', path=str(root))
  assert source.images == ('m/b.png', 'm/deep/c.png', 'z/a.png') and source.report() == []
  assert ops.decode(source[1]['image']).shape == (10, 12, 3)


@pytest.mark.parametrize('kind', ['folder', 'tars'])
def test_folders_that_cannot_be_read_are_counted(tmp_path, monkeypatch, kind):
  for i in range(3):
    picture(tmp_path / f'd{i}' / 'a.png')
    with tarfile.open(tmp_path / f'd{i}' / 'a.tar', 'w') as tar:
      tar.add(tmp_path / f'd{i}' / 'a.png', 'a.png')
  scandir = os.scandir

  def refuse(path):  # as permissions would, which do not stop root
    if os.path.basename(path) in refused:
      raise PermissionError(13, 'Permission denied', path)
    return scandir(path)

  monkeypatch.setattr(os, 'scandir', refuse)
  config = data_config(source=kind, path=str(tmp_path))
  refused = {'d1', 'd2'}
  source = sources.load(config, 'all')
  line = f'2 folders cannot be read and are left out; the first is {tmp_path}/d1 (Permission denied)'
  assert len(source) == 1 and source.report()[-1 if kind == 'folder' else 1] == line
  refused = {'d0', 'd1', 'd2'}
  with pytest.raises((ValueError, FileNotFoundError), match='3 folders cannot be read'):
    sources.load(config, 'all')


def test_folder_finds_captions_of_cameras(tmp_path):
  picture(tmp_path / 'IMG_0.JPG')
  (tmp_path / 'IMG_0.TXT').write_text('a caption')
  assert folder.load('all', path=str(tmp_path))[0]['captions'] == ['a caption']


def test_folder_through_the_loader_replaces_what_is_broken(pictures, caplog):
  (pictures / 'p03.png').write_bytes(b'torn')
  (pictures / 'p05.txt').unlink()
  (pictures / 'p07.txt').write_bytes(b'\xff\xfe\xfa')  # not UTF-8
  source = folder.load('train', path=str(pictures), val_fraction=0.0)
  stream = pipeline.make_loader(
    source, data_config(), encode_text=lambda c, s: np.int32([len(c)]), batch_size=12, seed=0, shuffle=False
  )
  (batch,) = list(stream)
  assert list(batch['image'][:, 0, 0, 0]) == [0, 1, 2, 4, 4, 6, 6, 8, 8, 9, 10, 11]
  assert stream.skipped == {str(pictures / f'p{i:02d}.png'): 1 for i in (3, 5, 7)}
  assert sum('is skipped' in r.getMessage() for r in caplog.records) == 3
  line = (
    f"p07.png is skipped and replaced by the next usable record: ValueError: {pictures}/p07.txt is not UTF-8 ('utf-8'"
  )
  (message,) = [r.getMessage() for r in caplog.records if line in r.getMessage()]
  assert message.endswith('; save it as UTF-8')
  stream = pipeline.make_loader(source, data_config(), encode_text=None, batch_size=12, seed=0, shuffle=False)
  (batch,) = list(stream)  # a VQGAN needs no captions
  assert list(batch['image'][:, 0, 0, 0]) == [0, 1, 2, 4, 4, 5, 6, 7, 8, 9, 10, 11]


def test_folder_splits_keep_pictures_of_one_name_together(tmp_path):
  for i in range(40):
    picture(tmp_path / f'{i}.png')
    picture(tmp_path / f'{i}.jpg')
  parts = [folder.load(s, path=str(tmp_path), val_fraction=0.2, test_fraction=0.2).images for s in sources.SPLITS]
  stems = [{p.split('.')[0] for p in part} for part in parts]
  assert sum(map(len, stems)) == 40 and sum(map(len, parts)) == 80


def test_folder_errors_say_what_is_expected(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'is not a folder; expected a folder of NAME\.jpg\|\.jpeg'):
    folder.load('train', path=str(tmp_path / 'missing'))
  (tmp_path / 'a.txt').write_text('a caption')
  with pytest.raises(ValueError, match='has no images; expected'):
    folder.load('train', path=str(tmp_path))


# --- Emoji


def font_or_skip():
  try:
    return emoji.find_font()
  except FileNotFoundError:
    pytest.skip('no colour-emoji font here')


def test_emoji_without_a_font_names_the_package(monkeypatch, tmp_path):
  monkeypatch.setattr(emoji, 'FOLDERS', (str(tmp_path), str(tmp_path / 'missing')))
  with pytest.raises(FileNotFoundError, match='apt-get install fonts-noto-color-emoji'):
    emoji.load('train')
  with pytest.raises(FileNotFoundError, match='no emoji font'):
    emoji.load('train', path=str(tmp_path / 'font.ttf'))
  (tmp_path / 'font.ttf').write_bytes(b'no font')
  with pytest.raises(ValueError, match='cannot be opened as a font'):
    emoji.load('train', path=str(tmp_path / 'font.ttf'))


def test_emoji_are_drawn_once_each_in_colour_with_their_names():
  path = font_or_skip()
  parts = [emoji.load(s, path=path) for s in sources.SPLITS]
  drawn = [c for p in parts for c in p.characters]
  assert len(drawn) == len(set(drawn)) > 1000
  assert all(len(p) > 20 for p in parts)
  assert not {'\U0001f3fb', '\U0001f1e6', '0', '#', emoji.UNASSIGNED} & set(drawn)
  assert {'😀', '🚀', '🐢'} <= set(drawn)
  looks = {p[i]['image'].tobytes() for p in parts for i in range(0, len(p), 7)}
  assert len(looks) == sum(len(range(0, len(p), 7)) for p in parts)
  source = next(p for p in parts if '🚀' in p.characters)
  record = source[source.characters.index('🚀')]
  image = record['image']
  assert record['caption'] == 'rocket' and source.name(source.characters.index('🚀')) == 'emoji U+1F680'
  assert image.dtype == np.uint8 and image.shape[0] == image.shape[1] > 32
  assert (image[0] == 255).all() and (image.max(-1).astype(int) - image.min(-1)).max() > 100  # colour on white


# --- TFDS


class Label:
  def int2str(self, value):
    return ('red_fox', 'whale')[value]


def fake_tfds(monkeypatch, features, records):
  class Builder:
    info = types.SimpleNamespace(features=features)

    def download_and_prepare(self):
      pass

    def as_data_source(self, split, decoders):
      assert decoders == {'image': 'bytes'}
      if split not in records:
        raise KeyError(f'Unknown split {split!r}.\nShould be one of {list(records)}.')
      return records[split]

  module = types.ModuleType('tensorflow_datasets')
  module.builder = lambda name, data_dir, file_format: Builder()
  module.decode = types.SimpleNamespace(SkipDecoding=lambda: 'bytes')
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', module)


def test_tfds_captions_and_dotted_fields(monkeypatch):
  record = {'image': b'x', 'captions': {'text': [b'one', 'zw\u00f6lf'.encode()]}, 'title': b'a title'}
  features = {'image': 0, 'captions': {'text': 0}, 'title': 0}
  fake_tfds(monkeypatch, features, {'train': [record], 'validation': [record] * 3})
  source = tfds.load('val', name='toy', caption_field='captions.text')
  assert len(source) == 3 and source.name(2) == 'toy validation 2'
  assert source[0] == {'image': b'x', 'caption': 'one', 'captions': ['one', 'zwölf']}
  assert tfds.load('train', name='toy', caption_field='title')[0]['captions'] == ['a title']
  for kwargs, message in (
    (dict(split='test'), "split 'test', cannot be read: .*Unknown split"),
    (dict(split='train', caption_field='text'), "no field 'text'; there are image, captions, title"),
    (dict(split='train', caption_field='captions.txt'), "no field 'captions.txt'; there are text"),
  ):
    with pytest.raises(ValueError, match=message) as e:
      tfds.load(**({'name': 'toy', 'caption_field': 'title'} | kwargs))
    assert '\n' not in str(e.value)


def test_tfds_label_names_are_captions_where_there_are_none(monkeypatch):
  fake_tfds(monkeypatch, {'image': 0, 'label': Label()}, {'train': [{'image': b'x', 'label': np.int64(0)}]})
  assert tfds.load('train', name='toy')[0]['captions'] == ['red fox']
  record = {'image': b'x', 'kind': np.int64(0), 'label': np.int64(-1)}  # without a label, as in most test splits
  fake_tfds(monkeypatch, {'image': 0, 'kind': Label(), 'label': Label()}, {'test': [record]})
  captions = [tfds.load('test', name='toy', **kw)[0]['captions'] for kw in ({}, dict(caption_field='kind'))]
  assert captions == [[], ['red fox']]


def test_captions_that_cannot_be_read_cost_no_picture(monkeypatch, pictures):
  record = {'image': b'x', 'caption': b'caf\xe9'}
  fake_tfds(monkeypatch, {'image': 0, 'caption': 0}, {'train': [record]})
  folder = sources.load(data_config(source='folder', path=str(pictures)), 'train')

  def denied(self, index):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(type(folder), 'captions', denied)
  for source in (tfds.load('train', name='toy'), folder):
    assert source[0]['image'] and source[0]['captions'] == [] and source[0]['caption_error']


def test_tfds_train_and_val_are_two_slices_where_there_is_no_validation(monkeypatch):
  record = {'image': b'x', 'caption': b'a caption'}
  fake_tfds(monkeypatch, {'image': 0, 'caption': 0}, {'train[5%:]': [record] * 19, 'train[:5%]': [record]})
  config = data_config(source='tfds:toy')
  assert [len(sources.load(config, split)) for split in ('train[5%:]', 'train[:5%]')] == [19, 1]
  config.source_args.split_name = 'train[:5%]'  # would have been both
  with pytest.raises(ValueError, match='does not take split_name'):
    sources.load(config, 'train')


def test_tfds_missing_says_how_to_install_it(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  with pytest.raises(ValueError, match=r'pip install -e "\.\[tfds\]"'):
    sources.load(data_config(source='tfds:coco_captions'), 'train')


# --- Tokens


def write_tokens(path, captions, grid=(2, 2), **meta):
  path.mkdir(parents=True)
  codes = np.arange(len(captions) * 4, dtype=np.uint16)
  (path / 'tokens.bin').write_bytes(codes.tobytes())
  (path / 'captions.jsonl').write_text(''.join(json.dumps(c) + '\n' for c in captions))
  (path / 'meta.json').write_text(json.dumps(dict(count=len(captions), grid=grid, dtype='uint16') | meta))


def test_tokens_are_read_back_without_loading_them(tmp_path):
  write_tokens(tmp_path / 'val', [['one'], [], ['two\nlines', 'zwölf']])
  source = sources.load(data_config(source='tokens', path=str(tmp_path)), 'val')
  assert len(source) == 3
  assert source[2]['tokens'].tolist() == [8, 9, 10, 11] and source[2]['tokens'].dtype == np.int32
  assert (
    source[2]['captions'] == ['two\nlines', 'zwölf'] and source[1]['caption'] == '' and source[0]['caption'] == 'one'
  )
  assert [source.captions(i) for i in range(3)] == [['one'], [], ['two\nlines', 'zwölf']]  # all, for the tokenizer
  assert len(pickle.dumps(source)) < 500 and pickle.loads(pickle.dumps(source))[0]['caption'] == 'one'


def test_tokens_that_are_missing_or_damaged(tmp_path):
  with pytest.raises(FileNotFoundError, match='has no encoded data set'):
    tokens.load('train', path=str(tmp_path))
  write_tokens(tmp_path / 'train', [['one'], ['two']], count=3)
  with pytest.raises(ValueError, match='is damaged'):
    tokens.load('train', path=str(tmp_path))
