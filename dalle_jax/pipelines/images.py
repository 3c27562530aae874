"""Images for independent requests, in calls of few sizes: what DallE and UnCLIP share."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dalle_jax.pipelines.checks import check_numbers
from dalle_jax.pipelines.generator import Generator, plan_calls
from dalle_jax.training import sharding


@dataclasses.dataclass(frozen=True)
class Sample:
  """The images for one prompt, best first if there is a CLIP that ranks.

  Attributes:
    images: uint8[n, H, W, 3].
    candidates: int[n], the number of each image, which determines it together with the prompt and the seed.
    tokens: int32[n, I], their image tokens; None for models without.
    scores: float32[n], cosine similarities by CLIP; None without a CLIP.
  """

  prompt: str
  images: np.ndarray
  candidates: np.ndarray
  tokens: np.ndarray | None = None
  scores: np.ndarray | None = None


Call = Callable[[dict[str, Any], np.uint32], tuple[jax.Array, jax.Array | None]]


class ImageGenerator(Generator):
  """A generator whose images are functions of (request, seed, number), whatever else is requested in the same call."""

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
    """For each request, `n` images, their tokens or None, and their numbers.

    Args:
      names: what identifies each request, so that its noise depends on it.
      rows: arrays of the requests, [len(names), ...].
      call: ({**rows, name uint32[B], number int32[B, k]}, seed) -> images uint8[B, k, H, W, 3], their tokens or None.
      first: the number of the first image, for all requests or for each; the others follow it.
      batch_size: images at once.

    Raises ValueError for arguments out of range.
    """
    check_numbers(n, batch_size, seed)
    count = len(names)
    firsts = np.full(count, first) if np.ndim(first) == 0 else np.asarray(first)
    if firsts.shape != (count,) or firsts.dtype.kind not in 'iu' or not 0 <= firsts.min() <= firsts.max() < 2**30:
      raise ValueError(f'first is {first}; expected a number of 0 or more, or one for each of {count} prompts.')
    shards = sharding.batch_shards(self.mesh) if self.mesh else 1
    requests, numbers = plan_calls(count, n, batch_size, shards)
    hashes = np.array([zlib.crc32(name) for name in names], np.uint32)
    results: dict[str, np.ndarray] = {}
    with sharding.within(self.mesh, self.rules):
      for chosen, number in zip(requests, numbers, strict=True):
        batch = {k: v[chosen] for k, v in rows.items()} | {'name': hashes[chosen]}
        batch['number'] = (firsts[chosen, None] + number).astype(np.int32)
        images, tokens = call(self._put(batch), np.uint32(seed))
        for name, value in (('images', images), ('tokens', tokens)):
          if value is not None:
            whole = results.setdefault(name, np.zeros((count, numbers.max() + 1, *value.shape[2:]), value.dtype))
            whole[chosen[:, None], number] = np.asarray(value)
    all_tokens = results['tokens'][:, :n] if 'tokens' in results else [None] * count
    return [(results['images'][i, :n], all_tokens[i], firsts[i] + np.arange(n)) for i in range(count)]

  def _ranked(
    self, prompts: Sequence[str], results: Sequence[tuple[np.ndarray, np.ndarray | None, np.ndarray]]
  ) -> list[Sample]:
    """Samples from what `_generate` returns, ranked if there is a CLIP."""
    if not self.reranker:
      return [Sample(p, images, numbers, tokens) for p, (images, tokens, numbers) in zip(prompts, results, strict=True)]
    samples = []
    all_scores = self.reranker.scores(prompts, np.stack([images for images, _, _ in results]))
    for prompt, (images, tokens, numbers), scores in zip(prompts, results, all_scores, strict=True):
      order = np.argsort(-scores, kind='stable')
      ranked = None if tokens is None else tokens[order]
      samples.append(Sample(prompt, images[order], numbers[order], ranked, scores[order]))
    return samples
