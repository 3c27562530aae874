"""One pass over a split of the data: every record is read, evaluated, scored and written down."""

import contextlib
import dataclasses
import itertools
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from dalle_jax.data import pipeline
from dalle_jax.evals import characters, fid
from dalle_jax.training import checkpoint, distributed

SHOWN = 12  # images in OUT/grid.png
MEANS = ('clip_score', 'clip_score_true', 'psnr', 'l1', 'lpips')  # columns of rows whose means are metrics


@dataclasses.dataclass(frozen=True)
class Settings:
  """How to sample, and which networks to score with.

  Attributes:
    n: candidates per image, of which the best by CLIP is scored.
    batch_size: images per call.
    sampling: temperature, top_k, top_p, guidance.
    resize: side in pixels that images are brought to before the FID; 0 for none.
    save_true: whether to also write the true images, as they are compared, and true.npz, their statistics by `network`.
    network: its features are those of the FID; None for no FID.
    labels: a classifier that labels the images; None for no labels.
    reference: statistics of images other than the true ones, for the FID.
    lpips: the run of an LPIPS, for reconstructions; None for no LPIPS.
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
  lpips: checkpoint.Run | None = None


@dataclasses.dataclass(frozen=True)
class Record:
  """A usable record: its index, arrays (see `data.pipeline.Examples`) and captions."""

  index: int
  arrays: Mapping[str, np.ndarray]
  captions: Sequence[str]


class Evaluation:
  """One pass over a split with one kind of model; `rows` has what predictions.json says, in order."""

  EXPECTED = ''  # what a record should be, for messages
  STORY = False  # whether records must be stories, or must not be
  CAPTIONS = True  # whether they must have captions

  def __init__(self, model: Any, source: Any, settings: Settings):
    self.model, self.source, self.settings = model, source, settings
    self.examples = pipeline.Examples(source, model.image_size, '', None)
    self.rows: list[dict[str, Any]] = []
    self.skipped: list[str] = []  # 'NAME: reason'

  def run(self, out: Path, count: int = 0) -> None:
    """Evaluates the first `count` records (0: all), and writes OUT/grid.png, predictions.json and what a subclass adds.

    With several processes all of them evaluate the same records, and the first one writes. Raises ValueError when no
    record is usable, or when one is not of the kind that this evaluation is for.
    """
    count = min(count or len(self.source), len(self.source))
    size = min(count, self.records_per_call())
    records = self.records(count)
    while True:
      part = list(itertools.islice(records, size))
      # Also when there are none, as otherwise a process that reads fewer would leave the others waiting.
      distributed.check_same({'records that can be read': str([r.index for r in part])})
      if not part:
        break
      self.evaluate(part, size, out)
      print(f'{part[-1].index + 1} of {count} records', flush=True)
    if not self.rows:
      raise ValueError(f'none of {count} records is usable; {self.skipped[0]}')
    self.finish(out)
    if jax.process_index() == 0:
      self.grid().save(out / 'grid.png')
      checkpoint.write_json(out / 'predictions.json', self.rows)

  def records(self, count: int) -> Iterator[Record]:
    """The usable ones of the first `count` records; the others are named, counted and left out."""
    for k in range(count):
      try:
        arrays, captions, story, problem = self.examples.read(k, None)
        if story == self.STORY and problem and self.CAPTIONS:
          raise ValueError(f'{problem}; expected {self.EXPECTED}')
      except Exception as e:  # what a broken file makes Pillow raise has no common class
        self.skipped.append(' '.join(f'{self.examples.name(k)}: {type(e).__name__}: {e}'.split()))
        if len(self.skipped) <= pipeline.LOGGED:  # metrics.json has all of them
          print(f'skipped {self.skipped[-1]}', flush=True)
        continue
      if story != self.STORY or 'image' not in arrays:  # then so are all the others
        kind = 'a story' if story else 'an image'
        encoded = '' if 'image' in arrays else ' in image tokens'
        raise ValueError(f'{self.examples.name(k)} is {kind}{encoded}; expected {self.EXPECTED}.')
      yield Record(k, arrays, captions)

  def name(self, record: Record) -> dict[str, Any]:
    """The columns with which each row of a record begins."""
    return {'record': self.examples.name(record.index), 'index': record.index}

  def metrics(self) -> dict[str, Any]:
    """Counts of records, and the means over all rows of their numeric columns `MEANS`."""
    result: dict[str, Any] = {'records': len({row['index'] for row in self.rows})}
    result |= {'skipped': len(self.skipped), 'skipped_records': self.skipped}
    for name in MEANS:
      if name in self.rows[0]:
        result[name] = float(np.mean([row[name] for row in self.rows]))
    return result

  # --- What depends on the kind of model

  def records_per_call(self) -> int:
    """How many records are evaluated in one call."""
    raise NotImplementedError

  def evaluate(self, part: Sequence[Record], size: int, out: Path) -> None:
    """Evaluates some records; calls of the model are filled up to `size` of them, so that it compiles once."""
    raise NotImplementedError

  def finish(self, out: Path) -> None:
    """Does what needs all records."""

  def grid(self) -> Image.Image:
    """The first results as one image, for a look at them."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Result:
  """The P images that a model made for a record.

  Attributes:
    drawn, true: uint8[P, S, S, 3], what the model made and what the record has.
    rows: a row of predictions.json for each image, with the column 'right' where there is an oracle.
    labels: bool[P, C] or None.
  """

  drawn: np.ndarray
  true: np.ndarray
  rows: list[dict[str, Any]]
  labels: np.ndarray | None = None


