"""The diffusion prior of unCLIP: CLIP's embedding of a picture from its caption (Ramesh et al., 2022, section 2.2).

Axis legend: B rows, N text tokens, E the space of CLIP, W width of its text tower, D embed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.functional import diffusion
from dalle_jax.functional.diffusion import Diffusion
from dalle_jax.layers.basic import Dense, LayerNorm, boxed, constrain, normal_init
from dalle_jax.layers.timesteps import TimeEmbed
from dalle_jax.layers.transformer import Stack
from dalle_jax.models import clip_reader, variants
from dalle_jax.models.clip_reader import Caption, ClipReader

VARIANTS = {
  'test': dict(width=16, depth=2, heads=2),
  'quickstart': dict(width=256, depth=4, heads=4, unroll=4),
  'karlo': dict(width=2048, depth=20, heads=32),
  'paper': dict(width=2048, depth=24, heads=32, remat='full', dtype='bfloat16'),
}
ADDED = 4  # tokens behind those of the caption


class Prior(nn.Module):
  """A causal transformer over the caption's tokens, its embedding, the step, the noisy embedding, and a token of its
  own, at which it says what the embedding is without noise.

  Attributes:
    embed_dim, text_width, text_length: of the CLIP.
    raw: whether embeddings are as CLIP projects them (Karlo); else of length sqrt(E), see `models.clip_reader`.
    steps, schedule, clip: of the diffusion, see `functional.diffusion`.
    remat, unroll: see `layers.transformer.Stack`.
  """

  width: int
  depth: int
  heads: int
  embed_dim: int = 512
  text_width: int = 512
  text_length: int = 77
  raw: bool = False
  steps: int = 1000
  schedule: str = 'cosine'
  clip: float = 5.0
  remat: str = 'none'
  unroll: int = 1
  dtype: jnp.dtype = jnp.float32

  @property
  def diffusion(self) -> Diffusion:
    return Diffusion(self.steps, self.schedule, 'start', 'small', self.clip)

  def setup(self):
    linear = lambda axes: Dense(self.width, axes, dtype=self.dtype)
    self.text_in, self.caption_in, self.image_in = (linear((None, 'embed')) for _ in range(3))
    self.time = TimeEmbed(self.width, self.width, self.dtype)
    init, length = normal_init(0.01), self.text_length + ADDED
    self.positions = self.param('positions', boxed(init, (None, 'embed')), (length, self.width), jnp.float32)
    self.query = self.param('query', boxed(init, ('embed',)), (self.width,), jnp.float32)
    self.blocks = Stack(self.depth, self.heads, dtype=self.dtype, remat=self.remat, unroll=self.unroll)
    self.norm_out, self.out = LayerNorm(), Dense(self.embed_dim, ('embed', None))  # in float32, as what is predicted
    own = boxed(nn.initializers.zeros, (None,)), boxed(nn.initializers.ones, (None,))
    self.mean, self.std = (
      self.param(name, init, (self.embed_dim,), jnp.float32) for name, init in zip(('mean', 'std'), own, strict=True)
    )

  def __call__(self, noisy: jax.Array, t: jax.Array, caption: Caption) -> jax.Array:
    """Normal embeddings (see `normal`) with noise, float32[B, E], at steps t int32[B] -> without it, float32[B, E].

    Raises ValueError for captions of another length.
    """
    b, n = caption.mask.shape
    if n != self.text_length:
      raise ValueError(f'the prior reads {self.text_length} text tokens, not {n}; it was made for another CLIP.')
    one = lambda x: x[:, None].astype(self.dtype)
    query = jnp.broadcast_to(self.query, (b, 1, self.width)).astype(self.dtype)
    x = [
      self.text_in(caption.hidden),
      one(self.caption_in(caption.embed)),
      one(self.time(t)),
      one(self.image_in(noisy)),
    ]
    x = jnp.concatenate([*x, query], 1) + self.positions.astype(self.dtype)
    seen = jnp.pad(caption.mask, ((0, 0), (0, ADDED)), constant_values=True)
    mask = np.tri(n + ADDED, dtype=bool) & seen[:, None]  # (B, S, S)
    x, _ = self.blocks(constrain(x, ('batch', 'seq', 'embed')), mask)
    return self.out(self.norm_out(x[:, -1]))

  def normal(self, embed: jax.Array) -> jax.Array:
    """CLIP's embeddings as diffusion takes them, each entry of mean 0 and variance 1.

    Their means and deviations are among the parameters, and get no gradient: training counts them.
    """
    return (embed - jax.lax.stop_gradient(self.mean)) / jax.lax.stop_gradient(self.std)

  def embedding(self, normal: jax.Array) -> jax.Array:
    """The inverse of `normal`."""
    return normal * self.std + self.mean


def sample(
  model: Prior,
  apply: Callable[..., jax.Array],
  caption: Caption,
  empty: Caption,
  keys: jax.Array,
  steps: Sequence[int],
  guidance: float,
) -> jax.Array:
  """CLIP's embeddings of pictures that captions may be of, float32[B, E], from noise by keys[B].

  `apply` is the model's with its parameters; guidance and `empty` as of `models.unclip.sample`.
  """
  d, both = model.diffusion, jax.tree.map(lambda *rows: jnp.concatenate(rows), caption, empty)
  predict = lambda x, t: apply(x, t, caption)
  if guidance != 1:
    predict = diffusion.guided(d, lambda x, t: apply(x, t, both), guidance)
  x = diffusion.sample(d, predict, diffusion.initial_noise(keys, (model.embed_dim,)), keys, steps)
  return apply(x, method='embedding')


def build(variant: str, **overrides) -> Prior:
  """The network of `VARIANTS[variant]` with some fields changed. Raises ValueError for an unknown variant or field."""
  return variants.build(Prior, VARIANTS, variant, overrides)


def of_run(config: Mapping[str, Any], clip_config: Mapping[str, Any]) -> tuple[Prior, ClipReader]:
  """The network of a run from its config and that of its CLIP."""
  return clip_reader.of_run(build, config, clip_config)
