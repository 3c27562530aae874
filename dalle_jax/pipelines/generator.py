"""What every pipeline that draws shares: a run with its words and a mesh; for some, image tokens."""

import functools
import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dalle_jax.data.bpe import text_encoder
from dalle_jax.models import dalle, decode_params
from dalle_jax.pipelines.image_tokenizer import ImageTokenizer
from dalle_jax.pipelines.rerank import Reranker
from dalle_jax.training import checkpoint, sharding

logger = logging.getLogger(__name__)


class Generator:
  """A trained network that draws, with its words and, if wanted, a CLIP that ranks.

  A kind of it has the OBJECTIVE of its runs, the frozen networks that it NEEDS, and the one of these whose WORDS it
  reads, '' for its own; and, as long as nothing else is said, draws BATCH pictures at once.
  """

  BATCH = 64
  OBJECTIVE = ''
  NEEDS: tuple[str, ...] = ()
  WORDS = ''

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
    reads = frozen[self.WORDS] if self.WORDS else run
    self.words = text_encoder(reads.tokenizer, reads.config['tokenizer'])
    markers = [name for name in ('start', 'end') if reads.config['tokenizer'].get(name, -1) >= 0]
    self.text_capacity = self.words.length - len(markers)  # tokens of a caption that the model reads
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
    parts: Mapping[str, str | Path] | None = None,
  ):
    """Loads the run in `path` (its EMA if it has one) and, with `clip`, the run of a CLIP.

    Either may be the name of a repository of Hugging Face that holds a run directory (with the extra `hf`).
    Any checkpoint loads onto any mesh: with `mesh` parameters and pictures are split over it by `rules`, and where it
    spans several processes all ask for the same and get all; without it everything is on one device. With `int8` a
    transformer over tokens keeps its weights in eight bits: where reading them is what a token takes, a quarter of
    float32 is to be read, and pictures differ a little. `parts` are runs in place of the frozen ones of these names, ''
    for none.
    Raises FileNotFoundError when there is no checkpoint (of that `step`), ValueError when a run is of another kind.
    """
    run = checkpoint.load_run(path, mesh=mesh, rules=rules, step=step)
    if run.config.get('objective') != cls.OBJECTIVE:
      found = run.config.get('objective')
      raise ValueError(f'{path} is a run of {found!r}; sampling needs one of the objective {cls.OBJECTIVE}.')
    paths = {name: p for name, p in {**run.frozen, **(parts or {})}.items() if p}
    lacking = [] if run.tokenizer or cls.WORDS else ['tokenizer']
    lacking += [name for name in cls.NEEDS if name not in paths]
    if lacking:
      raise ValueError(f'{path} has no {" and no ".join(lacking)}, which sampling needs; convert it again with them.')
    frozen = {name: checkpoint.load_run(p, mesh=mesh, rules=rules) for name, p in paths.items()}
    reranker = Reranker.load(clip, mesh=mesh, rules=rules) if clip else None
    return cls(run, frozen, reranker, mesh, rules, int8)

  # --- On the host

  def _text(self, prompt: str) -> np.ndarray:
    count = len(self.words.bpe.encode(prompt))
    if count > self.text_capacity:
      logger.warning('the prompt %r has %d tokens; the model reads the first %d.', prompt, count, self.text_capacity)
    return self.words(prompt)

  def _put(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    return sharding.put_whole(batch, self.mesh) if self.mesh else batch


class TokenGenerator(Generator):
  """One that draws image tokens: a transformer over them, with the tokenizer that turns them into pictures.

  `sizes` are the fields of the transformer that follow from words and pictures.
  """

  NEEDS = ('vqgan',)

  def __init__(self, run: checkpoint.Run, frozen: dict[str, checkpoint.Run], *layout: Any):
    super().__init__(run, frozen, *layout)
    self.vqgan = ImageTokenizer(frozen['vqgan'], self.image_size, self.mesh, self.rules)
    self.sizes = dalle.sizes(self.config['tokenizer'], self.vqgan.network, self.image_size)
    self.params['vqgan'] = self.vqgan.params

  def encode(self, images: Any) -> np.ndarray:
    """Pictures, as `ImageTokenizer.encode` takes them -> image tokens int32[B, I]."""
    return self.vqgan.encode(images)

  def reconstruct(self, images: Any) -> np.ndarray:
    """Pictures through the image tokens and back: uint8[B, H, W, 3]."""
    return self.vqgan.reconstruct(images)

  def _to_draw_with(self, dtype: Any, *players: str) -> None:
    """Keeps the parameters of 'dalle' and other players as drawing reads them."""
    few_rows = self.mesh is None and jax.default_backend() == 'cpu'
    for player in ('dalle', *players):
      self.params[player] = decode_params.compute_params(self.params[player], dtype, self.int8, few_rows)
    self.params['dalle'] = decode_params.by_layer(self.params['dalle'])


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
  """A key for each number of each name, [B * n]: so a picture depends on nothing that is asked for beside it.

  `numbers` are int[n] for all of the names [B], or int[B, n].
  """
  key, numbers = jax.random.key(seed), jnp.broadcast_to(numbers, (len(names), numbers.shape[-1]))
  of_one = jax.vmap(jax.random.fold_in, (None, 0))
  return jax.vmap(lambda name, own: of_one(jax.random.fold_in(key, name), own))(names, numbers).ravel()


def load(path: str | Path, **options: Any) -> Any:
  """The pipeline that the run in `path` is for: `load` of dalle_jax/pipelines/OBJECTIVE.py, with its options.

  Raises ValueError when there is none, FileNotFoundError when there is no checkpoint.
  """
  objective = checkpoint.read_config(path).get('objective')
  known = sorted(p.stem for p in Path(__file__).parent.glob('*.py'))
  room = importlib.import_module(f'dalle_jax.pipelines.{objective}') if objective in known else None
  if not hasattr(room, 'load'):
    raise ValueError(
      f'{path} is a run of {objective!r}, which draws nothing from captions; give the run of a generator'
      f'{", that of the decoder with --prior or --upsampler." if objective in ("prior", "upsampler") else "."}'
    )
  return room.load(path, **options)
