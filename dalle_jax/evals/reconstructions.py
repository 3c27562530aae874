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
  """Every picture, by the pipeline of an image tokenizer.

  A picture's PSNR is in decibels, its L1 the mean absolute difference of pixels in [-1, 1], as in training; 'lpips'
  needs `distance`. 'codes_used' is the share of all codes that came up, 'codes_perplexity' that of their frequencies.
  """

  EXPECTED = 'a picture'

  def __init__(self, model: Any, source: Any, settings: Settings, distance: checkpoint.Run | None = None):
    super().__init__(model, source, settings)
    self.read = reader(source, model.image_size)
    self.counts = np.zeros(model.num_codes, np.int64)
    self.distance, self.distance_of = None, distance
    if distance:
      network, params = lpips.build(**distance.config['model']), distance.network('lpips')
      one = lambda params, pair: network.apply({'params': params}, *(to_float(x)[None] for x in pair))[0]
      one = jax.default_matmul_precision('highest')(one)  # see fid.FeatureExtractor
      between = lambda params, *pairs: jax.lax.map(functools.partial(one, params), pairs, batch_size=SEEN)
      self.distance = functools.partial(jax.jit(between, out_shardings=sharding.whole(model.mesh)), params)

  def usable(self, captions: Sequence[str]) -> bool:
    return True

  def at_once(self) -> int:
    return self.settings.batch_size

  def make(self, part: Sequence[Record], size: int) -> list[Result]:
    true = np.stack([r.arrays['image'] for r in filled(part, size)])
    tokens = self.model.encode(true, self.settings.batch_size)
    drawn = self.model.decode(tokens, self.settings.batch_size)
    self.counts += np.bincount(tokens[: len(part)].ravel(), minlength=len(self.counts))
    error = drawn.astype(np.float32) - true
    values = {'l1': np.abs(error).mean((1, 2, 3)) / 127.5, 'psnr': psnr(np.square(error).mean((1, 2, 3)))}
    if self.distance:
      values['lpips'] = np.asarray(self.distance(true, drawn))
    results = []
    for i, record in enumerate(part):
      row = self.name(record) | {name: round(float(v[i]), 4) for name, v in values.items()}
      row |= {} if self.read is None else {'right': self.read(record.index, drawn[i : i + 1])[0]}
      labels = record.arrays.get('labels')
      results.append(Result(drawn[i : i + 1], true[i : i + 1], [row], None if labels is None else labels[None]))
    return results

  def grid(self, shown: Sequence[tuple[Record, Result]]) -> Image.Image:
    pairs = np.concatenate([y for _, x in shown for y in (x.true, x.drawn)])
    times = max(1, -(-CELL // pairs.shape[1]))
    return Image.fromarray(grid(pairs.repeat(times, 1).repeat(times, 2), 6))

  def metrics(self) -> dict[str, Any]:
    share = self.counts[self.counts > 0] / self.counts.sum()
    used = {
      'codes_used': float((self.counts > 0).mean()),
      'codes_perplexity': float(np.exp(-(share * np.log(share)).sum())),
    }
    by = {'run': self.distance_of.path, 'step': self.distance_of.step} if self.distance_of else None
    return super().metrics() | used | ({'lpips_network': by} if by else {})


def psnr(squares: np.ndarray) -> np.ndarray:
  """Decibels for mean squared errors of pixels in [0, 255]; at most 100, for equal pictures."""
  return 10 * np.log10(255.0**2 / np.maximum(squares, 255.0**2 * 1e-10))
