"""What all generators of images share: a run with its tokenizer on a mesh and, for some, an image tokenizer."""

import dataclasses
import functools
import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dalle_jax.data.bpe import text_encoder
from dalle_jax.models import dalle, decode_params
from dalle_jax.pipelines.image_tokenizer import ImageTokenizer
from dalle_jax.pipelines.rerank import Reranker
from dalle_jax.training import checkpoint, sharding

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a generator is loaded with, in addition to its run; see `Generator.load`."""

  reranker: Reranker | None = None
  mesh: Mesh | None = None
  rules: sharding.Rules = ()
  int8: bool = False


class Generator:
  """A trained network that generates images, with its tokenizer and, optionally, a CLIP that ranks them.

  Class attributes:
    OBJECTIVE: the objective of the runs that it takes.
    REQUIRED: the frozen networks that a run must have.
    OPTIONAL: further networks that `load` accepts in `parts`, even if the run has none.
    TEXT_FROM: the frozen network whose tokenizer it reads captions with; '' for that of the run itself.
    BATCH: images per call, by default.
  """

  OBJECTIVE = ''
  REQUIRED: tuple[str, ...] = ()
  OPTIONAL: tuple[str, ...] = ()
  TEXT_FROM = ''
  BATCH = 64

  def __init__(self, run: checkpoint.Run, frozen: Mapping[str, checkpoint.Run], setup: Setup | None = None):
    setup = setup or Setup()
    self.config, self.step, self.params = run.config, run.step, dict(run.params)
    self.reranker, self.mesh, self.rules, self.int8 = setup.reranker, setup.mesh, setup.rules, setup.int8
    text_run = frozen[self.TEXT_FROM] if self.TEXT_FROM else run
    self.encode_text = text_encoder(text_run.tokenizer, text_run.config['tokenizer'])
    self.image_size = self.config['data']['image_size']
    self._program = functools.partial(sharding.program, mesh=self.mesh, rules=self.rules)

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
    parts: Mapping[str, str | Path] | None = None,
  ):
    """Loads the run in `path`, with its EMA parameters if it has them.

    Any checkpoint loads onto any mesh. Without a mesh everything is on one device.

    Args:
      path: a run directory, or the name of a Hugging Face repository that holds one (with the extra `hf`).
      clip: the run of a CLIP that ranks the images, given like `path`; '' for none.
      mesh, rules: parameters and images are split over the mesh by the rules. Where the mesh spans several processes,
        all of them must make the same calls, and all get all results.
      step: the checkpoint to load, by default the newest.
      int8: keeps the transformer's weights in eight bits. Where reading weights limits the speed, a token then reads a
        quarter of the bytes of float32; images differ slightly.
      parts: runs to use in place of the frozen ones with these names, '' for none.

    Raises FileNotFoundError when there is no checkpoint (of that `step`), ValueError when a run is of another kind
    and for unknown names in `parts`.
    """
    run = checkpoint.load_run(path, mesh=mesh, rules=rules, step=step)
    if run.config.get('objective') != cls.OBJECTIVE:
      found = run.config.get('objective')
      raise ValueError(f'{path} is a run of {found!r}; sampling needs one of the objective {cls.OBJECTIVE}.')
    known = sorted({*cls.REQUIRED, *cls.OPTIONAL, *run.frozen})
    if unknown := sorted(set(parts or {}) - set(known)):
      raise ValueError(f'{path} has no parts named {", ".join(unknown)}; expected {", ".join(known)}.')
    paths = {name: p for name, p in {**run.frozen, **(parts or {})}.items() if p}
    missing = [name for name in cls.REQUIRED if name not in paths]
    if not run.tokenizer and not cls.TEXT_FROM:
      missing.insert(0, 'tokenizer')
    if missing:
      raise ValueError(f'{path} has no {" and no ".join(missing)}, which sampling needs; convert it again with them.')
    frozen = {name: checkpoint.load_run(p, mesh=mesh, rules=rules) for name, p in paths.items()}
    reranker = Reranker.load(clip, mesh=mesh, rules=rules) if clip else None
    return cls(run, frozen, Setup(reranker, mesh, rules, int8))

  # --- On the host

  def _text(self, prompt: str) -> np.ndarray:
    """The ids of a caption, int32[T]; logs a warning when it has more tokens than the model reads."""
    count, capacity = len(self.encode_text.bpe.encode(prompt)), self.encode_text.capacity
    if count > capacity:
      logger.warning('the prompt %r has %d tokens; the model reads the first %d.', prompt, count, capacity)
    return self.encode_text(prompt)

  def _put(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    return sharding.put_whole(batch, self.mesh) if self.mesh else batch


class TokenGenerator(Generator):
  """A generator of image tokens: a transformer over them, and the image tokenizer that decodes them to images.

  `sizes` are the fields of the transformer that follow from the tokenizers and the image size.
  """

  REQUIRED = ('vqgan',)

  def __init__(self, run: checkpoint.Run, frozen: Mapping[str, checkpoint.Run], setup: Setup | None = None):
    super().__init__(run, frozen, setup)
    self.vqgan = ImageTokenizer(frozen['vqgan'], self.image_size, self.mesh, self.rules)
    self.sizes = dalle.sizes(self.config, self.vqgan.network)
    self.params['vqgan'] = self.vqgan.params

  def encode(self, images: Any) -> np.ndarray:
    """Images, as `ImageTokenizer.encode` takes them -> image tokens int32[B, I]."""
    return self.vqgan.encode(images)

  def reconstruct(self, images: Any) -> np.ndarray:
    """Images encoded to image tokens and decoded again: uint8[B, H, W, 3]."""
    return self.vqgan.reconstruct(images)

  def _prepare_params(self, dtype: Any, *players: str) -> None:
    """Converts the parameters of 'dalle' and of other players to the form that sampling reads."""
    few_rows = self.mesh is None and jax.default_backend() == 'cpu'
    for player in ('dalle', *players):
      self.params[player] = decode_params.compute_params(self.params[player], dtype, self.int8, few_rows)
    self.params['dalle'] = decode_params.by_layer(self.params['dalle'])


def rows_per_call(count: int, most: int, shards: int) -> int:
  """How many of `count` rows to sample in one call: `most`, or if there are fewer, the next power of two.

  So programs are compiled for few sizes, whatever is requested. This is for each of `shards`, the parts that a batch is
  split into, and the result for all of them.
  """
  of_shard = min(-(-max(1, most) // shards), 1 << (-(-count // shards) - 1).bit_length())
  return of_shard * shards


def plan_calls(count: int, n: int, most: int, shards: int) -> tuple[np.ndarray, np.ndarray]:
  """What C calls sample for `count` requests: in each of B rows the numbers int[C, B, k] of the request int[C, B].

  The numbers of a row share what is computed once for it, so they are all `n`, or at most `most`. With fewer requests
  than `shards` they are split over rows, since every shard computes a row in any case; this counts requests up to a
  power of two, as `rows_per_call` does, so that there are few sizes (B, k).

  Numbers of n or more fill up rows, and the last call repeats the last row.
  """
  k = min(-(-n // max(1, shards >> (count - 1).bit_length())), most)
  total = count * -(-n // k)
  size = rows_per_call(total, most // k, shards)
  rows = np.minimum(np.arange(-(-total // size) * size), total - 1).reshape(-1, size)
  block, requests = np.divmod(rows, count)
  return requests, block[..., None] * k + np.arange(k)


def request_keys(seed: jax.Array, names: jax.Array, numbers: jax.Array) -> jax.Array:
  """A key for each number int[B, n] of each name [B], as [B * n]: an image does not depend on the rest of its batch."""
  key, fold_in_each = jax.random.key(seed), jax.vmap(jax.random.fold_in, (None, 0))
  return jax.vmap(lambda name, row: fold_in_each(jax.random.fold_in(key, name), row))(names, numbers).ravel()


def load(path: str | Path, **options: Any) -> Any:
  """The pipeline for the run in `path`: `load` of dalle_jax/pipelines/OBJECTIVE.py, with its options.

  Raises ValueError when there is none, FileNotFoundError when there is no checkpoint.
  """
  objective = checkpoint.read_config(path).get('objective')
  known = sorted(p.stem for p in Path(__file__).parent.glob('*.py'))
  module = importlib.import_module(f'dalle_jax.pipelines.{objective}') if objective in known else None
  if not hasattr(module, 'load'):
    hint = ', that of the decoder with --prior or --upsampler' if objective in ('prior', 'upsampler') else ''
    raise ValueError(
      f'{path} is a run of {objective!r}, which generates no images from captions; give the run of a generator{hint}.'
    )
  return module.load(path, **options)
