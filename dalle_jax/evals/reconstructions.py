"""Pictures of a held-out split through image tokens and back."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from dalle_jax.evals.oracle import reader
from dalle_jax.evals.pictures import grid
from dalle_jax.evals.split import Evaluation, Record, Result, Settings, filled
from dalle_jax.functional.pixels import to_float
from dalle_jax.models import lpips
from dalle_jax.pipelines.grids import CELL
from dalle_jax.training import checkpoint, sharding

SEEN = 16  # pairs of pictures through LPIPS at once


class Reconstructions(Evaluation):
  """Every picture, of a story every frame, by a pipeline of an image tokenizer.

  A picture's PSNR is in decibels, its L1 the mean absolute difference of pixels in [0, 255]; 'lpips' needs `distance`.
  'codes_used' is the share of the tokenizer's codes that came up, 'perplexity' that of their frequencies.
  """

  EXPECTED = 'a picture'

  def __init__(self, model: Any, source: Any, settings: Settings, distance: checkpoint.Run | None = None):
    super().__init__(model, source, settings)
    self.read = reader(source, model.image_size)
    self.counts = np.zeros(model.num_codes, np.int64)
    self.distance = None
    if distance:
      network, params = lpips.build(**distance.config['model']), distance.network('lpips')
      one = lambda params, pair: network.apply({'params': params}, *(to_float(x)[None] for x in pair))[0]
      between = lambda params, *pairs: jax.lax.map(functools.partial(one, params), pairs, batch_size=SEEN)
      self.distance = functools.partial(jax.jit(between, out_shardings=sharding.whole(model.mesh)), params)

  def usable(self, captions: Sequence[str], story: bool) -> bool:
    return True

  def at_once(self) -> int:
    return self.settings.batch_size

  def make(self, part: Sequence[Record], size: int) -> list[Result]:
    true = [np.atleast_1d(r.arrays['image']).reshape(-1, *r.arrays['image'].shape[-3:]) for r in filled(part, size)]
    flat = np.concatenate(true)
    tokens = self.model.encode(flat)
    drawn = self.model.decode(tokens)
    lengths = [len(x) for x in true]
    real = sum(lengths[: len(part)])
    self.counts += np.bincount(tokens[:real].ravel(), minlength=len(self.counts))
    error = drawn.astype(np.float32) - flat
    values = {'l1': np.abs(error).mean((1, 2, 3)), 'psnr': psnr(np.square(error).mean((1, 2, 3)))}
    if self.distance:
      values['lpips'] = np.asarray(self.distance(flat, drawn))
    results, start = [], 0
    for record, pictures in zip(part, true, strict=False):
      where = slice(start, start + len(pictures))
      rows = [self.name(record) | {k: round(float(v), 4) for k, v in zip(values, x, strict=True)}
              for x in zip(*(v[where] for v in values.values()), strict=True)]  # fmt: skip
      if self.read:
        for row, right in zip(rows, self.read(record.index, drawn[where]), strict=True):
          row['right'] = right
      labels = record.arrays.get('labels')
      results.append(Result(drawn[where], pictures, rows, None if labels is None else np.atleast_2d(labels)))
      start = where.stop
    return results

  def grid(self, shown: Sequence[tuple[Record, Result]]) -> Image.Image:
    pairs = np.concatenate([np.stack([x.true, x.drawn], 1).reshape(-1, *x.true.shape[1:]) for _, x in shown])
    times = max(1, -(-CELL // pairs.shape[1]))
    return Image.fromarray(grid(pairs.repeat(times, 1).repeat(times, 2), 6))

  def metrics(self) -> dict[str, Any]:
    share = self.counts[self.counts > 0] / self.counts.sum()
    used = {'codes_used': float((self.counts > 0).mean()), 'perplexity': float(np.exp(-(share * np.log(share)).sum()))}
    return super().metrics() | used


def psnr(squares: np.ndarray) -> np.ndarray:
  """Decibels for mean squared errors of pixels in [0, 255]; at most 100, for equal pictures."""
  return 10 * np.log10(255.0**2 / np.maximum(squares, 255.0**2 * 1e-10))
