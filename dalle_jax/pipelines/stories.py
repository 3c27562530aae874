"""What generators of stories share: many stories in one call, from source frames and captions to frames."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dalle_jax.data import ops
from dalle_jax.data.bpe import TextEncoder, text_encoder
from dalle_jax.functional.decoding import Sampling
from dalle_jax.pipelines.checks import check_numbers, is_list_of_strings
from dalle_jax.pipelines.generator import Generator, plan_calls
from dalle_jax.training import checkpoint, sharding


@dataclasses.dataclass(frozen=True)
class StorySample:
  """A continued story: T frames with n candidates each, best first if there is a CLIP that ranks.

  Attributes:
    captions: T strings.
    source: uint8[H, W, 3], as the model read it.
    frames: uint8[T, n, H, W, 3].
    candidates: int[T, n], the number of each image, which determines it together with the story and the seed.
    scores: float32[T, n], cosine similarities by CLIP; None without a CLIP.
  """

  captions: tuple[str, ...]
  source: np.ndarray
  frames: np.ndarray
  candidates: np.ndarray
  scores: np.ndarray | None


class StoryGenerator(Generator):
  """A generator that continues stories, by at most `model.frames` frames after the source.

  `encode_tower_text` is the tokenizer of a frozen text tower that reads the captions, if there is one. `_draw` is the
  program (params, batch, seed, sampling) -> for each frame the candidates of these numbers, uint8[B, T, n, H, W, 3];
  `batch` has text and what `_inputs` returns, name uint32[B, T] and number int32[B, n].
  """

  model: Any
  encode_tower_text: TextEncoder | None = None
  _draw: Callable[..., jax.Array]

  def continue_story(
    self, source: Any, captions: Sequence[str], n: int = 4, seed: int = 0, *, vectors: Any = None, **options: Any
  ) -> StorySample:
    """Generates `n` candidates for the frame of each caption, all in one batch.

    Args:
      source: the frame to continue from: a path, bytes, PIL image or uint8[H, W, 3]; cropped to the model's size.
      captions: one per frame, at most `model.frames`.
      vectors: float32[T, S], sentence embeddings, for a model trained with sentences='data'.
      options: see `continue_stories`.

    Raises ValueError for arguments that do not fit, FileNotFoundError when the source does not exist.
    """
    if source is None:
      raise ValueError('there is no source frame; give the image that the story continues from.')
    if not is_list_of_strings(captions):
      raise ValueError('captions must be a list of strings, one per frame, e.g. ["pip goes home", "pip sleeps"].')
    if vectors is not None:
      if self.config['model'].get('sentences') != 'data':
        raise ValueError('this model reads no sentence vectors; leave vectors out.')
      vectors = np.asarray(vectors)[None]
    image = ops.open_image(source, self.image_size, 'the source frame')
    (sample,) = self.continue_stories(image[None], [captions], n, seed, vectors=vectors, **options)
    return sample

  def continue_stories(
    self,
    sources: np.ndarray,
    captions: Sequence[Sequence[str]],
    n: int = 1,
    seed: int = 0,
    *,
    vectors: np.ndarray | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance: float = 1.0,
    batch_size: int = 64,
  ) -> list[StorySample]:
    """Continues B stories by T frames each: sources uint8[B, H, W, 3], B x T captions.

    A frame is a function of (captions, source, seed, its number in [0, n)), whatever else is in the same call.

    Args:
      vectors: float32[B, T, S], see `continue_story`; a model that reads none ignores those of the data.
      temperature, top_k, top_p, guidance: see `functional.decoding.Sampling`, and the docstring of the class.
      batch_size: images per call; the frames of a story are never split.

    Raises ValueError for arguments that do not fit.
    """
    check_numbers(n, batch_size, seed)
    sampling = Sampling(temperature, top_k, top_p, guidance)
    self._check(sampling)
    ops.check_images(sources, self.image_size)
    batch = self._batch(sources, captions, None if vectors is None else np.asarray(vectors))
    count, t = batch['name'].shape
    shards = sharding.batch_shards(self.mesh) if self.mesh else 1
    stories, numbers = plan_calls(count, n, max(1, batch_size // t), shards)
    frames = np.zeros((count, t, numbers.max() + 1, *sources.shape[1:]), np.uint8)
    with sharding.within(self.mesh, self.rules):
      for chosen, number in zip(stories, numbers, strict=True):
        part = {k: v[chosen] for k, v in batch.items()} | {'number': number.astype(np.int32)}
        images = self._draw(self.params, self._put(part), np.uint32(seed), sampling=sampling)
        frames[chosen[:, None], :, number] = np.asarray(images).swapaxes(1, 2)
      frames = frames[:, :, :n]
      order = np.broadcast_to(np.arange(n), (count, t, n))
      scores = None
      if self.reranker:
        flat = self.reranker.scores([c for story in captions for c in story], frames.reshape(-1, *frames.shape[2:]))
        scores = flat.reshape(count, t, n)
        order = np.argsort(-scores, axis=2, kind='stable')
        scores = np.take_along_axis(scores, order, 2)
        frames = np.take_along_axis(frames, order[..., None, None, None], 2)
    all_scores = [None] * count if scores is None else scores
    return [StorySample(tuple(captions[i]), sources[i], frames[i], order[i], all_scores[i]) for i in range(count)]

  def _batch(
    self, sources: np.ndarray, captions: Sequence[Sequence[str]], vectors: np.ndarray | None
  ) -> dict[str, np.ndarray]:
    if not isinstance(captions, (Sequence, np.ndarray)) or not all(map(is_list_of_strings, captions)):
      raise ValueError('captions must be a list of lists of strings, one per frame of each story.')
    most, t = self.model.frames, len(captions[0]) if len(captions) else 0
    if len(sources) != len(captions) or not len(captions):
      raise ValueError(f'there are {len(sources)} source frames for {len(captions)} stories; expected one per story.')
    if not 1 <= t <= most or any(len(story) != t for story in captions):
      counts = sorted({len(story) for story in captions})
      raise ValueError(
        f'a story has {counts} captions; this model takes 1 to {most}, the same number for all stories of a call.'
      )
    if any(not c.strip() for story in captions for c in story):
      raise ValueError('a caption is empty; every frame after the source needs one.')
    text = np.stack([[self._text(c) for c in story] for story in captions])  # which refuses lone surrogates
    names = [[zlib.crc32('\n'.join([*story, str(i)]).encode()) for i in range(t)] for story in captions]
    return {'text': text, 'name': np.array(names, np.uint32), **self._inputs(sources, captions, vectors)}

  def _add_tower(self, frozen: Mapping[str, checkpoint.Run], name: str) -> checkpoint.Run:
    """Adds the frozen text tower of that name, which reads the captions, and returns its run.

    Raises ValueError when it has no tokenizer.
    """
    run = frozen[name]
    if not run.tokenizer:
      raise ValueError(f'{run.path} has no tokenizer, which reading captions needs; convert it again with one.')
    self.params['tower'] = run.network(name)
    self.encode_tower_text = text_encoder(run.tokenizer, run.config['tokenizer'])
    return run

  def _tower_text(self, captions: Sequence[Sequence[str]]) -> np.ndarray:
    """The captions as the tower reads them, int32[B, T, N]."""
    return np.stack([[self.encode_tower_text(c) for c in story] for story in captions])

  def _check(self, sampling: Sampling) -> None:
    """Raises ValueError for sampling options that the network does not have."""

  def _inputs(
    self, sources: np.ndarray, captions: Sequence[Sequence[str]], vectors: np.ndarray | None
  ) -> dict[str, np.ndarray]:
    """What the network reads in addition to the tokens of the captions, one row per story."""
    raise NotImplementedError
