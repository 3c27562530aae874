"""Images generated for the captions of a held-out split."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from PIL import Image

from dalle_jax.evals.evaluation import ImageEvaluation, Record, Result, Settings, filled
from dalle_jax.evals.oracle import reader
from dalle_jax.pipelines.grids import caption_grid


class Captions(ImageEvaluation):
  """One image for the first caption of each record, by a pipeline that has `sample`, next to the record's own image.

  The k-th record with the same caption gets the candidates k * n to k * n + n - 1, as `sample` numbers them, so that
  records that share a caption get different images.
  """

  EXPECTED = 'an image with a caption'

  def __init__(self, model: Any, source: Any, settings: Settings):
    super().__init__(model, source, settings)
    self.read = reader(source, model.image_size)
    self.times: Counter[str] = Counter()  # how often each caption has come up

  def records_per_call(self) -> int:
    return max(1, self.settings.batch_size // self.settings.n)

  def make(self, part: Sequence[Record], size: int) -> list[Result]:
    s, first = self.settings, []
    for caption in (r.captions[0] for r in part):
      first.append(self.times[caption] * s.n)
      self.times[caption] += 1
    first += first[-1:] * (size - len(part))
    captions = [r.captions[0] for r in filled(part, size)]
    samples = self.model.sample(captions, s.n, s.seed, first=first, batch_size=s.batch_size, **s.sampling)
    return [self.result(record, sample) for record, sample in zip(part, samples, strict=False)]

  def result(self, record: Record, sample: Any) -> Result:
    images = sample.images[:1]
    row = self.name(record) | {'caption': record.captions[0], 'candidate': int(sample.candidates[0])}
    if sample.scores is not None:
      row['clip_score'] = round(float(sample.scores[0]), 4)
    if self.read:
      row['right'] = self.read(record.index, images)[0]
    labels = record.arrays.get('labels')
    return Result(images, record.arrays['image'][None], [row], None if labels is None else labels[None])

  def grid(self) -> Image.Image:
    return caption_grid([(r.captions[0], [x.true[0], x.drawn[0]]) for r, x in self.shown], ['true', 'drawn'])
