"""From a source to batches: batch k is a function of (source, seed, k), whatever reads it.

  record index (shuffled anew each epoch) -> example (decode, crop, tokenize) -> rows of this process -> batch

Number of workers, processes and resumed steps only decide who computes which k. See `make_loader`.
"""

import dataclasses
import itertools
import logging
import multiprocessing
import os
import signal
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from dalle_jax.data import ops
from dalle_jax.data.stories import Story

logger = logging.getLogger(__name__)
LOGGED = 20  # broken records that a loader names; further ones are counted in silence
THREADS = 2  # of a process, one a batch; more only fight for the interpreter lock
EPOCHS = 2**31  # for ever; grain's own for ever overflows in batches of one
AHEAD = 4  # batches that are ready before they are asked for

Batch = dict[str, np.ndarray]
Encoder = Callable[[str, int | None], np.ndarray]
Encoders = Mapping[str, Encoder]


class Source(Protocol):
  """Random access to records.

  A record is a `stories.Story` or a dict with `image` (uint8[H, W, 3], a PIL image, or the bytes of an image file) or
  `tokens` (int32[h * w]; [F, h * w] for a story), `caption` and, where there are several, `captions`. A dict may also
  have `caption_error` (why its captions could not be read), `labels` bool[C] and, with the tokens of a story,
  `vectors`; the last two are passed on.

  A source may have three more methods: `name(index) -> str` for messages; `captions(index) -> list[str]`, which opens
  no image; and `draw(index, rng)`, which then replaces `source[index]` (see `stories.StorySource`).
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Row:
  """Where a row of a batch comes from: the record, all its captions, and what was skipped to get there."""

  index: int
  captions: Sequence[str]
  skipped: Sequence[tuple[str, str]] = ()  # (name, reason)


class Examples:
  """`examples(index, rng) -> (arrays, Row)`: one record, or the next usable one after it in the source's order."""

  def __init__(self, source: Source, image_size: int, augment: str, encode_text: Encoders | Encoder | None):
    if image_size < 1:
      raise ValueError(f'data.image_size is {image_size}; expected a positive number of pixels.')
    self.source, self.image_size = source, image_size
    self.encoders = {'text': encode_text} if callable(encode_text) else dict(encode_text or {})
    self.augment = ops.parse_augment(augment)
    self.broken: dict[int, str] = {}  # index -> reason, so that nothing is tried twice

  def name(self, index: int) -> str:
    return self.source.name(index) if hasattr(self.source, 'name') else f'record {index}'

  def __call__(self, index: int, rng: np.random.Generator | None) -> tuple[Batch, Row]:
    """Raises ValueError when no record of the source is usable."""
    count = len(self.source)
    skipped = []
    # Every attempt starts from the same state. A broken record draws before it fails, but only when it is first read:
    # later it is skipped without being read, and its substitute must be the same either way.
    state = None if rng is None else rng.bit_generator.state
    for i in ((index + offset) % count for offset in range(count)):
      if i not in self.broken:
        try:
          arrays, captions, story = self.read(i, rng)
          break
        except Exception as e:  # what a broken file makes Pillow raise has no common class
          self.broken[i] = ' '.join(f'{type(e).__name__}: {e}'.split())
          if rng is not None:
            rng.bit_generator.state = state
      skipped.append(i)
    else:
      raise ValueError(f'none of {count} records is usable; {self.name(index)}: {self.broken[index]}')
    seed = lambda: None if rng is None else int(rng.integers(2**63))
    if story:
      for name, encode in self.encoders.items():
        arrays[name] = np.stack([encode(c, seed()) for c in captions[1:]])
    elif self.encoders:
      one = captions[0 if rng is None else int(rng.integers(len(captions)))]
      arrays |= {name: encode(one, seed()) for name, encode in self.encoders.items()}
    return arrays, Row(i, captions, [(self.name(k), self.broken[k]) for k in skipped])

  def read(self, index: int, rng: np.random.Generator | None) -> tuple[Batch, list[str], bool]:
    """Arrays and captions of a record, and whether it is a story, with as many captions as frames."""
    source: Any = self.source
    record = source.draw(index, rng) if hasattr(source, 'draw') else source[index]
    if isinstance(record, Story):
      record = vars(record)
    story = 'frames' in record or np.ndim(record.get('tokens', ())) == 2
    captions = list(record.get('captions') or [record['caption']])
    captions = captions if story else [c for c in captions if c.strip()]
    if self.encoders and not (captions and all(c.strip() for c in captions[story:])):
      raise ValueError(record.get('caption_error', 'no caption'))
    arrays: dict[str, np.ndarray] = {}
    if 'tokens' in record:
      arrays['tokens'] = np.asarray(record['tokens'], np.int32)
    elif story:
      # One crop and one flip for all frames, so that left stays left.
      seed = None if rng is None else int(rng.integers(2**63))
      again = lambda: None if seed is None else np.random.default_rng(seed)
      arrays['image'] = np.stack([self.picture(frame, again()) for frame in record['frames']])
    else:
      arrays['image'] = self.picture(record['image'], rng)
    if record.get('vectors') is not None:
      arrays['vectors'] = np.asarray(record['vectors'], np.float32)[1:]
    if record.get('labels') is not None:
      arrays['labels'] = np.asarray(record['labels'], bool)
    return arrays, captions, story

  def picture(self, image: Any, rng: np.random.Generator | None) -> np.ndarray:
    image = ops.to_rgb(image, least=2 * self.image_size)  # twice, so that the resize still antialiases
    return ops.crop(image, self.image_size, self.augment, rng)

  def ordered(self, index: int) -> list[tuple[Batch, Row]]:
    return [self(index, None)]


