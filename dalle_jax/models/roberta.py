"""RoBERTa, a text encoder ("RoBERTa", Liu et al., 2019), with the architecture of the transformers library.

Axis legend: B texts, N tokens, D width.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.layers.basic import Dense, Embed, LayerNorm, normal_init, param
from dalle_jax.layers.transformer import Stack
from dalle_jax.models import variants
from dalle_jax.models.pooling import masked_mean

VARIANTS = {
  'test': dict(vocab_size=40, length=8, width=16, layers=2, heads=2),
  'base': dict(),
}


class RoBERTa(nn.Module):
  """Hidden states of a text; tokens equal to `pad` are masked out.

  Attributes:
    length: maximum number of tokens of a text. Positions are numbered from `pad` + 1; paddings have the number `pad`.
    mlp: hidden width of the MLPs; 0: four times `width`.
  """

  vocab_size: int = 50_265
  length: int = 512
  width: int = 768
  layers: int = 12
  heads: int = 12
  mlp: int = 0
  pad: int = 1
  activation: str = 'gelu'
  eps: float = 1e-5
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    init = normal_init(0.02)
    self.embed = Embed(self.vocab_size, self.width, dtype=self.dtype)
    self.positions = param(self, 'positions', init, (None, 'embed'), (self.length + self.pad + 1, self.width))
    self.type_embed = param(self, 'type_embed', init, ('embed',), (self.width,))
    self.norm_in = LayerNorm(self.eps, self.dtype)
    self.encoder = Stack(self.layers, self.heads, self.activation, self.dtype, norms='post', mlp=self.mlp, eps=self.eps)
    self.pooler = Dense(self.width, ('embed', None))

  def __call__(self, text: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """int32[B, N] -> hidden states float32[B, N, D] and the pooled first one, float32[B, D].

    `mask` bool[B, N]: the positions that may be attended to; by default those that are not paddings. Raises ValueError
    for texts that are too long.
    """
    mask = text != self.pad if mask is None else mask
    x, _ = self.encoder(self.embed_text(text), mask[:, None])
    x = x.astype(jnp.float32)
    return x, jnp.tanh(self.pooler(x[:, 0]))

  def embed_text(self, text: jax.Array) -> jax.Array:
    """Input of the blocks, int32[B, N] -> [B, N, D]."""
    if text.shape[1] > self.length:
      raise ValueError(f'this RoBERTa takes at most {self.length} tokens, not {text.shape[1]}; truncate the texts.')
    mask = text != self.pad
    positions = jnp.where(mask, jnp.cumsum(mask, 1), 0) + self.pad
    x = self.embed(text) + (jnp.take(self.positions, positions, axis=0) + self.type_embed).astype(self.dtype)
    return self.norm_in(x)

  def encode_text(self, text: jax.Array) -> jax.Array:
    """Mean of the hidden states without those of paddings, int32[B, N] -> float32[B, D]."""
    return masked_mean(self(text)[0], text != self.pad)


def build(variant: str, **overrides) -> RoBERTa:
  """The network of `VARIANTS[variant]` with fields overridden. Raises ValueError for an unknown variant or field."""
  return variants.build(RoBERTa, VARIANTS, variant, overrides)


def of_run(config: Mapping[str, Any]) -> RoBERTa:
  """The network of a run, from its config."""
  return build(**config['model'])
