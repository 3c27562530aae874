"""CLIP: images and captions in one embedding space ("Learning Transferable Visual Models", Radford et al., 2021).

The architecture follows the OpenAI ViT models, so that their weights can be imported: pre-LayerNorm, a class token, no
bias in the stem and the projections. They use `activation='quick_gelu'`, `text_pool='max_id'` and 77 text positions.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.layers.basic import Conv, Dense, Embed, LayerNorm, normal_init, param
from dalle_jax.layers.transformer import Stack
from dalle_jax.models import variants
from dalle_jax.models.pooling import normalize

MAX_SCALE = 100.0  # upper bound of the logit scale (section 2.5), which the objective enforces

VARIANTS = {
  'test': dict(
    image_size=16, patch=8, width=16, layers=2, heads=2, text_width=16, text_layers=2, text_heads=2, vocab_size=40,
    text_length=8, embed_dim=16,
  ),
  'quickstart': dict(
    image_size=36, patch=9, width=128, layers=3, heads=4, text_width=128, text_layers=3, text_heads=4, vocab_size=536,
    text_length=24, embed_dim=128, image_pool='all', text_causal=False, unroll=3,
  ),
  'vit_b32': dict(),
  'vit_l14': dict(patch=14, width=1024, layers=24, heads=16, text_width=768, text_heads=12, embed_dim=768,
                  text_pool='max_id'),
}  # fmt: skip


def stack(tower: Any) -> Stack:
  """The transformer blocks of a tower; called inside its `__call__`."""
  sizes = dict(unroll=tower.unroll, mlp=tower.mlp, eps=tower.eps)
  return Stack(tower.layers, tower.heads, tower.activation, tower.dtype, name='encoder', **sizes)


class ImageTower(nn.Module):
  """Image encoder, a ViT: float32[B, H, W, 3] -> float32[B, embed_dim]. Fields as in CLIP."""

  image_size: int
  patch: int
  width: int
  layers: int
  heads: int
  embed_dim: int
  pool: str
  activation: str
  dtype: jnp.dtype
  unroll: int = 1
  mlp: int = 0
  eps: float = 1e-5

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    if images.shape[1:3] != (self.image_size, self.image_size):
      raise ValueError(f'CLIP takes images of {self.image_size} pixels a side, not {images.shape[1:3]}; resize them.')
    if self.image_size % self.patch:
      raise ValueError(f'CLIP patch {self.patch} does not divide the image size {self.image_size}; change one of them.')
    init, stem = normal_init(self.width**-0.5), normal_init((3 * self.patch**2) ** -0.5)
    conv = Conv(
      self.width, self.patch, self.patch, 'VALID', use_bias=False, dtype=self.dtype, kernel_init=stem, name='stem'
    )
    x = conv(images).reshape(images.shape[0], -1, self.width)
    if self.pool == 'class':
      token = param(self, 'class_token', init, ('embed',), (self.width,))
      x = jnp.concatenate([jnp.broadcast_to(token.astype(self.dtype), (len(x), 1, self.width)), x], 1)
    elif self.pool != 'all':
      raise ValueError(f'CLIP image_pool {self.pool!r} is unknown; expected class or all.')
    positions = param(self, 'positions', init, (None, 'embed'), x.shape[1:])
    x = LayerNorm(self.eps, self.dtype, name='norm_in')(x + positions.astype(self.dtype))
    encoder = stack(self)
    x, _ = encoder(x)
    self.sow('hidden', 'last', x)
    x = LayerNorm(self.eps, name='norm_out')(x[:, 0] if self.pool == 'class' else x)
    x = x.reshape(len(x), -1)
    self.sow('hidden', 'pooled', x)
    return Dense(self.embed_dim, ('embed', None), use_bias=False, kernel_init=init, name='proj')(x)


class TextTower(nn.Module):
  """Text encoder: int32[B, N] -> float32[B, embed_dim] and the hidden states [B, N, width]. Fields as in CLIP."""

  vocab_size: int
  length: int
  width: int
  layers: int
  heads: int
  embed_dim: int
  causal: bool
  pool: str
  activation: str
  dtype: jnp.dtype
  unroll: int = 1
  mlp: int = 0
  end: int = -1
  eps: float = 1e-5

  @nn.compact
  def __call__(self, ids: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """`mask` bool[B, N]: the positions that may be attended to; by default all."""
    if ids.shape[1] != self.length:
      raise ValueError(f'CLIP takes {self.length} text tokens, not {ids.shape[1]}; pad or truncate the captions.')
    positions = param(self, 'positions', normal_init(0.01), (None, 'embed'), (self.length, self.width))
    x = Embed(self.vocab_size, self.width, dtype=self.dtype, name='embed')(ids) + positions.astype(self.dtype)
    visible = np.tri(self.length, dtype=bool) if self.causal else None
    if mask is not None:
      visible = mask[:, None] if visible is None else mask[:, None] & visible  # (B, 1 or N, N)
    encoder = stack(self)
    x, _ = encoder(x, visible)
    self.sow('hidden', 'last', x)
    hidden = LayerNorm(self.eps, name='norm_out')(x)
    if self.pool == 'end' and self.end < 0:
      raise ValueError('CLIP text_pool "end" needs the id of the end of text, model.end; else use text_pool "last".')
    if self.pool == 'last':
      x = hidden[:, -1]
    elif self.pool in ('max_id', 'end'):  # the end-of-text token, which has the highest id in OpenAI's models
      position = (ids if self.pool == 'max_id' else ids == self.end).argmax(-1)
      x = jnp.take_along_axis(hidden, position[:, None, None], 1)[:, 0]
    else:
      raise ValueError(f'CLIP text_pool {self.pool!r} is unknown; expected last, max_id or end.')
    self.sow('hidden', 'pooled', x)
    init = normal_init(self.width**-0.5)
    return Dense(self.embed_dim, ('embed', None), use_bias=False, kernel_init=init, name='proj')(x), hidden


class CLIP(nn.Module):
  """An image tower, a text tower and a learnt logit scale.

  Attributes:
    image_size: side of the images in pixels; 0 for a CLIP that was imported without its image tower.
    image_pool: input of the image projection: 'class', the class token (as in the OpenAI models), or 'all', the
      concatenated patches, without a class token. A pooled token has lost where things are and takes long to learn it;
      with 'all', small models know positions from the start.
    text_causal: whether a token attends to earlier tokens only (as in the OpenAI models) or to the whole text.
    text_pool: the position that represents the caption: 'last', that of the highest id ('max_id'), or the first one
      that holds the id `end` ('end').
    vocab_size: number of text ids, including the padding ids.
    activation, text_activation: activation functions of the two towers; '' for the text is that of the images.
    mlp, text_mlp: hidden widths of the MLPs; 0: four times the widths of the towers.
    unroll: see `layers.transformer.Stack`.
  """

  image_size: int = 224
  patch: int = 32
  width: int = 768
  layers: int = 12
  heads: int = 12
  text_width: int = 512
  text_layers: int = 12
  text_heads: int = 8
  image_pool: str = 'class'
  text_causal: bool = True
  text_pool: str = 'last'
  vocab_size: int = 49408
  text_length: int = 77
  embed_dim: int = 512
  activation: str = 'quick_gelu'
  text_activation: str = ''
  mlp: int = 0
  text_mlp: int = 0
  end: int = -1
  eps: float = 1e-5
  unroll: int = 1
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    self.image = ImageTower(
      self.image_size, self.patch, self.width, self.layers, self.heads, self.embed_dim, self.image_pool,
      self.activation, self.dtype, self.unroll, self.mlp, self.eps,
    )  # fmt: skip
    self.text = TextTower(
      self.vocab_size,
      self.text_length,
      self.text_width,
      self.text_layers,
      self.text_heads,
      self.embed_dim,
      self.text_causal,
      self.text_pool,
      self.text_activation or self.activation,
      self.dtype,
      self.unroll,
      self.text_mlp,
      self.end,
      self.eps,
    )
    self.logit_scale = param(self, 'logit_scale', nn.initializers.constant(math.log(1 / 0.07)), (), ())

  def __call__(self, images: jax.Array, text: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Image and text embeddings, and the scale of their dot products as logits, float32[]."""
    return self.encode_image(images), self.encode_text(text), jnp.exp(self.logit_scale)

  def encode_image(self, images: jax.Array) -> jax.Array:
    """float32[B, H, W, 3] in [-1, 1] -> float32[B, embed_dim] of unit length. Raises ValueError for another size."""
    return normalize(self.image_features(images))

  def encode_text(self, text: jax.Array) -> jax.Array:
    """int32[B, N] -> float32[B, embed_dim] of unit length. Raises ValueError for another length."""
    return normalize(self.text_features(text)[0])

  def check_image_tower(self) -> None:
    """Raises ValueError for a CLIP that was imported without its image tower."""
    if not self.image_size:
      raise ValueError('this CLIP was imported without its image tower; convert it again, with the image tower.')

  @property
  def side(self) -> int:
    """`image_size`. Raises ValueError for a CLIP that was imported without its image tower."""
    self.check_image_tower()
    return self.image_size

  def image_features(self, images: jax.Array) -> jax.Array:
    """As `encode_image`, not normalised."""
    return self.image(images)

  def text_features(self, text: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `encode_text`, not normalised, and the hidden states after the last LayerNorm, [B, N, text_width]."""
    return self.text(text)


def build(variant: str, **overrides) -> CLIP:
  """The network of `VARIANTS[variant]` with fields overridden. Raises ValueError for an unknown variant or field."""
  return variants.build(CLIP, VARIANTS, variant, overrides)


def of_run(config: Mapping[str, Any]) -> CLIP:
  """The network of a run, from its config."""
  text = variants.text_sizes(config['tokenizer'])
  sizes = dict(vocab_size=text['text_vocab'], text_length=text['text_length'], image_size=config['data']['image_size'])
  return build(**{**config['model'], **sizes})