class ImageEvaluation(Evaluation):
  """Scores the images that a model makes for records, next to the true ones. `shown` are the first records."""

  def __init__(self, model: Any, source: Any, settings: Settings):
    """Raises ValueError when the classifier does not know the labels of the source."""
    super().__init__(model, source, settings)
    self.shown: list[tuple[Record, Result]] = []
    network, needs_true = settings.network, settings.save_true or not settings.reference
    self.feature_sets: dict[str, fid.FeatureSet] = {}
    for name in ('drawn', 'true'):
      if network and (name == 'drawn' or needs_true):
        self.feature_sets[name] = fid.FeatureSet(network, settings.resize)
    names = getattr(source, 'label_names', ())
    self.tally = characters.Tally(settings.labels, names) if names and settings.labels else None

  def make(self, part: Sequence[Record], size: int) -> list[Result]:
    """One result per record; see `evaluate` for `size`."""
    raise NotImplementedError

  def evaluate(self, part: Sequence[Record], size: int, out: Path) -> None:
    """Also writes the images to OUT/pictures/ and, if asked for, the true ones to OUT/true/."""
    results = self.make(part, size)
    for record, result in zip(part, results, strict=True):
      if jax.process_index() == 0:
        self.write(record, result, out)
      if sum(len(r.rows) for _, r in self.shown) < SHOWN:
        self.shown.append((record, result))
    self.accumulate(results)

  def write(self, record: Record, result: Result, out: Path) -> None:
    (out / 'pictures').mkdir(exist_ok=True)
    for i, (row, image) in enumerate(zip(result.rows, result.drawn, strict=True)):
      number = f'_{i + 1}' if len(result.rows) > 1 else ''
      row['file'] = f'pictures/{record.index:05d}{number}.png'
      Image.fromarray(image).save(out / row['file'])
      if self.settings.save_true:
        (out / 'true').mkdir(exist_ok=True)
        Image.fromarray(result.true[i]).save(out / 'true' / Path(row['file']).name)

  def accumulate(self, results: Sequence[Result]) -> None:
    """Adds rows, features and labels. Raises ValueError for scores that are not finite."""
    images = {k: np.concatenate([getattr(r, k) for r in results]) for k in ('drawn', 'true')}
    for name, features in self.feature_sets.items():
      features.add(images[name])
    rows = [row for r in results for row in r.rows]
    if reranker := getattr(self.model, 'reranker', None):
      scores = reranker.scores([row['caption'] for row in rows], images['true'][:, None])[:, 0]
      rows = [row | {'clip_score_true': round(float(s), 4)} for row, s in zip(rows, scores, strict=True)]
    if self.tally:
      labels = self.tally.add(np.concatenate([r.labels for r in results]), images)
      rows = [row | columns for row, columns in zip(rows, labels, strict=True)]
    if bad := [name for name in MEANS if not np.isfinite([row.get(name, 0.0) for row in rows]).all()]:
      raise ValueError(f'some values of {", ".join(bad)} are not finite; the network that computes them is damaged.')
    self.rows += rows

  def finish(self, out: Path) -> None:
    """Writes OUT/true.npz, if the true images were asked for."""
    if self.settings.save_true and self.feature_sets and len(self.rows) > 1:
      true = self.feature_sets['true'].statistics()  # computed by all processes
      if jax.process_index() == 0:
        self.feature_sets['true'].save(out / 'true.npz', true)

  def metrics(self) -> dict[str, Any]:
    """Also the number of images, the shares that an oracle finds right, scores of characters and the FID."""
    result = super().metrics() | {'pictures': len(self.rows)}
    for name in self.rows[0].get('right', ()):
      result[name] = float(np.mean([row['right'][name] for row in self.rows]))
    if self.tally:
      result |= self.tally.report()
    if not self.feature_sets:
      return result
    if len(self.rows) < 2:
      print('warning: the FID needs two images or more, so it is left out.', flush=True)
      return result
    true = self.settings.reference or self.feature_sets['true']
    return result | fid.report(self.feature_sets['drawn'], true)


