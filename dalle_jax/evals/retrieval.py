"""How well a CLIP finds the image of a caption, and the caption of an image, among those of a held-out split."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dalle_jax.evals.evaluation import SHOWN, Evaluation, Record, Settings, filled
from dalle_jax.pipelines.grids import caption_grid

RECALLS = (1, 5, 10)  # K of R@K
NEAREST = 5  # images per caption in predictions.json and grid.png
BLOCK = 1024  # queries whose similarities to all records are in memory at once


class Retrieval(Evaluation):
  """Text-to-image and image-to-text recall of a CLIP, by a pipeline that has `encode_prompts` and `encode_images`.

  Each record is one image and its first caption: one query in each direction, among all evaluated records. Records
  with the same caption text count as correct for each other. R@K is the share of queries with a correct record among
  the K with the highest cosine similarity; wrong records that tie with it count as more similar.
  """

  EXPECTED = 'an image with a caption'

  def __init__(self, model: Any, source: Any, settings: Settings):
    super().__init__(model, source, settings)
    self.images: list[np.ndarray] = []  # embeddings, a batch each
    self.texts: list[np.ndarray] = []

  def records_per_call(self) -> int:
    return self.settings.batch_size

  def evaluate(self, part: Sequence[Record], size: int, out: Path) -> None:
    records = filled(part, size)
    images = self.model.encode_images(np.stack([r.arrays['image'] for r in records]))
    texts = self.model.encode_prompts([r.captions[0] for r in records])
    self.images.append(images[: len(part)])
    self.texts.append(texts[: len(part)])
    self.rows += [self.name(r) | {'caption': r.captions[0]} for r in part]

  def finish(self, out: Path) -> None:
    """Adds to each row the similarity of its pair, its ranks and the records whose images are nearest to the caption.

    Raises ValueError for embeddings that are not finite.
    """
    images, texts = np.concatenate(self.images), np.concatenate(self.texts)
    if not (np.isfinite(images).all() and np.isfinite(texts).all()):
      raise ValueError('some embeddings are not finite; the CLIP is damaged.')
    _, captions = np.unique([row['caption'] for row in self.rows], return_inverse=True)
    for start in range(0, len(self.rows), BLOCK):
      block = slice(start, start + BLOCK)
      correct = captions[block, None] == captions
      by_text, by_image = texts[block] @ images.T, images[block] @ texts.T
      text_ranks, image_ranks = ranks(by_text, correct), ranks(by_image, correct)
      nearest = np.argsort(-by_text, axis=1, kind='stable')[:, :NEAREST]
      for i, row in enumerate(self.rows[block]):
        row['clip_score_true'] = round(float(by_text[i, start + i]), 4)
        row['text_to_image_rank'] = int(text_ranks[i])
        row['image_to_text_rank'] = int(image_ranks[i])
        row['nearest_images'] = [self.rows[k]['index'] for k in nearest[i]]

  def grid(self) -> Image.Image:
    """The first captions with their own image and the nearest ones."""
    image = lambda index: self.examples.read(index, None)[0]['image']
    rows = []
    for row in self.rows[:SHOWN]:
      rows.append((row['caption'], [image(index) for index in (row['index'], *row['nearest_images'])]))
    return caption_grid(rows, ['true', *(f'nearest {i + 1}' for i in range(len(rows[0][1]) - 1))])

  def metrics(self) -> dict[str, Any]:
    """Also the number of different captions and R@K in both directions, in [0, 1]."""
    result = super().metrics() | {'captions': len({row['caption'] for row in self.rows})}
    for direction in ('text_to_image', 'image_to_text'):
      found = np.array([row[f'{direction}_rank'] for row in self.rows])
      result |= {f'{direction}_R@{k}': float((found <= k).mean()) for k in RECALLS}
    return result


def ranks(similarity: np.ndarray, correct: np.ndarray) -> np.ndarray:
  """The rank of the best correct item of each query, int[Q], 1 for the first: of float[Q, N] and bool[Q, N].

  Wrong items that tie with it rank before it, so that a model with one embedding for everything finds nothing. Raises
  ValueError for a query without a correct item.
  """
  if similarity.shape != correct.shape or not correct.any(1).all():
    raise ValueError('every query needs a correct item among those that it is compared with.')
  best = np.where(correct, similarity, -np.inf).max(1, keepdims=True)
  return 1 + (~correct & (similarity >= best)).sum(1)
