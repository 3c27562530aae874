"""Scores how well images fit captions with a trained CLIP, to rank samples (Ramesh et al., 2021, section 2.6)."""

import functools
import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dalle_jax.data import ops
from dalle_jax.data.bpe import text_encoder
from dalle_jax.functional.pixels import resized, to_float
from dalle_jax.models import clip
from dalle_jax.pipelines.checks import check_prompts
from dalle_jax.training import checkpoint, sharding


class Reranker:
  """A trained CLIP with its tokenizer: `Reranker.load(run)`."""

  BATCH = 256  # images or captions at once

  def __init__(self, run: checkpoint.Run, mesh: Mesh | None = None, rules: sharding.Rules = ()):
    """Raises ValueError for a CLIP without an image tower."""
    self.config, self.step, self.mesh, self.rules = run.config, run.step, mesh, rules
    self.model, self.params = clip.of_run(run.config), run.network('clip')
    self.image_size = self.model.side
    self._tokenize = text_encoder(run.tokenizer, run.config['tokenizer'])
    program = functools.partial(sharding.program, mesh=mesh, rules=rules)
    self._encode_text, self._encode_images = program(text_embeds, self.model), program(image_embeds, self.model)

  @classmethod
  def load(
    cls, path: str | Path, *, mesh: Mesh | None = None, rules: sharding.Rules = (), step: int | None = None
  ) -> 'Reranker':
    """Loads a run of the objective clip, by default its newest checkpoint.

    Raises FileNotFoundError when there is no checkpoint (of that `step`), ValueError for a run of another objective.
    """
    run = checkpoint.load_run(path, mesh=mesh, rules=rules, step=step)
    if run.config.get('objective') != 'clip':
      found = run.config.get('objective')
      raise ValueError(f'{path} is a run of {found!r}; reranking needs one of the objective clip.')
    if not run.tokenizer:
      raise ValueError(f'{path} has no tokenizer, which reading captions needs; convert it again with one.')
    return cls(run, mesh, rules)

  def scores(self, prompts: Sequence[str], images: np.ndarray) -> np.ndarray:
    """Cosine similarities float32[B, n] between each of B prompts and its n square images, uint8[B, n, S, S, 3].

    Raises ValueError for anything else.
    """
    check_prompts(prompts)
    if not isinstance(images, np.ndarray) or images.ndim != 5 or len(images) != len(prompts) or not images.size:
      given = f'{images.dtype}{list(images.shape)}' if isinstance(images, np.ndarray) else f'a {type(images).__name__}'
      raise ValueError(f'images are {given}; expected uint8[{len(prompts)}, n, S, S, 3], n for each prompt.')
    text_embeds = self.encode_prompts(prompts)
    image_embeds = self.encode_images(images.reshape(-1, *images.shape[2:]))
    return np.einsum('be,bne->bn', text_embeds, image_embeds.reshape(*images.shape[:2], -1))

  def encode_prompts(self, prompts: Sequence[str]) -> np.ndarray:
    """Embeddings float32[B, E] of unit length. Raises ValueError for anything but a list of captions."""
    check_prompts(prompts)
    ids = np.stack([self._tokenize(p) for p in prompts])
    with sharding.within(self.mesh, self.rules):
      return in_batches(lambda x: self._encode_text(self.params, x), ids, self.BATCH)

  def encode_images(self, images: np.ndarray) -> np.ndarray:
    """Square images uint8[B, S, S, 3] of any size -> embeddings float32[B, E] of unit length.

    Raises ValueError for anything else.
    """
    side = images.shape[1] if isinstance(images, np.ndarray) and images.ndim == 4 else self.image_size
    ops.check_images(images, side)
    with sharding.within(self.mesh, self.rules):
      return in_batches(lambda x: self._encode_images(self.params, x), images, self.BATCH)


def text_embeds(model: clip.CLIP, params: Any, ids: jax.Array) -> jax.Array:
  """Captions int32[B, N] -> embeddings float32[B, E] of unit length; under jit."""
  return model.apply({'params': params}, ids, method='encode_text')


def image_embeds(model: clip.CLIP, params: Any, images: jax.Array) -> jax.Array:
  """Square images uint8[B, S, S, 3] of any size -> embeddings float32[B, E] of unit length; under jit."""
  return model.apply({'params': params}, resized(to_float(images), model.side), method='encode_image')


def in_batches(function: Any, rows: np.ndarray, batch: int) -> np.ndarray:
  """`function` of all rows, in calls of one size, at most `batch` rows, so that it compiles once.

  Raises ValueError unless both are 1 or more.
  """
  if not isinstance(batch, numbers.Integral) or batch < 1 or not len(rows):
    raise ValueError(f'batch_size is {batch!r} and there are {len(rows)} inputs; expected whole numbers of 1 or more.')
  batch = min(batch, len(rows))
  results = []
  for start in range(0, len(rows), batch):
    part = rows[start : start + batch]
    filled = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
    results.append(np.asarray(function(filled))[: len(part)])
  return np.concatenate(results)
