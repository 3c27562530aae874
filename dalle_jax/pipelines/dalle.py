"""Pictures from captions by a trained DALL-E: `DallE.load('runs/mine').sample(['a red circle'], n=8, seed=0)`."""

import contextlib
import dataclasses
import functools
import logging
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from dalle_jax.data import ops
from dalle_jax.data.bpe import BPE, TextEncoder
from dalle_jax.functional import decoding
from dalle_jax.functional.decoding import Sampling
from dalle_jax.functional.pixels import to_float, to_uint8
from dalle_jax.models import dalle, vqgan
from dalle_jax.pipelines.rerank import Reranker, in_batches
from dalle_jax.training import checkpoint, sharding

logger = logging.getLogger(__name__)
BATCH = 64  # pictures at once through the VQGAN


@dataclasses.dataclass(frozen=True)
class Sample:
  """The pictures of one prompt, best first where there is a CLIP.

  Attributes:
    images: uint8[n, H, W, 3].
    tokens: int32[n, I], their image tokens.
    candidates: int[n], the number of each: with the seed and the prompt it determines the picture.
    scores: float32[n], cosines by CLIP; None without one.
  """

  prompt: str
  images: np.ndarray
  tokens: np.ndarray
  candidates: np.ndarray
  scores: np.ndarray | None