@dataclasses.dataclass(frozen=True)
class Groups:
  """`groups(k, rng)`: the examples of records [k * size, (k + 1) * size), which stay together in a shuffled order."""

  examples: Examples
  size: int

  def __call__(self, index: int, rng: np.random.Generator) -> list[tuple[Batch, Row]]:
    return [self.examples(index * self.size + i, rng) for i in range(self.size)]


def collate(groups: Sequence[list[tuple[Batch, Row]]]) -> tuple[Batch, list[Row]]:
  arrays, rows = zip(*itertools.chain.from_iterable(groups), strict=True)
  return {k: np.stack([a[k] for a in arrays]) for k in arrays[0]}, list(rows)


class Loader(Iterator[Batch]):
  """Iterator over batches. `rows` tells where those of the last batch come from, `skipped` counts broken records.

  `fresh` is the number of rows of the last batch, over all processes, before the repeats that fill it up.

  `close()` ends threads and worker processes; leaving the loader to the garbage collector or the end of the program
  does too.
  """

  def __init__(self, batches: Iterator[tuple[Batch, list[Row]]], batch_size: int, records: int | None = None):
    self._batches = [batches]  # emptied by close, as grain's iterators must not outlive it into the interpreter's end
    self.close = weakref.finalize(self, _close, self._batches)
    self.rows: list[Row] = []
    self.fresh, self._size, self._left = 0, batch_size, records
    self.skipped: Counter[str] = Counter()  # name -> how often another record took its place

  def __next__(self) -> Batch:
    if not self._batches:
      raise StopIteration
    batch, self.rows = next(self._batches[0])
    self.fresh = self._size if self._left is None else min(self._size, self._left)
    self._left = None if self._left is None else self._left - self._size
    for name, reason in (s for row in self.rows for s in row.skipped):
      if name not in self.skipped and len(self.skipped) <= LOGGED:
        silent = ' (further ones are only counted)' if len(self.skipped) == LOGGED else ''
        logger.warning('%s is skipped, the next usable record takes its place: %s%s', name, reason, silent)
      self.skipped[name] += 1
    return batch


def _close(batches: list) -> None:
  while batches:
    batches.pop().close()


