"""What every pipeline that draws shares: a run with its words and a mesh; for some, image tokens."""

import contextlib
import functools
import importlib
import logging
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from dalle_jax.data import ops
from dalle_jax.data.bpe import text_encoder
from dalle_jax.functional import decoding
from dalle_jax.functional.pixels import to_float, to_uint8
from dalle_jax.models import dalle, image_tokenizer
from dalle_jax.pipelines.rerank import Reranker, in_batches
from dalle_jax.training import checkpoint, sharding

logger = logging.getLogger(__name__)
BATCH = 64  # pictures at once through the VQGAN


class Generator:
  """A trained network that draws, with its words and, if wanted, a CLIP that ranks.

  A kind of it has the OBJECTIVE of its runs, and the frozen networks that it NEEDS.
  """

  OBJECTIVE = ''
  NEEDS: tuple[str, ...] = ()

  def __init__(
    self,
    run: checkpoint.Run,
    frozen: dict[str, checkpoint.Run],
    reranker: Reranker | None = None,
    mesh: Mesh | None = None,
    rules: sharding.Rules = (),
    int8: bool = False,
  ):
    self.config, self.reranker, self.mesh, self.rules = run.config, reranker, mesh, rules
    self.words = text_encoder(run.tokenizer, self.config['tokenizer'])
    self.image_size = self.config['data']['image_size']
    self.step, self.params, self.int8 = run.step, dict(run.params), int8
    self._jit = functools.partial(jax.jit, out_shardings=sharding.whole(mesh))

  @classmethod
  def load(
    cls,
    path: str | Path,
    *,
    clip: str | Path = '',
    mesh: Mesh | None = None,
    rules: sharding.Rules = (),
    step: int | None = None,
    int8: bool = False,
  ):
    """Loads the run in `path` (its EMA if it has one) and, with `clip`, the run of a CLIP.

    Either may be the name of a repository of Hugging Face that holds a run directory (with the extra `hf`).
    Any checkpoint loads onto any mesh: with `mesh` parameters and pictures are split over it by `rules`, and where it
    spans several processes all ask for the same and get all; without it everything is on one device. With `int8` a
    transformer over tokens keeps its weights in eight bits: where reading them is what a token takes, a quarter of
    float32 is to be read, and pictures differ a little. Raises FileNotFoundError when there is no checkpoint (of that
    `step`), ValueError when a run is of another kind.
    """
    run = checkpoint.load_run(path, mesh=mesh, rules=rules, step=step)
    if run.config.get('objective') != cls.OBJECTIVE:
      found = run.config.get('objective')
      raise ValueError(f'{path} is a run of {found!r}; sampling needs one of the objective {cls.OBJECTIVE}.')
    lacking = [] if run.tokenizer else ['tokenizer']
    lacking += [name for name in cls.NEEDS if name not in run.frozen]
    if lacking:
      raise ValueError(f'{path} has no {" and no ".join(lacking)}, which sampling needs; convert it again with them.')
    frozen = {name: checkpoint.load_run(p, mesh=mesh, rules=rules) for name, p in run.frozen.items()}
    reranker = Reranker.load(clip, mesh=mesh, rules=rules) if clip else None
    return cls(run, frozen, reranker, mesh, rules, int8)

  # --- On the host

  def _text(self, prompt: str) -> np.ndarray:
    text = self.words(prompt)
    if self.words.is_full(text) and (count := len(self.words.bpe.encode(prompt))) > self.words.length:
      logger.warning('the prompt %r has %d tokens; the model reads the first %d.', prompt, count, self.words.length)
    return text

  def _picture(self, picture: Any, name: str) -> np.ndarray:
    """uint8[size, size, 3] from a path, bytes, PIL image or array; `name` is what an error calls it."""
    if isinstance(picture, (str, Path)):
      if not Path(picture).is_file():
        raise FileNotFoundError(f'there is no picture {picture}.')
      picture = Path(picture).read_bytes()
    try:
      picture = ops.to_rgb(picture)
    except Exception as e:  # what a broken file makes Pillow raise has no common class
      raise ValueError(f'{name} is no picture that can be read: {" ".join(str(e).split())}') from e
    return ops.crop(picture, self.image_size, (), None)

  def _checked(self, images: np.ndarray) -> np.ndarray:
    size = self.image_size
    if images.dtype != np.uint8 or images.shape[1:] != (size, size, 3):
      raise ValueError(f'pictures are {images.dtype}{list(images.shape)}; expected uint8[B, {size}, {size}, 3].')
    return images

  def _put(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    return sharding.put_whole(batch, self.mesh) if self.mesh else batch

  def _context(self) -> contextlib.AbstractContextManager:
    """The mesh and rules that the layers see."""
    if self.mesh is None:
      return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    stack.enter_context(jax.set_mesh(self.mesh))
    stack.enter_context(nn.logical_axis_rules(sharding.logical_rules(self.rules)))
    return stack


class TokenGenerator(Generator):
  """One that draws image tokens: a transformer over them, with the tokenizer that turns them into pictures.

  `sizes` are the fields of the transformer that follow from words and pictures.
  """

  NEEDS = ('vqgan',)

  def __init__(self, run: checkpoint.Run, frozen: dict[str, checkpoint.Run], *layout: Any):
    super().__init__(run, frozen, *layout)
    self.vqgan = image_tokenizer.of_run(frozen['vqgan'].config)
    self.grid = self.vqgan.grid(self.image_size)
    self.sizes = dalle.sizes(self.config['tokenizer'], self.vqgan, self.image_size)
    self.params['vqgan'] = frozen['vqgan'].network('vqgan')
    self._encode, self._decode = self._jit(self._encode_images), self._jit(self._decode_codes)

  def encode(self, images: np.ndarray) -> np.ndarray:
    """uint8[B, H, W, 3] of the model's size -> image tokens int32[B, I]."""
    with self._context():
      return in_batches(lambda x: self._encode(self.params, x), self._checked(images), BATCH)

  def reconstruct(self, images: np.ndarray) -> np.ndarray:
    """uint8[B, H, W, 3] through the image tokens and back: uint8[B, H, W, 3]."""
    with self._context():
      return in_batches(lambda x: self._decode(self.params, self._encode(self.params, x)), self._checked(images), BATCH)

  def _to_draw_with(self, dtype: Any, *players: str) -> None:
    """Keeps the parameters of 'dalle' and other players as drawing reads them."""
    few_rows = self.mesh is None and jax.default_backend() == 'cpu'
    for player in ('dalle', *players):
      self.params[player] = decoding.compute_params(self.params[player], dtype, self.int8, few_rows)
    self.params['dalle'] = decoding.by_layer(self.params['dalle'])

  # --- Under jit

  def _decode_codes(self, params: Any, tokens: jax.Array) -> jax.Array:
    return decode_codes(self.vqgan, params['vqgan'], tokens, self.grid)

  def _encode_images(self, params: Any, images: jax.Array) -> jax.Array:
    codes = self.vqgan.apply({'params': params['vqgan']}, to_float(images), method='encode')
    return codes.reshape(len(images), -1)


def decode_codes(
  vqgan: image_tokenizer.ImageTokenizer, params: Any, tokens: jax.Array, grid: tuple[int, int]
) -> jax.Array:
  """The pictures uint8[B, H, W, 3] of image tokens int32[B, I]."""
  return to_uint8(vqgan.apply({'params': params}, tokens.reshape(-1, *grid), method='decode_codes'))


def check_numbers(n: int, batch_size: int, seed: int) -> None:
  """Raises ValueError for what no pipeline can draw."""
  if n < 1 or batch_size < 1:
    raise ValueError(f'n is {n} and batch_size {batch_size}; both must be 1 or more.')
  if not 0 <= seed < 2**32:
    raise ValueError(f'seed is {seed}; expected 0 to {2**32 - 1}.')


def in_one_call(count: int, most: int, shards: int) -> int:
  """How many of `count` requests are drawn at once: `most`, where there are fewer the next power of two.

  So a program is compiled for few sizes, whatever is asked for; a multiple of `shards`, the parts of a batch.
  """
  together = min(max(1, most), 1 << (count - 1).bit_length())
  return -(-together // shards) * shards


def request_keys(seed: jax.Array, names: jax.Array, numbers: jax.Array) -> jax.Array:
  """A key for each number of each name, [B * n]: so a picture depends on nothing that is asked for beside it."""
  key = jax.random.key(seed)
  pair = lambda name, number: jax.random.fold_in(jax.random.fold_in(key, name), number)
  return jax.vmap(lambda name: jax.vmap(lambda number: pair(name, number))(numbers))(names).ravel()


def load(path: str | Path, **options: Any) -> Any:
  """The pipeline that the run in `path` is for: `load` of dalle_jax/pipelines/OBJECTIVE.py, with its options.

  Raises ValueError when there is none, FileNotFoundError when there is no checkpoint.
  """
  objective = checkpoint.read_config(path).get('objective')
  known = sorted(p.stem for p in Path(__file__).parent.glob('*.py'))
  room = importlib.import_module(f'dalle_jax.pipelines.{objective}') if objective in known else None
  if not hasattr(room, 'load'):
    raise ValueError(
      f'{path} is a run of {objective!r}, which draws nothing from captions; give the run of a generator.'
    )
  return room.load(path, **options)
