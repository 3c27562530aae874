"""Trains the diffusion prior of unCLIP: CLIP image embeddings from captions (Ramesh et al., 2022, section 2.2)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dalle_jax.functional import corruption, diffusion
from dalle_jax.functional.pixels import to_float
from dalle_jax.models import prior, variants
from dalle_jax.models.clip_reader import Caption, ClipReader
from dalle_jax.models.pooling import normalize

DEFAULTS = dict(
  caption_dropout=0.1,  # fraction of captions replaced by the empty one, for classifier-free guidance in sampling
)
FROZEN = ('clip',)  # the frozen networks that it can use


class PriorObjective:
  """The player is 'prior'. Batches: image uint8[B, H, W, 3], clip_text int32[B, N], both for the frozen 'clip'.

  CLIP embeddings all point in similar directions. The means and standard deviations of their entries are averaged over
  all batches, to standardize them for diffusion (`counts`). A run that starts from another run keeps its statistics.
  """

  def __init__(self, model: prior.Prior, reader: ClipReader, c: ConfigDict, counts: bool = True):
    self.model, self.reader, self.c, self.counts = model, reader, c, counts

  def init(self, rng: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[Any, Any]:
    size, caption = self.model.embed_dim, Caption.blank(self.reader.sizes)
    params = {'prior': self.model.init(rng, jnp.zeros((1, size)), jnp.zeros(1, jnp.int32), caption)['params']}
    if not self.counts:
      return params, {}
    # The average starts with a batch of mean 0 and variance 1, so that a small first batch gives no deviation near 0.
    return params, {'batches': jnp.ones(()), 'mean': jnp.zeros(size), 'square': jnp.ones(size)}

  def loss(
    self, params: Any, ctx: Any, batch: Mapping[str, jax.Array]
  ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
    """Squared error of the predicted standardized embedding x0; the metric `cosine` is its cosine to the true one."""
    drop, time_key, noise_key = jax.random.split(ctx.rng, 3)
    text, clip = batch['clip_text'], ctx.frozen['clip']
    if ctx.train and self.c.caption_dropout:
      text, _ = corruption.drop_captions(drop, text, self.c.caption_dropout, self.reader.empty_ids)
    apply = lambda *args, **options: self.model.apply({'params': params['prior']}, *args, **options)
    embed = self.reader.encode_image(clip, to_float(batch['image']))
    start, d = apply(embed, method='normal'), self.model.diffusion
    t = jax.random.randint(time_key, (len(text),), 0, d.steps)
    noise = jax.random.normal(noise_key, start.shape)
    x = diffusion.add_noise(d, start, t, noise)
    out = apply(x, t, self.reader.encode_text(clip, text))
    loss = diffusion.losses(d, out, start, x, t, noise)[0].mean()
    cosine = (normalize(out) * normalize(start)).sum(-1).mean()
    return loss, ({'cosine': cosine}, count(ctx.mutable, embed) if ctx.train and self.counts else ctx.mutable)

  def after_update(self, params: Any, mutable: Any) -> Any:
    if not self.counts:
      return params
    mean = mutable['mean']
    std = jnp.sqrt(jnp.maximum(mutable['square'] - jnp.square(mean), 1e-4))
    return {**params, 'prior': {**params['prior'], 'mean': mean, 'std': std}}


def count(counted: Any, embed: jax.Array) -> Any:
  """Update the means of entries and of their squares with one more batch."""
  batches = counted['batches'] + 1
  move = lambda old, new: old + (new - old) / batches
  return {
    'batches': batches,
    'mean': move(counted['mean'], embed.mean(0)),
    'square': move(counted['square'], jnp.square(embed).mean(0)),
  }


def with_clip(
  of_run: Callable[..., tuple[Any, ClipReader]], config: ConfigDict, frozen_configs: Mapping[str, Any]
) -> tuple[Any, ClipReader]:
  """The network of a config and the reader of its frozen CLIP. Raises ValueError without a CLIP with an image tower."""
  if 'clip' not in frozen_configs:
    raise ValueError(f'the objective {config.objective} needs a CLIP; set config.frozen.clip to the run of a CLIP.')
  model, reader = of_run(config, frozen_configs['clip'])
  reader.model.check_image_tower()
  return model, reader


def from_config(config: ConfigDict, frozen_configs: Mapping[str, Any]) -> PriorObjective:
  """The objective of `config.model` and `config.loss` (`DEFAULTS` are its fields), with the sizes of the frozen 'clip'.

  Raises ValueError for an unknown field, or without a CLIP.
  """
  c = ConfigDict({**DEFAULTS, **variants.fields('config.loss', DEFAULTS, config.loss)})
  variants.check_ranges('config.loss', c, ['caption_dropout'])
  return PriorObjective(*with_clip(prior.of_run, config, frozen_configs), c, counts=not config.init.path)
