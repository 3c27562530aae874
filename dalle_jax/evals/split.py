"""One pass over a split of the data: what a pipeline makes of every record is written, looked at and scored."""

import contextlib
import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from dalle_jax.data import pipeline
from dalle_jax.evals import characters, fid
from dalle_jax.training import checkpoint, distributed

SHOWN = 12  # pictures in OUT/grid.png
MEANS = ('clip_score', 'clip_score_true', 'psnr', 'l1', 'lpips')  # columns of rows whose means are metrics


@dataclasses.dataclass(frozen=True)
class Settings:
  """How to draw and what to look with.

  Attributes:
    n: candidates a picture, of which the best by CLIP is scored.
    batch_size: pictures at once.
    sampling: temperature, top_k, top_p, guidance.
    resize: side in pixels that pictures are brought to before FID; 0 for none.
    save_true: whether the true pictures are written, too, as they are compared, and true.npz, what `network` sees.
    network: sees for the FID; labels: a classifier that finds labels. None: no such figures.
    reference: of other pictures than the true ones, for the FID.
  """

  n: int = 1
  seed: int = 0
  batch_size: int = 64
  sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  resize: int = 0
  save_true: bool = False
  network: fid.FeatureExtractor | None = None
  labels: fid.FeatureExtractor | None = None
  reference: fid.Statistics | None = None


@dataclasses.dataclass(frozen=True)
class Record:
  """A usable record: its number, arrays (see `data.pipeline.Examples`) and captions."""

  index: int
  arrays: Mapping[str, np.ndarray]
  captions: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Result:
  """What became of a record: P pictures.

  Attributes:
    drawn, true: uint8[P, S, S, 3], made and as it should be.
    rows: what predictions.json says of each, file and 'right' among it where there is an oracle.
    labels: bool[P, C] or None.
  """

  drawn: np.ndarray
  true: np.ndarray
  rows: list[dict[str, Any]]
  labels: np.ndarray | None = None


