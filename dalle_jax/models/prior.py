"""The diffusion prior of unCLIP: CLIP image embeddings from captions (Ramesh et al., 2022, section 2.2).

Axis legend: B rows, N text tokens, E embed_dim of the CLIP, S = N + ADDED positions of the transformer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.functional import diffusion
from dalle_jax.functional.diffusion import Diffusion
from dalle_jax.layers.basic import Dense, LayerNorm, constrain, normal_init, param
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
ADDED = 4  # tokens after those of the caption: text embedding, timestep, noisy image embedding, query


class Prior(nn.Module):
  """A causal transformer that predicts the image embedding x0 from a noisy one and the caption.

  Its sequence is the text tower's hidden states, the text embedding, the timestep, the noisy image embedding and a
  learnt query, at whose position x0 is read out.

  Attributes:
    embed_dim, text_width, text_length: sizes of the CLIP.
    raw: whether embeddings are as CLIP projects them (Karlo), or of length sqrt(E); see `models.clip_reader`.
    steps, schedule, clip: see `functional.diffusion.Diffusion`; sampling clips x0 to [-clip, clip].
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
    self.positions = param(self, 'positions', init, (None, 'embed'), (length, self.width))
    self.query = param(self, 'query', init, ('embed',), (self.width,))
    self.blocks = Stack(self.depth, self.heads, dtype=self.dtype, remat=self.remat, unroll=self.unroll)
    self.norm_out, self.out = LayerNorm(), Dense(self.embed_dim, ('embed', None))  # in float32, like the prediction
    statistic = lambda name, init: param(self, name, init, (None,), (self.embed_dim,))
    self.mean, self.std = statistic('mean', nn.initializers.zeros), statistic('std', nn.initializers.ones)

  def __call__(self, noisy: jax.Array, t: jax.Array, caption: Caption) -> jax.Array:
    """Predict x0 float32[B, E] from noisy standardized embeddings (see `normal`) float32[B, E] at timesteps t int32[B].

    Raises ValueError for captions of another length.
    """
    b, n = caption.mask.shape
    if n != self.text_length:
      raise ValueError(
        f'the prior takes {self.text_length} text tokens, not {n}; use the CLIP that it was trained with.'
      )
    token = lambda x: x[:, None].astype(self.dtype)
    query = jnp.broadcast_to(self.query, (b, 1, self.width)).astype(self.dtype)
    x = [
      self.text_in(caption.hidden),
      token(self.caption_in(caption.embed)),
      token(self.time(t)),
      token(self.image_in(noisy)),
      query,
    ]
    x = jnp.concatenate(x, 1) + self.positions.astype(self.dtype)
    keys = jnp.pad(caption.mask, ((0, 0), (0, ADDED)), constant_values=True)
    mask = np.tri(n + ADDED, dtype=bool) & keys[:, None]  # (B, S, S)
    x, _ = self.blocks(constrain(x, ('batch', 'seq', 'embed')), mask)
    return self.out(self.norm_out(x[:, -1]))

  def normal(self, embed: jax.Array) -> jax.Array:
    """Standardize CLIP's embeddings for diffusion: each entry has mean 0 and variance 1.

    The means and standard deviations are parameters without gradients, which training sets to running statistics.
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
  guidance: float | jax.Array | None = None,
) -> jax.Array:
  """Sample CLIP image embeddings float32[B, E] for captions, from noise by keys[B].

  `apply` is the model's `apply` bound to its parameters; `steps`, `guidance` and `empty` as in `models.unclip.sample`.
  """
  d = model.diffusion
  predict = lambda x, t: apply(x, t, caption)
  if guidance is not None:
    both = jax.tree.map(lambda *rows: jnp.concatenate(rows), caption, empty)
    predict = diffusion.guided(d, lambda x, t: apply(x, t, both), guidance)
  x = diffusion.sample(d, predict, diffusion.initial_noise(keys, (model.embed_dim,)), keys, steps)
  return apply(x, method='embedding')


def build(variant: str, **overrides) -> Prior:
  """The network of `VARIANTS[variant]` with fields overridden. Raises ValueError for an unknown variant or field."""
  return variants.build(Prior, VARIANTS, variant, overrides)


def of_run(config: Mapping[str, Any], clip_config: Mapping[str, Any]) -> tuple[Prior, ClipReader]:
  """The network of a run, from its config, and the reader of its CLIP, from that of the CLIP."""
  return clip_reader.of_run(build, config, clip_config)
