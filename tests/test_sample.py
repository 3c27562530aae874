"""What the sampling script reads and writes, without a model."""

import json
import os
import threading
import types

import numpy as np
import pytest

import sample
from tests import runs


@pytest.fixture(autouse=True)
def no_flags():
  for name in sample.FLAGS:
    sample.FLAGS[name].unparse()
  sample.FLAGS(['sample.py'])


def test_a_byte_order_mark_is_not_part_of_a_caption(tmp_path):
  (tmp_path / 'captions.txt').write_bytes(b'\xef\xbb\xbfa red circle\n\ntwo hearts\n')
  (tmp_path / 'story.json').write_bytes(b'\xef\xbb\xbf{"captions": ["pip moves"], "source": "first.png"}')
  sample.FLAGS.prompts = str(tmp_path / 'captions.txt')
  assert sample.prompts() == ['a red circle', 'two hearts']
  sample.FLAGS.prompts, sample.FLAGS.story = '', str(tmp_path / 'story.json')
  assert sample.story() == ['pip moves']


def test_only_ends_of_lines_end_a_caption(tmp_path):
  (tmp_path / 'captions.txt').write_bytes('\ta fox\u2028in\x85the\x0csnow\r\n\r\n狐狸 "在"\rדג\n🦊'.encode())
  sample.FLAGS.prompts = str(tmp_path / 'captions.txt')
  assert sample.prompts() == ['a fox\u2028in\x85the\x0csnow', '狐狸 "在"', 'דג', '🦊']


def test_captions_from_a_pipe(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  writer = threading.Thread(target=lambda: (tmp_path / 'pipe').write_text('a red circle\ntwo hearts\n'))
  writer.start()
  sample.FLAGS.prompts = str(tmp_path / 'pipe')
  assert sample.prompts() == ['a red circle', 'two hearts']
  writer.join()


def test_a_smaller_set_leaves_nothing_of_a_larger_one_but_what_it_was_given(tmp_path):
  image = np.zeros((2, 8, 8, 3), np.uint8)
  rows = lambda count: [(f'caption {i}', image, np.arange(2), None) for i in range(count)]
  files = lambda: {p.name for p in tmp_path.iterdir()} - {'grid.png', 'samples.json'}
  sample.FLAGS.n = 2
  sample.write(tmp_path, rows(3), None, {})
  (tmp_path / '007_0.png').write_bytes(b'of somebody else')
  sample.FLAGS.best, sample.FLAGS.vary = 1, str(tmp_path / '002_1.png')
  sample.write(tmp_path, rows(1), None, {})
  assert files() == {'000_0.png', '002_1.png', '007_0.png'}
  listed = {'samples': [{'files': ['../captions.txt', '007_0.png', 3]}]}
  (tmp_path / 'samples.json').write_text(json.dumps(listed))
  (tmp_path.parent / 'captions.txt').write_text('a red circle')
  sample.write(tmp_path, rows(1), None, {})
  assert files() == {'000_0.png', '002_1.png'} and (tmp_path.parent / 'captions.txt').exists()
  (tmp_path / 'samples.json').write_text('[]')
  sample.write(tmp_path, rows(1), None, {})


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('latin1.txt', r'latin1.txt is not UTF-8 \(.utf-8.*; save it as UTF-8'),
    ('none.txt', 'there is no file.*expected a text file in UTF-8'),
    ('', 'there is no file.*expected a text file in UTF-8'),
  ],
)
def test_a_file_of_captions_that_cannot_be_read(tmp_path, name, message):
  (tmp_path / 'latin1.txt').write_bytes('caf\xe9'.encode('latin1'))
  sample.FLAGS.prompts = str(tmp_path / name)
  with pytest.raises((ValueError, OSError), match=message):
    sample.prompts()


def test_the_output_directory_is_made_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
  (tmp_path / 'file').touch()
  monkeypatch.setattr(sample.options, 'load', lambda *_: pytest.fail('loaded'))
  for out in (tmp_path / 'file', tmp_path / 'file' / 'x', '/proc/x'):
    assert runs.call(sample, '--run', 'RUN', '--prompt', 'a red circle', '--out', out) == 2
    err = capsys.readouterr().err
    assert f'--out {out} cannot be written to' in err and err.count('\n') == 1, err