class Evaluation:
  """One pass over a split by one kind of model; `rows` has what predictions.json says of each picture, in order."""

  EXPECTED = ''  # of a record
  STORY = False  # whether records must be stories, or must not

  def __init__(self, model: Any, source: Any, settings: Settings):
    """Raises ValueError when the classifier does not know the labels of the source."""
    self.model, self.source, self.settings = model, source, settings
    network = settings.network
    kinds = ('drawn', 'true') if settings.save_true or not settings.reference else ('drawn',)
    self.seen = {k: fid.FeatureSet(network, settings.resize) for k in kinds} if network else {}
    names = getattr(source, 'label_names', ())
    self.tally = characters.Tally(settings.labels, names) if names and settings.labels else None
    self.rows: list[dict[str, Any]] = []
    self.skipped: list[str] = []  # 'NAME: reason'

  def run(self, out: Path, count: int = 0) -> None:
    """Makes the first `count` records (0: all), and writes OUT/pictures/, grid.png and predictions.json; if
    asked, true/ and true.npz, too.

    Of several processes all make the same; the first writes. Raises ValueError when no record is usable, or one is of
    another kind than this evaluation is for.
    """
    writes = jax.process_index() == 0
    if writes:
      (out / 'pictures').mkdir()
      if self.settings.save_true:
        (out / 'true').mkdir()
    count = min(count or len(self.source), len(self.source))
    size = min(count, self.at_once())
    records, shown = self.records(count), []
    while part := list(itertools.islice(records, size)):
      distributed.check_same({'records that can be read': str([r.index for r in part])})
      results = self.make(part, size)
      for record, result in zip(part, results, strict=True):
        if writes:
          self.write(record, result, out)
        if len([row for _, r in shown for row in r.rows]) < SHOWN:
          shown.append((record, result))
      self.accumulate(results)
      print(f'{part[-1].index + 1} of {count} records', flush=True)
    if not self.rows:
      raise ValueError(f'none of {count} records is usable; {self.skipped[0]}')
    if self.settings.save_true and self.seen and len(self.rows) > 1:
      true = self.seen['true'].statistics()  # by all processes
      if writes:
        self.seen['true'].save(out / 'true.npz', true)
    if writes:
      self.grid(shown).save(out / 'grid.png')
      checkpoint.write_json(out / 'predictions.json', self.rows)

  def records(self, count: int) -> Iterator[Record]:
    """Those of the first `count` that are usable; the others are named, counted and left out."""
    examples = pipeline.Examples(self.source, self.model.image_size, '', None)
    for k in range(count):
      try:
        arrays, captions, story = examples.read(k, None)
        if story == self.STORY and not self.usable(captions):
          raise ValueError(f'there is no caption; expected {self.EXPECTED}')
      except Exception as e:  # what a broken file makes Pillow raise has no common class
        self.skipped.append(' '.join(f'{examples.name(k)}: {type(e).__name__}: {e}'.split()))
        if len(self.skipped) <= pipeline.LOGGED:  # metrics.json has all
          print(f'skipped {self.skipped[-1]}', flush=True)
        continue
      if story != self.STORY or 'image' not in arrays:  # so are all the others
        found = 'a story' if story else 'a picture'
        kind = found if 'image' in arrays else f'{found} in image tokens'
        raise ValueError(f'{examples.name(k)} is {kind}; expected {self.EXPECTED}.')
      yield Record(k, arrays, captions)

  def name(self, record: Record) -> dict[str, Any]:
    """What begins the rows of a record."""
    name = self.source.name(record.index) if hasattr(self.source, 'name') else f'record {record.index}'
    return {'record': name, 'index': record.index}

  def write(self, record: Record, result: Result, out: Path) -> None:
    for i, (row, picture) in enumerate(zip(result.rows, result.drawn, strict=True)):
      number = f'_{i + 1}' if len(result.rows) > 1 else ''
      row['file'] = f'pictures/{record.index:05d}{number}.png'
      Image.fromarray(picture).save(out / row['file'])
      if self.settings.save_true:
        Image.fromarray(result.true[i]).save(out / 'true' / Path(row['file']).name)

  def accumulate(self, results: Sequence[Result]) -> None:
    """Adds rows, features and labels."""
    images = {k: np.concatenate([getattr(r, k) for r in results]) for k in ('drawn', 'true')}
    for name, seen in self.seen.items():
      seen.add(images[name])
    rows = [row for r in results for row in r.rows]
    if reranker := getattr(self.model, 'reranker', None):
      scores = reranker.scores([row['caption'] for row in rows], images['true'][:, None])[:, 0]
      rows = [row | {'clip_score_true': round(float(s), 4)} for row, s in zip(rows, scores, strict=True)]
    if self.tally:
      who = self.tally.add(np.concatenate([r.labels for r in results]), images)
      rows = [row | found for row, found in zip(rows, who, strict=True)]
    self.rows += rows

  def metrics(self) -> dict[str, Any]:
    """The scores of all pictures: means of what rows have in numbers, shares of what an oracle finds right, FID."""
    result: dict[str, Any] = {'records': len({row['index'] for row in self.rows}), 'pictures': len(self.rows)}
    result |= {'skipped': len(self.skipped), 'skipped_records': self.skipped}
    for name in self.rows[0].get('right', ()):
      result[name] = float(np.mean([row['right'][name] for row in self.rows]))
    for name in MEANS:
      if name in self.rows[0]:
        result[name] = float(np.mean([row[name] for row in self.rows]))
    result |= self.tally.report() if self.tally else {}
    if self.seen and len(self.rows) < 2:
      print('warning: a FID needs two pictures or more; there is none here.', flush=True)
      return result
    true = self.settings.reference or self.seen.get('true')
    return result | (fid.report(self.seen['drawn'], true) if self.seen else {})

  # --- What a kind of model is asked

  def usable(self, captions: Sequence[str]) -> bool:
    """Whether the captions of a record are there."""
    raise NotImplementedError

  def at_once(self) -> int:
    """How many records are made in one call."""
    raise NotImplementedError

  def make(self, part: Sequence[Record], size: int) -> list[Result]:
    """A result a record; a call is filled up to `size` records, so that it compiles once."""
    raise NotImplementedError

  def grid(self, shown: Sequence[tuple[Record, Result]]) -> Image.Image:
    """The first ones, to be looked at."""
    raise NotImplementedError


WRITTEN = {'pictures', 'true', 'true.npz', 'grid.png', 'predictions.json', 'metrics.json'}


def check_out(out: Path) -> None:
  """Raises ValueError when `out` is there and is not an earlier evaluation alone."""
  if out.is_symlink() or os.path.ismount(out) or not out.name:
    raise ValueError(f'--out {out} is a link, a mount or the current directory; give a directory in it.')
  there = sorted(p.name for p in out.iterdir()) if out.is_dir() else [out.name] if out.exists() else []
  if set(there) - WRITTEN or (there and not (out / 'predictions.json').is_file()):
    others = ', '.join([name for name in there if name not in WRITTEN] or there)
    raise ValueError(f'--out {out} holds other things than an evaluation ({others[:100]}); give another.')


@contextlib.contextmanager
def in_place_of(out: Path) -> Iterator[Path]:
  """A directory beside `out` to write an evaluation to, which takes its place once it is whole; else it is removed."""
  partial, old = (out.with_name(f'{out.name}.{os.getpid()}.{kind}') for kind in ('partial', 'old'))
  writes = jax.process_index() == 0
  if writes:
    partial.mkdir(parents=True)
  try:
    yield partial
    if writes:
      if out.exists():
        out.replace(old)
      partial.replace(out)
      shutil.rmtree(old, ignore_errors=True)
  finally:
    if writes:
      shutil.rmtree(partial, ignore_errors=True)


def filled(part: Sequence[Record], size: int) -> list[Record]:
  """With repeats of the last one."""
  return [*part, *[part[-1]] * (size - len(part))]
