"""Continued stories of a held-out split, frame by frame."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from dalle_jax.evals.evaluation import ImageEvaluation, Record, Result, Settings, filled
from dalle_jax.evals.oracle import Oracle, score_moments
from dalle_jax.pipelines.grids import stacked, storyboard


class Stories(ImageEvaluation):
  """Every frame after the source, by a pipeline that has `continue_stories`."""

  EXPECTED = 'a story of images with a caption for every frame after the first'
  STORY = True

  def __init__(self, model: Any, source: Any, settings: Settings):
    super().__init__(model, source, settings)
    self.oracle = Oracle(model.image_size, accessories=True) if hasattr(source, 'moments') else None

  def records_per_call(self) -> int:
    return max(1, self.settings.batch_size // (self.settings.n * self.model.model.frames))

  def make(self, part: Sequence[Record], size: int) -> list[Result]:
    records, s = filled(part, size), self.settings
    sources = np.stack([r.arrays['image'][0] for r in records])
    captions = [list(r.captions[1:]) for r in records]
    vectors = np.stack([r.arrays['vectors'] for r in records]) if 'vectors' in part[0].arrays else None
    options = {'vectors': vectors, 'batch_size': s.batch_size, **s.sampling}
    samples = self.model.continue_stories(sources, captions, s.n, s.seed, **options)
    return [self.result(record, sample) for record, sample in zip(part, samples, strict=False)]

  def result(self, record: Record, sample: Any) -> Result:
    drawn, rows = sample.frames[:, 0], []
    for t, caption in enumerate(sample.captions):
      row = self.name(record) | {'frame': t + 1, 'caption': caption, 'candidate': int(sample.candidates[t, 0])}
      if sample.scores is not None:
        row['clip_score'] = round(float(sample.scores[t, 0]), 4)
      rows.append(row)
    if self.oracle:
      moments = self.source.moments(record.index)[1:]
      right = score_moments(self.oracle, drawn, moments)
      for t, (row, moment) in enumerate(zip(rows, moments, strict=True)):
        row |= {'right': {name: bool(values[t]) for name, values in right.items()}, 'silent': moment.silent}
    labels = record.arrays.get('labels')
    return Result(drawn, record.arrays['image'][1:], rows, None if labels is None else labels[1:])

  def grid(self) -> Image.Image:
    boards = []
    for record, result in self.shown:
      source, captions = record.arrays['image'][0], record.captions[1:]
      boards.append(storyboard(source, result.drawn, captions))
      boards.append(storyboard(source, result.true, ['true'] * len(captions)))
    return stacked(boards)

  def metrics(self) -> dict[str, Any]:
    """Also, by the oracle, how often the setting is right in frames after a change that their captions do not mention.

    None where there are no such frames; 'silent_frames' is their number.
    """
    result = super().metrics()
    if self.oracle:
      silent = [row['right']['setting'] for row in self.rows if row['silent']]
      result |= {'setting_silent': float(np.mean(silent)) if silent else None, 'silent_frames': len(silent)}
    return result
