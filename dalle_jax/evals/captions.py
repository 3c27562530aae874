"""Pictures for the captions of a held-out split."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from PIL import Image

from dalle_jax.evals.oracle import reader
from dalle_jax.evals.split import Evaluation, Record, Result, Settings, filled
from dalle_jax.pipelines.grids import caption_grid


class Captions(Evaluation):
  """A picture for the first caption of each record, by a pipeline that has `sample`, beside the record's own.

  The k-th record of one caption gets the candidates k * n and following, as `sample` would draw them: see their rows.
  """

  EXPECTED = 'a picture with a caption'

  def __init__(self, model: Any, source: Any, settings: Settings):
    super().__init__(model, source, settings)
    self.read = reader(source, model.image_size)
    self.times: Counter[str] = Counter()  # how often a caption came up

  def usable(self, captions: Sequence[str]) -> bool:
    return bool(captions)

  def at_once(self) -> int:
    return max(1, self.settings.batch_size // self.settings.n)

  def make(self, part: Sequence[Record], size: int) -> list[Result]:
    s, first = self.settings, []
    for caption in (r.captions[0] for r in part):
      first.append(self.times[caption] * s.n)
      self.times[caption] += 1
    asked = [r.captions[0] for r in filled(part, size)]
    first += first[-1:] * (size - len(part))
    samples = self.model.sample(asked, s.n, s.seed, first=first, batch_size=s.batch_size, **s.sampling)
    return [self.result(record, sample) for record, sample in zip(part, samples, strict=False)]

  def result(self, record: Record, sample: Any) -> Result:
    row = self.name(record) | {'caption': record.captions[0], 'candidate': int(sample.candidates[0])}
    row |= {} if sample.scores is None else {'clip_score': round(float(sample.scores[0]), 4)}
    images = sample.images[:1]
    row |= {} if self.read is None else {'right': self.read(record.index, images)[0]}
    labels = record.arrays.get('labels')
    return Result(images, record.arrays['image'][None], [row], None if labels is None else labels[None])

  def grid(self, shown: Sequence[tuple[Record, Result]]) -> Image.Image:
    return caption_grid([(r.captions[0], [x.true[0], x.drawn[0]]) for r, x in shown], ['true', 'drawn'])
