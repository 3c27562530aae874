"""From a source of records to batches: batch k is a function of (source, seed, k), whatever reads it.

  record index (reshuffled every epoch) -> example (decode, crop, tokenize) -> rows of this process -> batch

The number of workers, the number of processes and the step at which a run resumes only decide who computes which batch.
See `make_loader`.
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
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np
from absl import flags

from dalle_jax.data import bpe, ops
from dalle_jax.data.stories import Story

logger = logging.getLogger(__name__)
LOGGED = 20  # broken records that a loader names in the log; any more are only counted
THREADS = 2  # per process, each reading one batch; more would only contend for the interpreter lock
EPOCHS = 2**31  # effectively endless; grain's own endless repeat overflows when batches hold one record
AHEAD = 4  # batches that are prepared before they are asked for

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
  no image; and `draw(index, rng)`, which is called instead of `source[index]` (see `stories.StorySource`).
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Row:
  """Where a row of a batch comes from: the record, all its captions, and the records skipped on the way to it."""

  index: int
  captions: Sequence[str]
  skipped: Sequence[tuple[str, str]] = ()  # (name, reason)


class Decoded(NamedTuple):
  """A record as arrays, with its captions: one per frame of a story, else alternatives.

  `problem` says why it cannot be used with text, '' if it can.
  """

  arrays: Batch
  captions: list[str]
  is_story: bool
  problem: str


class Examples:
  """`examples(index, rng) -> (arrays, Row)`: a record or, if it is not usable, the next usable one in the source."""

  def __init__(self, source: Source, image_size: int, augment: str, encode_text: Encoders | Encoder | None):
    if image_size < 1:
      raise ValueError(f'data.image_size is {image_size}; expected a positive number of pixels.')
    self.source, self.image_size = source, image_size
    self.encoders = {'text': encode_text} if callable(encode_text) else dict(encode_text or {})
    self.augment = ops.parse_augment(augment)
    self.broken: dict[int, str] = {}  # index -> reason, so that no broken record is read twice

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
          arrays, captions, is_story, _ = self.read(i, rng)
          break
        except Exception as e:  # the exceptions that Pillow raises for broken files have no common class
          self.broken[i] = ' '.join(f'{type(e).__name__}: {e}'.split())
          if rng is not None:
            rng.bit_generator.state = state
      skipped.append(i)
    else:
      raise ValueError(f'none of {count} records is usable; {self.name(index)}: {self.broken[index]}')
    if is_story:
      for name, encode in self.encoders.items():
        arrays[name] = np.stack([encode(c, _new_seed(rng)) for c in captions[1:]])
    elif self.encoders:
      caption = captions[0 if rng is None else int(rng.integers(len(captions)))]
      arrays |= {name: encode(caption, _new_seed(rng)) for name, encode in self.encoders.items()}
    return arrays, Row(i, captions, [(self.name(k), self.broken[k]) for k in skipped])

  def read(self, index: int, rng: np.random.Generator | None) -> Decoded:
    """Reads one record. A caption that is not valid Unicode is read as ''.

    Raises whatever a broken one raises, and ValueError when text is needed and there is no caption.
    """
    source: Any = self.source
    record = source.draw(index, rng) if hasattr(source, 'draw') else source[index]
    if isinstance(record, Story):
      record = vars(record)
    is_story = 'frames' in record or np.ndim(record.get('tokens', ())) == 2
    captions = list(record.get('captions') or [record['caption']])
    problem = record.get('caption_error', 'no caption')
    if any(map(bpe.LONE_SURROGATE.search, captions)):
      problem = f'a caption has a lone surrogate, so it is not valid Unicode: {captions!r:.100}'
      captions = ['' if bpe.LONE_SURROGATE.search(c) else c for c in captions]
    if is_story:  # the source frame needs no caption
      described = len(captions) > 1 and all(c.strip() for c in captions[1:])
    else:
      captions = [c for c in captions if c.strip()]
      described = bool(captions)
    if described:
      problem = ''
    elif self.encoders:
      raise ValueError(problem)
    arrays: dict[str, np.ndarray] = {}
    if 'tokens' in record:
      arrays['tokens'] = np.asarray(record['tokens'], np.int32)
    elif is_story:
      seed = _new_seed(rng)  # one crop and one flip for all frames, so that left stays left
      generators = (None if seed is None else np.random.default_rng(seed) for _ in record['frames'])
      arrays['image'] = np.stack([self.image(f, g) for f, g in zip(record['frames'], generators, strict=True)])
    else:
      arrays['image'] = self.image(record['image'], rng)
    if record.get('vectors') is not None:
      arrays['vectors'] = np.asarray(record['vectors'], np.float32)[1:]
    if record.get('labels') is not None:
      arrays['labels'] = np.asarray(record['labels'], bool)
    return Decoded(arrays, captions, is_story, problem)

  def image(self, stored: Any, rng: np.random.Generator | None) -> np.ndarray:
    image = ops.to_rgb(stored, least=2 * self.image_size)  # twice, so that the resize still antialiases
    return ops.crop(image, self.image_size, self.augment, rng)

  def ordered(self, index: int) -> list[tuple[Batch, Row]]:
    return [self(index, None)]


def _new_seed(rng: np.random.Generator | None) -> int | None:
  return None if rng is None else int(rng.integers(2**63))


@dataclasses.dataclass(frozen=True)
class Groups:
  """`groups(k, rng)`: the examples of records [k * size, (k + 1) * size), which a shuffle keeps together."""

  examples: Examples
  size: int

  def __call__(self, index: int, rng: np.random.Generator) -> list[tuple[Batch, Row]]:
    return [self.examples(index * self.size + i, rng) for i in range(self.size)]


def collate(groups: Sequence[list[tuple[Batch, Row]]]) -> tuple[Batch, list[Row]]:
  arrays, rows = zip(*itertools.chain.from_iterable(groups), strict=True)
  return {k: np.stack([a[k] for a in arrays]) for k in arrays[0]}, list(rows)


class Loader(Iterator[Batch]):
  """Iterator over batches.

  `close()` ends its threads and worker processes. So does leaving the loader to the garbage collector or to the end of
  the program.

  Attributes:
    rows: where each row of the last batch comes from.
    fresh: the rows of the last batch, over all processes, before the repeats that fill it up.
    skipped: name of a broken record -> how often another record took its place.
  """

  def __init__(self, batches: Iterator[tuple[Batch, list[Row]]], batch_size: int, records: int | None = None):
    self._batches = [batches]  # emptied by close: grain's iterators must not live on while the interpreter shuts down
    self.close = weakref.finalize(self, _close, self._batches)
    self.rows: list[Row] = []
    self.fresh, self._size, self._left = 0, batch_size, records
    self.skipped: Counter[str] = Counter()

  def __next__(self) -> Batch:
    if not self._batches:
      raise StopIteration
    batch, self.rows = next(self._batches[0])
    if self._left is None:
      self.fresh = self._size
    else:
      self.fresh = min(self._size, self._left)
      self._left -= self._size
    for name, reason in (s for row in self.rows for s in row.skipped):
      if name not in self.skipped and len(self.skipped) <= LOGGED:
        more = ' (further ones are only counted)' if len(self.skipped) == LOGGED else ''
        logger.warning('%s is skipped and replaced by the next usable record: %s%s', name, reason, more)
      self.skipped[name] += 1
    return batch


def _close(batches: list) -> None:
  while batches:
    batches.pop().close()


def _start_worker(index: int, count: int) -> None:
  # Ctrl-C reaches the whole process group, and so may SIGTERM, with which Slurm and others ask a job to stop. The main
  # process still needs the batch of the current step; it then ends its workers, or they end with it.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  if parent:  # a main process that is killed cannot end its workers, which would wait for it forever
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
  """Batches of `source` from batch `start_step` on: rows [p * B / P, (p + 1) * B / P) of each, for part p of P.

  A batch is a dict of `image` uint8[b, size, size, 3] or, from records with tokens, `tokens` int32[b, h * w]; with
  `encode_text`, `text` int32[b, N]; and `labels` and `vectors` where the records have them. Stories of F frames have
  `image` [b, F, size, size, 3] or `tokens` [b, F, h * w]; `text` [b, F - 1, N] and `vectors` [b, F - 1, d] of the
  frames after the source; and `labels` [b, F, C].

  With `shuffle` the loader never ends. Every epoch has a new order, and batches run across the ends of epochs. Without
  it, there is one pass in order and nothing is random: central crops, first captions, and None for the seed of
  `encode_text`. The last batch is filled up with the first records, so row r of batch k is a repeat when
  k * batch_size + r >= len(source).

  A record that cannot be read, or that has no caption when text is asked for, is replaced by the next usable one. It is
  counted in `loader.skipped` and named once in the log.

  Args:
    config_data: has `image_size`; `augment`, see `ops.parse_augment`; and, used only with `shuffle`: `workers`, the
      number of processes that read ahead (0: threads of this process), and `group`, how many consecutive records of the
      source stay together (an incomplete group at its end is never read).
    encode_text: (caption, seed) -> int32[N], or several of these by the name of their array. With workers they are
      pickled.
    batch_size: over all parts.
    part, parts: p and P; for several processes see `training.sharding.part_to_read`.
    workers: overrides that of `config_data`. It is also the only way to use workers in an ordered pass, most of which
      are over before worker processes have started.

  Raises ValueError for impossible arguments and, during iteration, when not a single record is usable.
  """
  if batch_size < 1 or batch_size % parts:
    raise ValueError(f'data.batch_size {batch_size} is not divisible by the {parts} parts that processes read.')
  if workers is None:
    workers = config_data.workers if shuffle else 0
  if workers < 0:
    raise ValueError(f'data.workers is {workers}; expected a number of processes, or 0 for threads of this process.')
  if seed < 0:
    raise ValueError(f'data.seed is {seed}; expected 0 or more.')
  if not len(source):
    raise ValueError('the data source is empty; give it at least one record.')
  examples = Examples(source, config_data.image_size, config_data.augment, encode_text)
  rows = batch_size // parts
  group = config_data.group if shuffle else 1
  if group < 1 or rows % group or group > len(source):
    raise ValueError(
      f'data.group {group} does not divide the {rows} rows of each part, or exceeds the {len(source)} records.'
    )
  order = grain.MapDataset.range(len(source) // group)
  # Grain shuffles epoch e with seed + e, so neighbouring seeds must be turned into unrelated ones.
  order_seed, rng_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))
  if shuffle:
    dataset = order.shuffle(seed=order_seed).repeat(EPOCHS).random_map(Groups(examples, group), seed=rng_seed)
    stop = left = None
  else:
    dataset = order.repeat(EPOCHS, reseed_each_epoch=False).map(examples.ordered)
    stop = -(-len(source) // batch_size) * parts
    left = len(source) - start_step * batch_size
  # In batches of b = B / P rows, number k * P + p is the share of part p in global batch k.
  dataset = dataset.batch(rows // group, batch_fn=collate)
  dataset = dataset[start_step * parts + part : stop : parts]
  if not workers:
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
    return Loader(iter(dataset.to_iter_dataset(options)), batch_size, left)
  # Grain's workers read the flags of absl, which notebooks and scripts without absl never parse.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
  options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=-(-AHEAD // workers))
  return Loader(iter(dataset.mp_prefetch(options, _start_worker)), batch_size, left)
