"""Images from captions by a trained DALL-E: `DallE.load('runs/mine').sample(['a red circle'], n=8, seed=0)`."""

import functools
import numbers
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.data import ops
from dalle_jax.functional import decoding
from dalle_jax.functional.decoding import Sampling
from dalle_jax.models import dalle, image_tokenizer
from dalle_jax.pipelines.checks import check_numbers, check_prompts
from dalle_jax.pipelines.generator import Setup, TokenGenerator, request_keys, rows_per_call
from dalle_jax.pipelines.image_tokenizer import decode_codes
from dalle_jax.pipelines.images import ImageGenerator, Sample
from dalle_jax.training import checkpoint, sharding


class DallE(TokenGenerator, ImageGenerator):
  """A trained DALL-E with its VQGAN, its tokenizer and, optionally, a CLIP that ranks the images."""

  OBJECTIVE = 'dalle'

  def __init__(self, run: checkpoint.Run, frozen: Mapping[str, checkpoint.Run], setup: Setup | None = None):
    super().__init__(run, frozen, setup)
    self.model = self._network()
    self._prepare_params(self.model.dtype)
    self._draw = self._program(draw, self.model, self.vqgan.network)
    self._complete = self._program(complete, self.model, self.config['tokenizer'].get('end', -1))

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
    first: int | Sequence[int] = 0,
    init_image: Any = None,
    keep_rows: int = 0,
    batch_size: int = 64,
  ) -> list[Sample]:
    """Generates `n` images for each prompt.

    An image is a function of (prompt, seed, its number), whatever else is requested in the same call.

    Args:
      temperature, top_k, top_p, guidance: see `functional.decoding.Sampling`. Guidance above 1 needs a model trained
        with loss.caption_dropout.
      first: the number of the first image, for all prompts or for each; the others follow it.
      init_image: an image to complete (a path, bytes, PIL image or uint8[H, W, 3]), cropped to the model's size, of
        which the top `keep_rows` rows of image tokens are kept.
      batch_size: images per call.

    Raises ValueError for arguments out of range.
    """
    check_prompts(prompts)
    sampling = Sampling(temperature, top_k, top_p, guidance)
    prefix = self._prefix(init_image, keep_rows)
    text = np.stack([self._text(p) for p in prompts])
    rows = {'text': text, 'image': np.tile(prefix, (len(prompts), 1))}
    call = lambda batch, seed: self._draw(self.params, batch, seed, sampling=sampling)
    request = dict(n=n, seed=seed, first=first, batch_size=batch_size)
    return self._ranked(prompts, self._generate([p.encode() for p in prompts], rows, call, **request))

  def complete_captions(
    self,
    prompts: Sequence[str],
    n: int = 1,
    seed: int = 0,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    batch_size: int = 64,
  ) -> list[list[str]]:
    """Completes each prompt to `n` captions, in the style of the captions that the model was trained on.

    A caption is a function of (prompt, seed, its number); for the arguments see `sample`. Raises ValueError for
    arguments out of range, and for an empty prompt where the model needs a first token.
    """
    check_prompts(prompts)
    check_numbers(n, batch_size, seed)
    sampling, settings = Sampling(temperature, top_k, top_p), self.config['tokenizer']
    given = [(settings.get('start', -1) >= 0) + len(self.encode_text.bpe.encode(p)) for p in prompts]
    if not min(given) and not dalle.LAYOUTS[self.model.layout].start:
      raise ValueError('this model does not predict the first token of a caption; give at least one word.')
    rows = {
      'text': np.stack([self._text(p) for p in prompts]),
      'length': np.minimum(given, self.model.text_length).astype(np.int32),
      'name': np.array([zlib.crc32(p.encode()) for p in prompts], np.uint32),
    }
    rows = {name: np.repeat(value, n, axis=0) for name, value in rows.items()}
    rows['number'] = np.tile(np.arange(n, dtype=np.int32), len(prompts))[:, None]
    total, shards = len(prompts) * n, sharding.batch_shards(self.mesh) if self.mesh else 1
    size, texts = rows_per_call(total, batch_size, shards), []
    with sharding.within(self.mesh, self.rules):
      for start in range(0, total, size):
        chosen = np.minimum(np.arange(start, start + size), total - 1)
        batch = self._put({name: value[chosen] for name, value in rows.items()})
        texts.extend(np.asarray(self._complete(self.params['dalle'], batch, np.uint32(seed), sampling=sampling)))
    special = {settings.get(name, -1) for name in ('pad', 'start', 'end', 'blank')}
    words = [[int(i) for i in text if i < self.model.words and i not in special] for text in texts[:total]]
    captions = [self.encode_text.bpe.decode(ids) for ids in words]
    return [captions[i * n : (i + 1) * n] for i in range(len(prompts))]

  # --- On the host

  def _network(self) -> Any:
    """The transformer of the run."""
    return dalle.build(**{**self.config['model'], **self.sizes})

  def _prefix(self, init_image: Any, keep_rows: int) -> np.ndarray:
    """The image tokens that are given, int32[1, k]."""
    h, w = self.model.grid
    if init_image is None and not keep_rows:
      return np.zeros((1, 0), np.int32)
    if init_image is None or not isinstance(keep_rows, numbers.Integral) or not 0 < keep_rows < h:
      raise ValueError(f'keep_rows is {keep_rows!r}; expected 1 to {h - 1} of {h} rows with an init_image, else 0.')
    return self.encode(ops.open_image(init_image, self.image_size, 'init_image')[None])[:, : keep_rows * w]


def draw(
  model: Any,
  vqgan: image_tokenizer.ImageTokenizer,
  params: Any,
  batch: dict[str, jax.Array],
  seed: jax.Array,
  sampling: Sampling,
) -> tuple[jax.Array, jax.Array]:
  """Images uint8[B, n, H, W, 3] and their tokens int32[B, n, I] by a `DALLE` or `DALLEMini`; under jit.

  `params` has 'dalle' and 'vqgan', `batch` text int32[B, T], image int32[B, k], name uint32[B] and number int32[B, n].
  """
  n = batch['number'].shape[1]
  tokens = decoding.sample(
    functools.partial(model.apply, {'params': params['dalle']}),
    batch['text'],
    batch['image'],
    request_keys(seed, batch['name'], batch['number']),
    empty=model.padding,
    length=model.image_length,
    n=n,
    sampling=sampling,
  )
  images = decode_codes(vqgan, model.grid, params['vqgan'], tokens)
  return images.reshape(-1, n, *images.shape[1:]), tokens.reshape(-1, n, tokens.shape[-1])


def complete(
  model: dalle.DALLE, end: int, params: Any, batch: dict[str, jax.Array], seed: jax.Array, *, sampling: Sampling
) -> jax.Array:
  """Completed captions int32[B, T]; under jit. `batch` has text int32[B, T], length, name [B] and number [B, 1]."""
  return decoding.complete_text(
    lambda text, t: model.apply({'params': params}, text, t, method='next_text_logits'),
    batch['text'],
    batch['length'],
    jnp.asarray(model.padding),
    model.words,
    request_keys(seed, batch['name'], batch['number']),
    sampling,
    end,
  )


load = DallE.load
