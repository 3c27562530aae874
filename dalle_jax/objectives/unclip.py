"""Trains the diffusion decoder of unCLIP: images from CLIP embeddings and captions (Ramesh et al., 2022, 2.1)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dalle_jax.functional import corruption, diffusion
from dalle_jax.functional.pixels import resized, to_float, to_uint8
from dalle_jax.models import unclip, variants
from dalle_jax.models.clip_reader import Caption, ClipReader
from dalle_jax.objectives.prior import with_clip

DEFAULTS = dict(
  image_dropout=0.1,  # fraction of image embeddings replaced by the null embedding, for classifier-free guidance
  caption_dropout=0.5,  # fraction of captions replaced by the empty one
  guidance=1.0,  # guidance scale of the logged samples
  sampling_steps=25,  # of the logged samples
)
READS = ('clip',)  # the frozen networks that a step needs
# All that it can use: the others are only for sampling from the run.
FROZEN = (*READS, 'prior', 'upsampler', *(f'upsampler_{i}' for i in range(2, 10)))


class UnCLIPObjective:
  """The player is 'unclip'. Batches: image uint8[B, H, W, 3], clip_text int32[B, N].

  Images may be larger than the decoder's, for a CLIP that takes larger ones; the decoder is trained on resized ones.
  """

  rows_apart, convolutional = True, True  # see training.state.Objective

  def __init__(self, model: unclip.UnCLIP, reader: ClipReader, c: ConfigDict):
    self.model, self.reader, self.c = model, reader, c

  def init(self, rng: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[Any, Any]:
    noisy, t = jnp.zeros((1, *(self.model.image_size,) * 2, 3)), jnp.zeros(1, jnp.int32)
    embed, known = jnp.zeros((1, self.model.embed_dim)), jnp.ones(1, bool)
    return {'unclip': self.model.init(rng, noisy, t, embed, Caption.blank(self.reader.sizes), known)['params']}, {}

  def loss(
    self, params: Any, ctx: Any, batch: Mapping[str, jax.Array]
  ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
    """Squared `error` of the prediction, plus the variational `bound` (bits per dimension) for the learned variance."""
    drop, hide, time_key, noise_key = jax.random.split(ctx.rng, 4)
    text, images, d = batch['clip_text'], to_float(batch['image']), self.model.diffusion
    known = jnp.ones(len(text), bool)
    if ctx.train:
      text, _ = corruption.drop_captions(drop, text, self.c.caption_dropout, self.reader.empty_ids)
      known = jax.random.bernoulli(hide, 1 - self.c.image_dropout, known.shape)
    embed = self.reader.encode_image(ctx.frozen['clip'], images)
    caption = self.reader.encode_text(ctx.frozen['clip'], text)
    start = resized(images, self.model.image_size)
    t = jax.random.randint(time_key, (len(text),), 0, d.steps)
    noise = jax.random.normal(noise_key, start.shape)
    x = diffusion.add_noise(d, start, t, noise)
    out = self.model.apply({'params': params['unclip']}, x, t, embed, caption, known)
    simple, bound = (v.mean() for v in diffusion.losses(d, out, start, x, t, noise))
    return simple + bound * d.steps / 1000, ({'error': simple, 'bound': bound}, ctx.mutable)

  def sample(self, params: Any, ctx: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Each image next to one sampled from its CLIP embedding and its caption: uint8[B, H, 2 * W, 3]."""
    images, frozen = to_float(batch['image']), ctx.frozen['clip']
    keys = jax.random.split(ctx.rng, len(images))
    caption, embed = self.reader.encode_text(frozen, batch['clip_text']), self.reader.encode_image(frozen, images)
    empty = self.reader.encode_text(frozen, jnp.broadcast_to(self.reader.empty_ids, batch['clip_text'].shape))
    apply = lambda *args: self.model.apply({'params': params['unclip']}, *args)
    steps = self.model.diffusion.timesteps(self.c.sampling_steps)
    guidance = None if self.c.guidance == 1 else self.c.guidance
    samples = unclip.sample(self.model, apply, embed, caption, empty, keys, steps, guidance)
    return jnp.concatenate([to_uint8(x) for x in (resized(images, self.model.image_size), samples)], 2)


def from_config(config: ConfigDict, frozen_configs: Mapping[str, Any]) -> UnCLIPObjective:
  """The objective of `config.model` and `config.loss` (`DEFAULTS` are its fields), with the sizes of the frozen 'clip'.

  Raises ValueError for bad fields, without a CLIP, or for images smaller than the decoder's.
  """
  c = ConfigDict({**DEFAULTS, **variants.fields('config.loss', DEFAULTS, config.loss)})
  variants.check_ranges('config.loss', c, ['image_dropout', 'caption_dropout'])
  model, reader = with_clip(unclip.of_run, config, frozen_configs)
  variants.check_image_size(model.image_size, config.data)
  model.diffusion.timesteps(c.sampling_steps, 'config.loss.sampling_steps')
  return UnCLIPObjective(model, reader, c)
