"""Trains a CLIP: each image is matched with its caption among all of the batch (Radford et al., 2021, section 2.3)."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dalle_jax.functional.contrastive import contrastive
from dalle_jax.functional.pixels import to_float
from dalle_jax.models import clip

FROZEN = ()  # it uses no frozen network


class CLIPObjective:
  """The player is 'clip'. Batches: image uint8[B, H, W, 3], text int32[B, N]."""

  def __init__(self, model: clip.CLIP):
    self.model = model

  def init(self, rng: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[Any, Any]:
    images = jnp.zeros((1, *batch['image'].shape[1:]))
    return {'clip': self.model.init(rng, images, jnp.zeros((1, batch['text'].shape[1]), jnp.int32))['params']}, {}

  def loss(
    self, params: Any, ctx: Any, batch: Mapping[str, jax.Array]
  ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
    a, b, scale = self.model.apply({'params': params['clip']}, to_float(batch['image']), batch['text'])
    loss, accuracy = contrastive(a, b, scale)
    return loss, ({'accuracy': accuracy, 'scale': scale}, ctx.mutable)

  def after_update(self, params: Any, mutable: Any) -> Any:
    """Clips the logit scale to at most `clip.MAX_SCALE`: here and not in the network, so that it can decrease again."""
    scale = jnp.minimum(params['clip']['logit_scale'], math.log(clip.MAX_SCALE))
    return {**params, 'clip': {**params['clip'], 'logit_scale': scale}}

  def tokens(self, batch: Mapping[str, Any]) -> int:
    """Positions of both towers in a global batch."""
    m = self.model
    class_token = 1 if m.image_pool == 'class' else 0
    return batch['text'].shape[0] * (m.text_length + (m.image_size // m.patch) ** 2 + class_token)


def from_config(config: ConfigDict, frozen_configs: Mapping[str, Any]) -> CLIPObjective:
  """The objective of `config.model`, with the sizes of the data and the tokenizer. Raises ValueError for bad fields."""
  if config.loss:
    raise ValueError(f'config.loss has the unknown fields {", ".join(config.loss)}; the objective clip has none.')
  if not config.tokenizer.vocab_size:
    raise ValueError('the objective clip needs captions; set config.tokenizer.vocab_size.')
  model = clip.of_run(config)
  if model.text_pool == 'max_id' and config.tokenizer.end != model.vocab_size - 1:
    raise ValueError(
      'model.text_pool "max_id" would not read captions to their end: the highest id is not that of the end of text, '
      'config.tokenizer.end; use "last".'
    )
  return CLIPObjective(model)
