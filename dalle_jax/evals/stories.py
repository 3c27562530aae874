"""Continued stories of a held-out split, frame by frame."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from dalle_jax.evals.oracle import Oracle, score_moments
from dalle_jax.evals.split import Evaluation, Record, Result, Settings, filled
from dalle_jax.pipelines.grids import stacked, storyboard


class Stories(Evaluation):
  """Every frame after the source, by a pipeline that has `continue_stories`."""

  EXPECTED = 'a story of pictures with a caption for every frame after the first'
  STORY = True

  def __init__(self, model: Any, source: Any, settings: Settings):
    super().__init__(model, source, settings)
    self.oracle = Oracle(model.image_size, accessories=True) if hasattr(source, 'moments') else None

  def usable(self, captions: Sequence[str]) -> bool:
    return all(c.strip() for c in captions[1:])

  def at_once(self) -> int:
    return max(1, self.settings.batch_size // (self.settings.n * self.model.model.frames))

  def make(self, part: Sequence[Record], size: int) -> list[Result]:
    asked = filled(part, size)
    vectors = np.stack([r.arrays['vectors'] for r in asked]) if 'vectors' in part[0].arrays else None
    s = self.settings
    options = {'vectors': vectors, 'batch_size': s.batch_size, **s.sampling}
    given, told = np.stack([r.arrays['image'][0] for r in asked]), [list(r.captions[1:]) for r in asked]
    samples = self.model.continue_stories(given, told, s.n, s.seed, **options)
    results = []
    for record, sample in zip(part, samples, strict=False):
      drawn, rows = sample.frames[:, 0], []
      for t, caption in enumerate(sample.captions):
        row = self.name(record) | {'frame': t + 1, 'caption': caption, 'candidate': int(sample.candidates[t, 0])}
        rows.append(row if sample.scores is None else row | {'clip_score': round(float(sample.scores[t, 0]), 4)})
      if self.oracle:
        moments = self.source.moments(record.index)[1:]
        right = score_moments(self.oracle, drawn, moments)
        for t, (row, moment) in enumerate(zip(rows, moments, strict=True)):
          row |= {'right': {name: bool(values[t]) for name, values in right.items()}, 'silent': moment.silent}
      labels = record.arrays.get('labels')
      results.append(Result(drawn, record.arrays['image'][1:], rows, None if labels is None else labels[1:]))
    return results

  def grid(self, shown: Sequence[tuple[Record, Result]]) -> Image.Image:
    boards = []
    for record, result in shown:
      source, captions = record.arrays['image'][0], record.captions[1:]
      boards.append(storyboard(source, result.drawn, captions))
      boards.append(storyboard(source, result.true, ['true'] * len(captions)))
    return stacked(boards)

  def metrics(self) -> dict[str, Any]:
    """Also, by the oracle, the setting in frames after a change, whose captions say nothing of it."""
    result = super().metrics()
    if self.oracle:
      silent = [row['right']['setting'] for row in self.rows if row['silent']]
      result |= {'setting_silent': float(np.mean(silent)) if silent else None, 'silent_frames': len(silent)}
    return result
