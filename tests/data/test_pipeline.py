"""Batch k is a function of (seed, k) alone: for any workers, processes and resumed steps; broken records never stop."""

import itertools
import logging
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dalle_jax.data import pipeline, stories
from tests.data.fakes import Numbered, data_config, encode_text


def loader(source, *, batch_size=8, seed=0, shuffle=True, text=encode_text, start_step=0, part=(0, 1), **config):
  return pipeline.make_loader(
    source,
    data_config(**config),
    encode_text=text,
    batch_size=batch_size,
    seed=seed,
    shuffle=shuffle,
    start_step=start_step,
    part=part[0],
    parts=part[1],
  )


def take(stream, count):
  batches = list(itertools.islice(stream, count))
  stream.close()
  return batches


def assert_same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    assert x.keys() == y.keys()
    for key in x:
      np.testing.assert_array_equal(x[key], y[key])


def indices(batches):
  return np.concatenate([b['image'][:, 0, 0, 0] for b in batches])


def test_batches_have_the_documented_shapes_and_types():
  (batch,) = take(loader(Numbered(20), image_size=4), 1)
  assert batch.keys() == {'image', 'text'}
  assert batch['image'].shape == (8, 4, 4, 3) and batch['image'].dtype == np.uint8
  assert batch['text'].shape == (8, 2) and batch['text'].dtype == np.int32
  np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], batch['text'][:, 0])
  (batch,) = take(loader(Numbered(20), text=None), 1)
  assert batch.keys() == {'image'}


def test_every_epoch_shows_every_record_once_in_a_new_order():
  shown = indices(take(loader(Numbered(24)), 6)).reshape(2, 24)
  for epoch in shown:
    assert sorted(epoch) == list(range(24))
    assert list(epoch) != sorted(epoch)
  assert list(shown[0]) != list(shown[1])


def test_an_ordered_pass_says_how_many_rows_of_a_batch_are_no_repeats():
  stream = loader(Numbered(10), batch_size=4, shuffle=False)
  assert [stream.fresh for _ in stream] == [4, 4, 2]
  later = loader(Numbered(10), batch_size=4, shuffle=False, start_step=2, part=(1, 2))
  assert [later.fresh for _ in later] == [2]


def test_groups_stay_together_in_every_order_of_workers_processes_and_resumed_steps():
  settings = dict(group=4, text=noisy)
  whole = take(loader(Numbered(26), **settings), 6)
  groups = indices(whole).reshape(-1, 4)
  assert all(list(g) == list(range(g[0], g[0] + 4)) and g[0] % 4 == 0 for g in groups)
  for epoch in groups.reshape(2, 6, 4):
    assert sorted(epoch[:, 0]) == list(range(0, 24, 4)) != list(epoch[:, 0])
  assert_same(whole, take(loader(Numbered(26), workers=2, **settings), 6))
  assert_same(whole[2:], take(loader(Numbered(26), start_step=2, **settings), 4))
  parts = [take(loader(Numbered(26), part=(p, 2), **settings), 6) for p in range(2)]
  assert_same(whole, [{k: np.concatenate([p[step][k] for p in parts]) for k in whole[0]} for step in range(6)])
  with pytest.raises(ValueError, match=r'data.group 3 does not divide'):
    loader(Numbered(26), group=3)


def test_seeds_differ_and_a_seed_repeats():
  source = Numbered(100)
  first = take(loader(source, seed=1), 3)
  assert_same(first, take(loader(source, seed=1), 3))
  epochs = {s: indices(take(loader(Numbered(16), seed=s), 4)).reshape(2, 16).tolist() for s in (1, 2)}
  assert all(a != b for a in epochs[1] for b in epochs[2])  # seed 2 is not seed 1 an epoch later


def noisy(caption, seed):
  return np.array([int(caption.split()[-1]), seed % 1_000_000], np.int32)


def test_workers_processes_and_resumed_steps_change_nothing():
  source = Numbered(21, broken=[3, 4], silent=[20], size=12)
  settings = dict(text=noisy, augment='random_crop,flip', image_size=8)
  whole = take(loader(source, **settings), 7)
  assert_same(whole, take(loader(source, workers=2, **settings), 7))
  for step in (1, 5):
    assert_same(whole[step:], take(loader(source, start_step=step, **settings), 7 - step))
  asked_to_stop = loader(source, workers=1, start_step=4, **settings)
  first = next(asked_to_stop)
  for worker in multiprocessing.active_children():
    os.kill(worker.pid, signal.SIGTERM)  # as Slurm may send it to all there are
  assert_same(whole[4:7], [first, *take(asked_to_stop, 2)])
  for count in (2, 4):
    parts = [take(loader(source, part=(p, count), **settings), 7) for p in range(count)]
    joined = [{k: np.concatenate([p[step][k] for p in parts]) for k in whole[0]} for step in range(7)]
    assert_same(whole, joined)


