"""Trains a DALL-E mini: cross-entropy of the image tokens given the caption (Dayma et al., 2021)."""

from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from dalle_jax.functional import losses
from dalle_jax.models import dalle_mini, variants
from dalle_jax.objectives.dalle import DALLEObjective, text_and_image

FROZEN = ('vqgan',)  # the frozen networks that it can use
DEFAULTS = dict(  # as in the objective dalle
  caption_dropout=0.0,
  token_noise=0.0,
  noise_spread=0.0,
  guidance=1.0,
)


class DALLEMiniObjective(DALLEObjective):
  """The player is 'dalle', as its sampler is that of a DALL-E; batches as in `objectives.dalle`."""

  model: dalle_mini.DALLEMini

  def loss(
    self, params: Any, ctx: Any, batch: Mapping[str, jax.Array]
  ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
    image = self._tokens(ctx, batch)
    text, _, inputs = self._inputs(ctx, batch['text'], image)
    loss, accuracy = losses.token_loss(self.model.apply({'params': params['dalle']}, text, inputs), image)
    return loss, ({'image_loss': loss, 'accuracy': accuracy}, ctx.mutable)

  def flops(self, batch: Mapping[str, Any]) -> float:
    return dalle_mini.flops(self.model, batch['text'].shape[0])


def from_config(config: ConfigDict, frozen_configs: Mapping[str, Any]) -> DALLEMiniObjective:
  """The objective of `config.model` and `config.loss` (`DEFAULTS` are its fields).

  The sizes of the text come from the tokenizer, those of the image from the frozen run 'vqgan'. Raises ValueError for
  an unknown field, without captions, or without a VQGAN.
  """
  c = ConfigDict({**DEFAULTS, **variants.fields('config.loss', DEFAULTS, config.loss)})
  variants.check_ranges('config.loss', c, ['caption_dropout', 'token_noise', 'noise_spread'])
  tokenizer, sizes = text_and_image(config, frozen_configs, 'dalle_mini')
  sizes |= dalle_mini.caption_ids(config.tokenizer)
  return DALLEMiniObjective(dalle_mini.build(**{**config.model, **sizes}), tokenizer, c)