def _start_worker(index: int, count: int) -> None:
  # Ctrl-C reaches the whole group, and so may SIGTERM, by which Slurm and others ask to stop: the main process still
  # needs the batch of this step, and then ends its workers, or they end with it.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  if parent:  # a killed main process cannot end them, and they would wait for it for ever
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
  parent.join()
  os._exit(1)


def make_loader(
  source: Source,
  config_data: Any,
  *,
  encode_text: Encoders | Encoder | None,
  batch_size: int,
  seed: int,
  shuffle: bool,
  start_step: int = 0,
  part: int = 0,
  parts: int = 1,
  workers: int | None = None,
) -> Loader:
  """Batches of `source` from batch `start_step` on: rows [p * B / P, (p + 1) * B / P) of each for part p of P.

  A batch is a dict of `image` uint8[b, size, size, 3] or, from records with tokens, `tokens` int32[b, h * w]; `text`
  int32[b, N] with `encode_text`; `labels` and `vectors` where the records have them. Stories of F frames have `image`
  [b, F, size, size, 3] or `tokens` [b, F, h * w]; `text` [b, F - 1, N] and `vectors` [b, F - 1, d] of the frames after
  the source; `labels` [b, F, C]. With `shuffle` it goes on for ever, a new order each epoch; batches do not stop at the
  end of one. Without, it is one pass in order, free of chance (central crops, first captions, seed None); the last
  batch is filled up with the first records, so row r of batch k is a repeat when k * batch_size + r >= len(source).

  A record that cannot be read, or has no caption where text is asked for, gives its place to the next usable one, is
  counted in `loader.skipped` and named once in the log.

  Args:
    config_data: has image_size; augment, see `ops.parse_augment`; and, for what is shuffled, workers, processes that
      read ahead (0: threads of this process), and group, how many consecutive records of the source stay together
      (what is left over at its end is never read).
    encode_text: (caption, seed) -> int32[N], or several such by the name of their array; must pickle when there are
      workers.
    batch_size: of all parts.
    part, parts: p and P; of several processes see `training.sharding.part_to_read`.
    workers: in place of `config_data`'s, and for an ordered pass, most of which are over before processes have started.

  Raises ValueError for impossible arguments; while iterating, when not a single record is usable.
  """
  if batch_size < 1 or batch_size % parts:
    raise ValueError(f'data.batch_size {batch_size} is not divisible by the {parts} parts that processes read.')
  if not len(source):
    raise ValueError('the data source is empty; give it at least one record.')
  examples = Examples(source, config_data.image_size, config_data.augment, encode_text)
  group, rows = config_data.group if shuffle else 1, batch_size // parts
  if group < 1 or rows % group or group > len(source):
    raise ValueError(f'data.group {group} does not divide the {rows} rows a part, or exceeds {len(source)} records.')
  order = grain.MapDataset.range(len(source) // group)
  # Neighbouring seeds must not give neighbouring streams: grain shuffles epoch e with seed + e.
  order_seed, rng_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))
  if shuffle:
    dataset = order.shuffle(seed=order_seed).repeat(EPOCHS).random_map(Groups(examples, group), seed=rng_seed)
    stop = None
  else:
    dataset = order.repeat(EPOCHS, reseed_each_epoch=False).map(examples.ordered)
    stop = -(-len(source) // batch_size) * parts
  # In batches of b = B / P, number k * P + p holds the rows of part p in global batch k.
  dataset = dataset.batch(rows // group, batch_fn=collate)
  dataset = dataset[start_step * parts + part : stop : parts]
  workers = workers if workers is not None else config_data.workers if shuffle else 0
  left = None if shuffle else len(source) - start_step * batch_size
  if not workers:
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
    return Loader(iter(dataset.to_iter_dataset(options)), batch_size, left)
  if not flags.FLAGS.is_parsed():  # in notebooks and scripts without absl; grain's workers read flags
    flags.FLAGS.mark_as_parsed()
  dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
  options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=-(-AHEAD // workers))
  return Loader(iter(dataset.mp_prefetch(options, _start_worker)), batch_size, left)
