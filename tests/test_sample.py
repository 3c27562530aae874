"""What the sampling script reads and writes, without a model."""

import json

import numpy as np
import pytest

import sample


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