SCRIPT = """
import os, sys
from dalle_jax.data import pipeline, stories
from tests.data.fakes import Numbered, data_config, encode_text

if __name__ == '__main__':
  stream = pipeline.make_loader(
    Numbered(20), data_config(workers=1), encode_text=encode_text, batch_size=4, seed=0, shuffle=True
  )
  next(stream)
  print(*[p.pid for p in pipeline.multiprocessing.active_children()], flush=True)
  if sys.argv[1] == 'kill':
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize('how', ['exit', 'kill'])
def test_workers_end_with_a_program_that_never_closed_them(tmp_path, how):
  (tmp_path / 'script.py').write_text(SCRIPT)
  env = os.environ | {'PYTHONPATH': str(pathlib.Path(__file__).parents[2])}
  done = subprocess.run([sys.executable, tmp_path / 'script.py', how], capture_output=True, text=True, env=env)
  worker = int(done.stdout)
  if how == 'exit':
    assert done.returncode == 0 and not done.stderr
  deadline = time.monotonic() + 10
  while running(worker):
    assert time.monotonic() < deadline, 'the worker outlives its program'
    time.sleep(0.05)


def running(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  # A zombie is waiting for whoever inherited it.
  stat = pathlib.Path(f'/proc/{pid}/stat')
  return not (stat.exists() and stat.read_text().rpartition(')')[2].split()[0] == 'Z')


def test_resuming_far_ahead_reads_nothing_in_between():
  class Counting(Numbered):
    read = 0

    def __getitem__(self, index):
      self.read += 1
      return super().__getitem__(index)

  source = Counting(20)
  take(loader(source, start_step=1_000_000_000), 1)
  assert source.read <= 8 * (1 + pipeline.AHEAD)


@pytest.mark.parametrize('count', [8, 11, 3])
def test_an_ordered_pass_shows_everything_and_fills_up_with_the_first(count):
  stream = loader(Numbered(count), shuffle=False, batch_size=4, augment='random_crop,flip')
  batches = list(stream)
  shown = indices(batches)
  assert len(batches) == -(-count // 4)
  assert list(shown) == [i % count for i in range(len(shown))]
  assert not any(b['text'][:, 1].any() for b in batches)  # no seed: no chance
  assert [r.index for r in stream.rows] == list(shown[-4:])
  assert [list(r.captions) for r in stream.rows] == [[f'number {i}'] for i in shown[-4:]]
  parts = [list(loader(Numbered(count), shuffle=False, batch_size=4, part=(p, 2))) for p in range(2)]
  assert_same(batches, [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts, strict=True)])


@pytest.mark.parametrize('workers', [0, 1])
def test_broken_records_are_replaced_counted_and_logged_once(caplog, workers):
  source = Numbered(10, broken=[2, 3], silent=[9])
  with caplog.at_level(logging.WARNING):
    stream = loader(source, batch_size=5, workers=workers)
    shown = indices(list(itertools.islice(stream, 4)))
  assert sorted(shown) == sorted([0, 1, 4, 4, 4, 5, 6, 7, 8, 0] * 2)  # each is replaced by the next usable one
  # 3 stands in for 2 and is broken too, so it is met twice an epoch.
  assert stream.skipped == {'picture-2': 2, 'picture-3': 4, 'picture-9': 2}
  stream.close()
  for name, reason in (('picture-2', 'UnidentifiedImageError'), ('picture-3', 'Unid'), ('picture-9', 'no caption')):
    lines = [r.getMessage() for r in caplog.records if f'{name} ' in r.getMessage()]
    assert len(lines) == 1 and reason in lines[0]


class Clips(Numbered):
  """Stories whose frames are drawn by chance; a broken one fails at the second frame, after drawing all of them."""

  def draw(self, index, rng):
    frames = [np.full((8, 8, 3), int(rng.integers(256)), np.uint8) for _ in range(3)]
    if index in self.broken:
      frames[1] = b'no picture'
    return stories.Story(frames, [f'number {index}'] * 3)


@pytest.mark.parametrize('group', [1, 2])
def test_a_broken_record_changes_nothing_whether_or_not_it_was_met_before(group):
  source, settings = Clips(6, broken=[2]), dict(batch_size=2, text=noisy, augment='random_crop,flip', group=group)
  whole = take(loader(source, **settings), 12)
  assert_same(whole, take(loader(source, **settings), 12))
  for step in (3, 6):
    assert_same(whole[step:], take(loader(source, start_step=step, **settings), 12 - step))
  if group == 1:
    assert_same(whole, take(loader(source, workers=1, **settings), 12))
  rng = lambda: np.random.default_rng(0)
  examples = pipeline.Examples(source, 8, '', None)
  (first, row), (again, _), (alone, _) = (examples(k, rng()) for k in (2, 2, 3))
  assert row.index == 3
  assert_same([first, again], [alone, alone])


def test_captions_matter_only_where_text_is_asked_for():
  stream = loader(Numbered(10, silent=range(10)), text=None)
  take(stream, 3)
  assert not stream.skipped


def test_a_flood_of_broken_records_is_logged_briefly(caplog):
  stream = loader(Numbered(200, broken=range(150)), batch_size=200)
  take(stream, 1)
  assert len(stream.skipped) == 150
  lines = [r.getMessage() for r in caplog.records if 'is skipped' in r.getMessage()]
  assert len(lines) == pipeline.LOGGED + 1 and 'only counted' in lines[-1]


@pytest.mark.parametrize('workers', [0, 1])
def test_nothing_usable_is_one_line(workers):
  with pytest.raises(ValueError, match=r'none of 5 records is usable; picture-\d: .*no caption') as e:
    next(loader(Numbered(5, silent=range(5)), workers=workers))
  assert '\n' not in str(e.value)


def test_one_of_several_captions_is_chosen_by_chance_or_the_first():
  class Several(Numbered):
    def __getitem__(self, index):
      return super().__getitem__(index) | {'captions': ['number 1', ' ', 'number 2']}

  chosen = np.concatenate([b['text'][:, 0] for b in take(loader(Several(10)), 5)])
  assert set(chosen) == {1, 2}
  assert set(np.concatenate([b['text'][:, 0] for b in loader(Several(10), shuffle=False)])) == {1}


def test_tokens_take_the_place_of_the_picture():
  class Encoded(Numbered):
    def __getitem__(self, index):
      return {'tokens': np.full(6, index, np.uint16), 'caption': f'number {index}'}

  (batch,) = take(loader(Encoded(10)), 1)
  assert batch.keys() == {'tokens', 'text'}
  assert batch['tokens'].shape == (8, 6) and batch['tokens'].dtype == np.int32


def test_an_encoded_story_without_captions_is_skipped():
  class Encoded(Numbered):
    def __getitem__(self, index):
      captions = [] if index in self.silent else [''] + [f'number {index}'] * 2
      return {'tokens': np.full((3, 4), index, np.uint16), 'caption': '', 'captions': captions}

  stream = loader(Encoded(4, silent=[1]), shuffle=False, batch_size=4)
  assert next(stream)['text'][:, :, 0].tolist() == [[0, 0], [2, 2], [2, 2], [3, 3]]
  assert stream.skipped == {'picture-1': 1}
  stream.close()


def test_captions_that_are_not_valid_unicode_are_none(caplog):
  class Torn(Numbered):
    def __getitem__(self, index):
      torn = {2: ['number 2 \ud83d'], 3: ['number 3 \ud83d', 'number 33']}
      return super().__getitem__(index) | ({'captions': torn[index]} if index in torn else {})

  stream = loader(Torn(4), shuffle=False, batch_size=4)
  assert next(stream)['text'][:, 0].tolist() == [0, 1, 33, 33]
  assert stream.skipped == {'picture-2': 1}
  stream.close()
  assert r"a caption has a lone surrogate, so it is not valid Unicode: ['number 2 \ud83d']" in caplog.text
  assert take(loader(Torn(4), shuffle=False, batch_size=4, text=None), 1)[0]['image'][2, 0, 0, 0] == 2
  as_in_evaluation = [pipeline.Examples(Torn(4), 8, '', None).read(k, None) for k in (1, 2, 3)]
  assert [r.captions for r in as_in_evaluation] == [['number 1'], [], ['number 33']]
  assert [r.problem[:9] for r in as_in_evaluation] == ['', 'a caption', '']

  class Story(Numbered):
    def __getitem__(self, index):
      return stories.Story([np.zeros((8, 8, 3), np.uint8)] * 3, ['', 'number 1', 'number 2' + '\ud83d' * (index == 1)])

  stream = loader(Story(2), shuffle=False, batch_size=2)
  next(stream)
  assert stream.skipped == {'picture-1': 1}
  stream.close()


@pytest.mark.parametrize(
  'bad, message',
  [
    (dict(batch_size=6, part=(0, 4)), 'batch_size 6 is not divisible by the 4 parts'),
    (dict(batch_size=0), 'batch_size 0'),
    (dict(augment='rotate'), 'augment has rotate; expected names of center_crop'),
    (dict(image_size=0), 'image_size is 0'),
    (dict(workers=-1), 'data.workers is -1; expected a number of processes, or 0'),
    (dict(seed=-1), 'data.seed is -1; expected 0 or more'),
  ],
)
def test_bad_arguments_are_refused(bad, message):
  with pytest.raises(ValueError, match=message):
    loader(Numbered(10), **bad)


def test_an_empty_source_is_refused():
  with pytest.raises(ValueError, match='empty'):
    loader(Numbered(0))