WRITTEN = {'pictures', 'true', 'true.npz', 'grid.png', 'predictions.json', 'metrics.json'}


def check_out(out: Path) -> None:
  """Raises ValueError when `out` exists and holds anything but an earlier evaluation."""
  if out.is_symlink() or os.path.ismount(out) or not out.name:
    raise ValueError(f'--out {out} is a link, a mount or the current directory; give a directory inside it.')
  names: list[str] = []
  if out.is_dir():
    names = sorted(p.name for p in out.iterdir())
  elif out.exists():
    names = [out.name]
  others = [name for name in names if name not in WRITTEN]
  if others or (names and not (out / 'predictions.json').is_file()):
    raise ValueError(
      f'--out {out} holds other things than an evaluation ({", ".join(others or names)[:100]}); give another directory.'
    )


def check_kept(out: Path, inputs: Iterable[tuple[str, str]]) -> None:
  """Raises ValueError when something to read, given as (what it is, path), is `out` or in it, and would be lost."""
  for name, path in inputs:
    # What is no path here may be the name of a run on the Hugging Face Hub.
    file = Path(os.path.expanduser(path))  # as sources and runs do
    if path and file.exists() and file.resolve().is_relative_to(out.resolve()):
      raise ValueError(f'--out {out} holds {name} {path}, which it would replace; give another directory with --out.')


@contextlib.contextmanager
def in_place_of(out: Path) -> Iterator[Path]:
  """Yields a directory next to `out` to write an evaluation to.

  It replaces `out` when the block ends, and is removed when the block raises. Raises ValueError when it cannot be made.
  """
  token = secrets.token_hex(4)  # not the pid: in a container that of a killed evaluation, which left this, comes again
  partial, old = (out.with_name(f'{out.name}.{token}.{kind}') for kind in ('partial', 'old'))
  writes = jax.process_index() == 0
  if writes:
    try:
      partial.mkdir(parents=True)
    except OSError as e:  # whose message has the name of the temporary directory
      raise ValueError(f'--out {out} cannot be created ({e.strerror}); give another directory.') from e
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
  """`part` filled up to `size` records with repeats of the last one."""
  return [*part, *[part[-1]] * (size - len(part))]
