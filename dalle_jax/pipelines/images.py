"""Pictures for requests that do not know of each other, in calls of few sizes: what DallE and UnCLIP share."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dalle_jax.pipelines.generator import Generator, check_numbers, in_one_call
from dalle_jax.training import sharding


@dataclasses.dataclass(frozen=True)
class Sample:
  """The pictures of one prompt, best first where there is a CLIP that ranks.

  Attributes:
    images: uint8[n, H, W, 3].
    candidates: int[n], the number of each: with the seed and the prompt it determines the picture.
    tokens: int32[n, I], their image tokens; None where there are none.
    scores: float32[n], cosines by CLIP; None without one.
  """

  prompt: str
  images: np.ndarray
  candidates: np.ndarray
  tokens: np.ndarray | None = None
  scores: np.ndarray | None = None


Call = Callable[[dict[str, Any], np.uint32], tuple[jax.Array, jax.Array | None]]


class ImageGenerator(Generator):
  """One whose pictures are functions of (what is asked for, seed, their number), whatever is asked for beside it."""

  def _generate(
    self,
    names: Sequence[bytes],
    rows: Mapping[str, np.ndarray],
    call: Call,
    *,
    n: int,
    seed: int,
    first: int | Sequence[int],
    batch_size: int,
  ) -> list[tuple[np.ndarray, np.ndarray | None, np.ndarray]]:
    """Of each request: `n` pictures, their tokens, their numbers.

    Args:
      names: what is asked for, as far as it decides on noise.
      rows: arrays of the requests, [len(names), ...].
      call: ({**rows, name uint32[B], number int32[B, k]}, seed) -> pictures uint8[B, k, H, W, 3], their tokens or None.
      first: the number of the first picture, of all or of each; the others follow it.
      batch_size: pictures at once.

    Raises ValueError for arguments out of range.
    """
    check_numbers(n, batch_size, seed)
    begins, count = np.full(len(names), first) if np.ndim(first) == 0 else np.asarray(first), len(names)
    if begins.shape != (count,) or begins.dtype.kind not in 'iu' or not 0 <= begins.min() <= begins.max() < 2**30:
      raise ValueError(f'first is {first}; expected a number of 0 or more, or one for each of {count} prompts.')
    shards = sharding.batch_shards(self.mesh) if self.mesh else 1
    each, together = min(n, batch_size), in_one_call(count, batch_size // n, shards)  # candidates, requests
    numbers = np.array([zlib.crc32(name) for name in names], np.uint32)
    drawn: dict[str, np.ndarray] = {}
    with sharding.within(self.mesh, self.rules):
      for done in range(0, n, each):
        for start in range(0, count, together):
          chosen = np.minimum(np.arange(start, start + together), count - 1)  # the last call repeats the last one
          batch = {k: v[chosen] for k, v in rows.items()} | {'name': numbers[chosen]}
          batch['number'] = (begins[chosen, None] + np.arange(done, done + each)).astype(np.int32)
          images, tokens = call(self._put(batch), np.uint32(seed))
          for name, value in (('images', images), ('tokens', tokens)):
            if value is not None:
              whole = drawn.setdefault(name, np.zeros((count, n, *value.shape[2:]), value.dtype))
              whole[chosen, done : done + each] = np.asarray(value)[:, : n - done]
    tokens = drawn.get('tokens')
    return [(drawn['images'][i], None if tokens is None else tokens[i], begins[i] + np.arange(n)) for i in range(count)]

  def _ranked(
    self, prompts: Sequence[str], drawn: Sequence[tuple[np.ndarray, np.ndarray | None, np.ndarray]]
  ) -> list[Sample]:
    """With the CLIP that ranks, if there is one."""
    scores = self.reranker.scores(prompts, np.stack([images for images, _, _ in drawn])) if self.reranker else None
    results = []
    for i, (prompt, (images, tokens, numbers)) in enumerate(zip(prompts, drawn, strict=True)):
      order = np.arange(len(images)) if scores is None else np.argsort(-scores[i], kind='stable')
      ranked = None if scores is None else scores[i, order]
      results.append(Sample(prompt, images[order], numbers[order], None if tokens is None else tokens[order], ranked))
    return results


def check_prompts(prompts: Sequence[str]) -> None:
  """Raises ValueError for what is no list of captions."""
  if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
    raise ValueError('prompts must be a list of strings, e.g. ["a red circle"].')
  if not len(prompts):
    raise ValueError('there are no prompts; give at least one.')
