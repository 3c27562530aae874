"""Which picture fits a caption best, by a trained CLIP (Ramesh et al., 2021, section 2.6)."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dalle_jax.data.bpe import TextEncoder, text_encoder
from dalle_jax.functional.pixels import resized, to_float
from dalle_jax.models import clip
from dalle_jax.training import checkpoint, sharding

BATCH = 256  # pictures at once


class Reranker:
  """A CLIP with its tokenizer; `Reranker.load(run)`."""

  def __init__(self, model: clip.CLIP, params: Any, encode_text: TextEncoder, mesh: Mesh | None = None):
    self.model, self.params, self.encode_text = model, params, encode_text
    apply = lambda params, x, method: model.apply({'params': params}, x, method=method)
    jit = functools.partial(jax.jit, out_shardings=sharding.whole(mesh))
    self._text = jit(functools.partial(apply, method='encode_text'))
    side = model.side
    sized = lambda images: resized(to_float(images), side)
    self._image = jit(lambda params, images: apply(params, sized(images), method='encode_image'))

  @classmethod
  def load(cls, path: str | Path, *, mesh: Mesh | None = None, rules: sharding.Rules = ()) -> 'Reranker':
    """Loads a run of the objective clip. Raises FileNotFoundError without checkpoints, ValueError for another run."""
    run = checkpoint.load_run(path, mesh=mesh, rules=rules)
    if run.config.get('objective') != 'clip' or not run.tokenizer:
      raise ValueError(
        f'{path} is a run of {run.config.get("objective")!r}; reranking needs one of the objective clip.'
      )
    words = text_encoder(run.tokenizer, run.config['tokenizer'])
    return cls(clip.of_run(run.config), run.network('clip'), words, mesh)

  def scores(self, prompts: Sequence[str], images: np.ndarray) -> np.ndarray:
    """Cosines float32[B, n] between each of B prompts and its n pictures, uint8[B, n, H, W, 3]."""
    if images.ndim != 5 or len(images) != len(prompts) or images.dtype != np.uint8:
      raise ValueError(
        f'pictures are {images.dtype}{list(images.shape)} for {len(prompts)} prompts; expected uint8[B, n, H, W, 3].'
      )
    text = np.stack([self.encode_text(p) for p in prompts])
    texts = in_batches(lambda x: self._text(self.params, x), text, BATCH)
    flat = images.reshape(-1, *images.shape[2:])
    pictures = in_batches(lambda x: self._image(self.params, x), flat, BATCH)
    return np.einsum('be,bne->bn', texts, pictures.reshape(*images.shape[:2], -1))


def in_batches(function: Any, rows: np.ndarray, batch: int) -> np.ndarray:
  """`function` over the rows, at most `batch` at a time and always as many, so that it compiles once."""
  batch = min(batch, len(rows))
  results = []
  for start in range(0, len(rows), batch):
    part = rows[start : start + batch]
    filled = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
    results.append(np.asarray(function(filled))[: len(part)])
  return np.concatenate(results)