class DallE:
  """A trained DALL-E with its VQGAN, its tokenizer and, if wanted, a CLIP that ranks what it draws."""

  def __init__(
    self,
    run: checkpoint.Run,
    vqgan_run: checkpoint.Run,
    reranker: Reranker | None = None,
    mesh: Mesh | None = None,
    rules: sharding.Rules = (),
  ):
    config = run.config
    self.config, self.reranker, self.mesh, self.rules = config, reranker, mesh, rules
    self.words = TextEncoder(BPE(run.tokenizer), config['tokenizer']['length'])
    self.vqgan = vqgan.build(**vqgan_run.config['model'])
    self.image_size = config['data']['image_size']
    text = dict(text_vocab=self.words.bpe.vocab_size + self.words.length, text_length=self.words.length)
    image = dict(image_vocab=self.vqgan.num_codes, grid=self.vqgan.grid(self.image_size))
    self.model = dalle.build(**{**config['model'], **text, **image})
    self.params = {'dalle': run.network('dalle'), 'vqgan': vqgan_run.network('vqgan')}
    self._draw = jax.jit(self._draw_tokens_and_pixels, static_argnames='sampling')
    self._encode, self._decode = jax.jit(self._encode_images), jax.jit(self._decode_codes)

  @classmethod
  def load(
    cls,
    path: str | Path,
    *,
    clip: str | Path = '',
    mesh: Mesh | None = None,
    rules: sharding.Rules = (),
    step: int | None = None,
  ) -> 'DallE':
    """Loads the run in `path` (its EMA if it has one) and, with `clip`, the run of a CLIP.

    Any checkpoint loads onto any mesh: with `mesh` parameters and pictures are split over it by `rules`;
    without it everything is on one device. Raises FileNotFoundError when there is no checkpoint
    (of that `step`), ValueError when a run is of another kind.
    """
    run = checkpoint.load_run(path, mesh=mesh, rules=rules, step=step)
    if run.config.get('objective') != 'dalle' or not run.tokenizer or 'vqgan' not in run.frozen:
      raise ValueError(
        f'{path} is a run of {run.config.get("objective")!r}; sampling needs one of the objective dalle.'
      )
    frozen = checkpoint.load_run(run.frozen['vqgan'], mesh=mesh, rules=rules)
    reranker = Reranker.load(clip, mesh=mesh, rules=rules) if clip else None
    return cls(run, frozen, reranker, mesh, rules)

  def sample(
    self,
    prompts: Sequence[str],
    n: int = 1,
    seed: int = 0,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance: float = 1.0,
    init_image: Any = None,
    keep_rows: int = 0,
    batch_size: int = 64,
  ) -> list[Sample]:
    """Draws `n` pictures for each prompt.

    A picture is a function of (prompt, seed, its number in [0, n)), whatever else is asked for beside it.

    Args:
      temperature, top_k, top_p, guidance: see `functional.decoding.Sampling`. Guidance above 1 needs a model trained
        with loss.caption_dropout.
      init_image: a picture to complete (a path, bytes, PIL image or uint8[H, W, 3]), cropped to the model's size, of
        which the top `keep_rows` rows of image tokens are kept.
      batch_size: pictures at once.

    Raises ValueError for arguments out of range.
    """
    if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
      raise ValueError('prompts must be a list of strings, e.g. ["a red circle"].')
    if not len(prompts):
      raise ValueError('there are no prompts; give at least one.')
    if n < 1 or batch_size < 1:
      raise ValueError(f'n is {n} and batch_size {batch_size}; both must be 1 or more.')
    if not 0 <= seed < 2**32:
      raise ValueError(f'seed is {seed}; expected 0 to {2**32 - 1}.')
    sampling = Sampling(temperature, top_k, top_p, guidance)
    given = self._given(init_image, keep_rows)
    text = np.stack([self._text(p) for p in prompts])
    h, w = self.model.grid
    images = np.zeros((len(prompts), n, self.image_size, self.image_size, 3), np.uint8)
    tokens = np.zeros((len(prompts), n, h * w), np.int32)
    shards = sharding.batch_shards(self.mesh) if self.mesh else 1
    each, together = min(n, batch_size), min(max(1, batch_size // n), len(prompts))  # candidates, prompts of one call
    together = -(-together // shards) * shards
    names = np.array([zlib.crc32(p.encode()) for p in prompts], np.uint32)
    with self._context():
      for first in range(0, n, each):
        for start in range(0, len(prompts), together):
          rows = np.minimum(np.arange(start, start + together), len(prompts) - 1)  # the last call repeats the last one
          batch = {'text': text[rows], 'image': np.tile(given, (together, 1)), 'name': names[rows]}
          numbers = np.arange(first, first + each)
          pictures, codes = self._draw(self.params, self._put(batch), np.uint32(seed), numbers, sampling=sampling)
          images[rows, first : first + each] = np.asarray(pictures)[:, : n - first]
          tokens[rows, first : first + each] = np.asarray(codes)[:, : n - first]
      scores = self.reranker.scores(prompts, images) if self.reranker else None
    results = []
    for i, prompt in enumerate(prompts):
      order = np.arange(n) if scores is None else np.argsort(-scores[i], kind='stable')
      ranked = None if scores is None else scores[i, order]
      results.append(Sample(prompt, images[i, order], tokens[i, order], order, ranked))
    return results

  def encode(self, images: np.ndarray) -> np.ndarray:
    """uint8[B, H, W, 3] of the model's size -> image tokens int32[B, I]."""
    with self._context():
      return in_batches(lambda x: self._encode(self.params, x), self._checked(images), BATCH)

  def reconstruct(self, images: np.ndarray) -> np.ndarray:
    """uint8[B, H, W, 3] through the image tokens and back: uint8[B, H, W, 3]."""
    with self._context():
      return in_batches(lambda x: self._decode(self.params, self._encode(self.params, x)), self._checked(images), BATCH)

  # --- Under jit

  def _draw_tokens_and_pixels(
    self, params: Any, batch: dict[str, jax.Array], seed: jax.Array, numbers: jax.Array, *, sampling: Sampling
  ) -> tuple[jax.Array, jax.Array]:
    """uint8[B, n, H, W, 3] and int32[B, n, I] for the candidates with these numbers."""
    key = jax.random.key(seed)
    pair = lambda name, number: jax.random.fold_in(jax.random.fold_in(key, name), number)
    keys = jax.vmap(lambda name: jax.vmap(lambda number: pair(name, number))(numbers))(batch['name'])
    tokens = decoding.sample(
      functools.partial(self.model.apply, {'params': params['dalle']}),
      batch['text'],
      batch['image'],
      keys.ravel(),
      empty=self.model.padding,
      length=self.model.image_length,
      n=len(numbers),
      sampling=sampling,
    )
    images = self._decode_codes(params, tokens)
    n = len(numbers)
    return images.reshape(-1, n, *images.shape[1:]), tokens.reshape(-1, n, tokens.shape[-1])

  def _decode_codes(self, params: Any, tokens: jax.Array) -> jax.Array:
    codes = tokens.reshape(-1, *self.model.grid)
    return to_uint8(self.vqgan.apply({'params': params['vqgan']}, codes, method='decode_codes'))

  def _encode_images(self, params: Any, images: jax.Array) -> jax.Array:
    codes = self.vqgan.apply({'params': params['vqgan']}, to_float(images), method='encode')
    return codes.reshape(len(images), -1)

  # --- On the host

  def _text(self, prompt: str) -> np.ndarray:
    count, length = len(self.words.bpe.encode(prompt)), self.words.length
    if count > length:
      logger.warning('the prompt %r has %d tokens; the model reads the first %d.', prompt, count, length)
    return self.words(prompt)

  def _given(self, init_image: Any, keep_rows: int) -> np.ndarray:
    """The image tokens to start from, int32[1, k]."""
    h, w = self.model.grid
    if init_image is None and not keep_rows:
      return np.zeros((1, 0), np.int32)
    if init_image is None or not 0 < keep_rows < h:
      raise ValueError(f'keep_rows is {keep_rows}; with an init_image it must be 1 to {h - 1} rows of {h}, else 0.')
    if isinstance(init_image, (str, Path)):
      if not Path(init_image).is_file():
        raise FileNotFoundError(f'there is no picture {init_image}.')
      init_image = Path(init_image).read_bytes()
    try:
      picture = ops.to_rgb(init_image)
    except Exception as e:  # what a broken file makes Pillow raise has no common class
      raise ValueError(f'init_image is no picture that can be read: {" ".join(str(e).split())}') from e
    return self.encode(ops.crop(picture, self.image_size, (), None)[None])[:, : keep_rows * w]

  def _checked(self, images: np.ndarray) -> np.ndarray:
    size = self.image_size
    if images.dtype != np.uint8 or images.shape[1:] != (size, size, 3):
      raise ValueError(f'pictures are {images.dtype}{list(images.shape)}; expected uint8[B, {size}, {size}, 3].')
    return images

  def _put(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    return sharding.put_batch(batch, self.mesh) if self.mesh else batch

  def _context(self) -> contextlib.AbstractContextManager:
    """The mesh and rules that the layers see."""
    if self.mesh is None:
      return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    stack.enter_context(jax.set_mesh(self.mesh))
    stack.enter_context(nn.logical_axis_rules(sharding.logical_rules(self.rules)))
    return stack