def test_a_home_directory_is_that_of_the_user(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  monkeypatch.chdir(tmp_path)
  assert runs.call(sample, '--run', 'none', '--prompt', 'a red circle', '--out=~/samples') == 2
  assert (tmp_path / 'home' / 'samples').is_dir() and not (tmp_path / '~').exists()


def test_the_table_has_whatever_determines_the_images(tmp_path):
  model = types.SimpleNamespace(OBJECTIVE='dalle', step=7)

  def settings(*arguments):
    sample.FLAGS(['sample.py', *arguments])
    sampling = sample.options.sampling_arguments(sample.FLAGS, model)
    sample.write(tmp_path, [('snow', np.zeros((4, 8, 8, 3), np.uint8), np.arange(4), None)], None, sampling)
    return json.loads((tmp_path / 'samples.json').read_text())

  usual = settings('--run=RUN')
  assert (usual['run'], usual['step'], usual['int8'], usual['guidance']) == ('RUN', 7, False, 1.0)
  assert not {'init_image', 'source', 'vary'} & set(usual)
  given = dict(int8=True, init_image='a.png', keep_rows=2, source='b.png', vectors='c.npy', vary='d.png')
  assert settings('--run=RUN', *(f'--{name}={value}' for name, value in given.items())) == usual | given


def test_the_grid_shows_the_first_rows_and_comes_after_the_table(tmp_path, monkeypatch):
  monkeypatch.setattr(sample, 'SHOWN', 2)
  image, shown = np.zeros((1, 8, 8, 3), np.uint8), []
  rows = [(f'caption {i}', image, np.arange(1), None) for i in range(3)]

  def grid(rows):
    assert len(json.loads((tmp_path / 'samples.json').read_text())['samples']) == 3
    shown.extend(caption for caption, _ in rows)
    raise MemoryError

  monkeypatch.setattr(sample, 'caption_grid', grid)
  sample.FLAGS.n = 1
  with pytest.raises(MemoryError):
    sample.write(tmp_path, rows, None, {})
  assert shown == ['caption 0', 'caption 1'] and (tmp_path / '002_0.png').exists()


def test_a_file_that_was_given_is_never_replaced(tmp_path, monkeypatch, capsys):
  (out := tmp_path / 'out').mkdir()
  of = {name: out / name for name in ('000_0.png', '001_1.png', 'grid.png', 'storyboard.png', 'samples.json')}
  for path in (*of.values(), photo := tmp_path / 'photo.png', story := tmp_path / 'story.json'):
    path.write_text('["pip moves"]')
  (link := tmp_path / 'link.png').symlink_to(of['000_0.png'])
  (out / '000_1.png').symlink_to(photo)

  def load(*_):
    raise ValueError('loaded')

  monkeypatch.setattr(sample.options, 'load', load)
  draw = lambda *flags: runs.call(sample, '--run', 'RUN', '--n', 2, '--out', out, *flags)
  prompt = ['--prompt', 'snow']
  for *flags, name, path in (
    ['--vary', of['000_0.png']],
    ['--vary', link],
    ['--vary', photo],
    [*prompt, *prompt, '--init_image', of['001_1.png']],
    [*prompt, '--init_image', of['grid.png']],
    ['--prompts', of['samples.json']],
    ['--story', story, '--source', of['001_1.png']],
    ['--story', story, '--source', of['storyboard.png']],
  ):
    assert draw(*flags, name, path) == 2
    err = capsys.readouterr().err
    assert err == f'error: --out {out} would overwrite {name} {path}; give another directory with --out.\n'
  for flags in (
    ['--vary', of['001_1.png']],
    ['--vary', photo, '--best', 1],
    [*prompt, '--init_image', of['storyboard.png']],
    ['--story', story, '--source', of['000_0.png']],
  ):
    assert draw(*flags) == 2 and 'error: loaded' in capsys.readouterr().err
