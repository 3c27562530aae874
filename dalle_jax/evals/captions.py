"""Pictures for the captions of a held-out split."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from dalle_jax.evals.oracle import reader
from dalle_jax.evals.split import Evaluation, Record, Result, Settings, filled
from dalle_jax.pipelines.grids import caption_grid


class Captions(Evaluation):
  """A picture for the first caption of each record, by a pipeline that has `sample`, beside the record's own.

  Records of the same caption get different pictures: of the k-th one the seed is another.
  """

  EXPECTED = 'a picture with a caption'

  def __init__(self, model: Any, source: Any, settings: Settings):
    super().__init__(model, source, settings)
    self.read = reader(source, model.image_size)
    self.times: Counter[str] = Counter()  # how often a caption came up

  def usable(self, captions: Sequence[str], story: bool) -> bool:
    return not story and bool(captions)

  def at_once(self) -> int:
    return max(1, self.settings.batch_size // self.settings.n)

  def make(self, part: Sequence[Record], size: int) -> list[Result]:
    turns: dict[int, list[Record]] = {}
    for record in part:
      turns.setdefault(self.times[record.captions[0]], []).append(record)
      self.times[record.captions[0]] += 1
    drawn: dict[int, Any] = {}
    for turn, records in turns.items():
      asked = [r.captions[0] for r in (filled(records, size) if len(turns) == 1 else records)]
      s = self.settings
      samples = self.model.sample(asked, s.n, seed_of(s.seed, turn), batch_size=s.batch_size, **s.sampling)
      drawn |= {r.index: sample for r, sample in zip(records, samples, strict=False)}
    return [self.result(record, drawn[record.index]) for record in part]

  def result(self, record: Record, sample: Any) -> Result:
    row = self.name(record) | {'caption': record.captions[0], 'candidate': int(sample.candidates[0])}
    row |= {} if sample.scores is None else {'clip_score': round(float(sample.scores[0]), 4)}
    images = sample.images[:1]
    row |= {} if self.read is None else {'right': self.read(record.index, images)[0]}
    labels = record.arrays.get('labels')
    return Result(images, record.arrays['image'][None], [row], None if labels is None else np.atleast_2d(labels))

  def grid(self, shown: Sequence[tuple[Record, Result]]) -> Image.Image:
    return caption_grid([(r.captions[0], [x.true[0], x.drawn[0]]) for r, x in shown], ['true', 'drawn'])


def seed_of(seed: int, turn: int) -> int:
  """The seed for the turn-th record of one caption, counted from 0."""
  return int(np.random.SeedSequence([seed, turn]).generate_state(1)[0]) if turn else seed
