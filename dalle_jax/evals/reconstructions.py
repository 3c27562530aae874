"""Images of a held-out split, encoded to image tokens and decoded again."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from dalle_jax.evals.evaluation import ImageEvaluation, Record, Result, Settings, filled
from dalle_jax.evals.oracle import reader
from dalle_jax.evals.pictures import grid
from dalle_jax.functional.pixels import to_float
from dalle_jax.models import lpips
from dalle_jax.pipelines.grids import CELL
from dalle_jax.training import sharding

LPIPS_BATCH = 16  # pairs of images through LPIPS at once


class Reconstructions(ImageEvaluation):
  """The reconstruction of every image, by the pipeline of an image tokenizer.

  The PSNR of an image is in decibels, its L1 the mean absolute difference of pixels in [-1, 1], as in training; 'lpips'
  needs `settings.lpips`. 'codes_used' is the share of all codes that came up, 'codes_perplexity' the perplexity of
  their frequencies.
  """

  EXPECTED = 'an image'
  CAPTIONS = False

  def __init__(self, model: Any, source: Any, settings: Settings):
    super().__init__(model, source, settings)
    self.read = reader(source, model.image_size)
    self.counts = np.zeros(model.num_codes, np.int64)
    self.distance = None
    if run := settings.lpips:
      distances = sharding.program(lpips_of_pairs, lpips.build(**run.config['model']), mesh=model.mesh)
      self.distance = functools.partial(distances, run.network('lpips'))

  def records_per_call(self) -> int:
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
      if self.read:
        row['right'] = self.read(record.index, drawn[i : i + 1])[0]
      labels = record.arrays.get('labels')
      results.append(Result(drawn[i : i + 1], true[i : i + 1], [row], None if labels is None else labels[None]))
    return results

  def grid(self) -> Image.Image:
    pairs = np.concatenate([images for _, result in self.shown for images in (result.true, result.drawn)])
    scale = max(1, -(-CELL // pairs.shape[1]))
    return Image.fromarray(grid(pairs.repeat(scale, 1).repeat(scale, 2), 6))

  def metrics(self) -> dict[str, Any]:
    """Also the use of the codes, and the checkpoint of the LPIPS."""
    share = self.counts[self.counts > 0] / self.counts.sum()
    result = super().metrics() | {
      'codes_used': float((self.counts > 0).mean()),
      'codes_perplexity': float(np.exp(-(share * np.log(share)).sum())),
    }
    if run := self.settings.lpips:
      result['lpips_network'] = {'run': run.path, 'step': run.step}
    return result


def psnr(squares: np.ndarray) -> np.ndarray:
  """Decibels for mean squared errors of pixels in [0, 255]; at most 100, which is that of equal images."""
  return 10 * np.log10(255.0**2 / np.maximum(squares, 255.0**2 * 1e-10))


@jax.default_matmul_precision('highest')  # see fid.FeatureExtractor
def lpips_of_pairs(network: lpips.LPIPS, params: Any, true: jax.Array, drawn: jax.Array) -> jax.Array:
  """Distances float32[B] between images uint8[B, H, W, 3], a few at a time; under jit."""
  one = lambda pair: network.apply({'params': params}, *(to_float(x)[None] for x in pair))[0]
  return jax.lax.map(one, (true, drawn), batch_size=LPIPS_BATCH)
