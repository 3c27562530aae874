"""Trains a diffusion upsampler of unCLIP: images from small, slightly degraded ones (Ramesh et al., 2022, 2.1)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dalle_jax.functional import corruption, diffusion
from dalle_jax.functional.pixels import resized, to_float, to_uint8
from dalle_jax.models import upsampler, variants

DEFAULTS = dict(
  blur=0.6,  # largest standard deviation of the blur of small images in training, in their pixels
  noise=0.0,  # largest standard deviation of the noise added to small images in training, for pixels in [-1, 1]
  crop=0,  # side of the crops of large images to train on, in pixels; 0: whole images
  sampling_steps=7,  # of the logged samples
)
FROZEN = ()  # it uses no frozen network


class UpsamplerObjective:
  """The player is 'upsampler'. Batches: image uint8[B, H, W, 3].

  In sampling the small images are generated ones; training on degraded ones makes the upsampler robust to their flaws.
  """

  rows_apart, convolutional = True, True  # see training.state.Objective

  def __init__(self, model: upsampler.Upsampler, c: ConfigDict):
    self.model, self.c = model, c

  def init(self, rng: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[Any, Any]:
    image = lambda size: jnp.zeros((1, size, size, 3))
    m = self.model
    params = m.init(rng, image(m.image_size), jnp.zeros(1, jnp.int32), image(m.low_size))['params']
    return {'upsampler': params}, {}

  def loss(
    self, params: Any, ctx: Any, batch: Mapping[str, jax.Array]
  ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
    """Squared error of the prediction."""
    blur, crop, time_key, noise_key = jax.random.split(ctx.rng, 4)
    start, low = self._both(batch)
    if ctx.train:
      low = corruption.damage(blur, low, self.c.blur, self.c.noise)
    start, low = self._crop(crop, start, low)
    d = self.model.diffusion
    t = jax.random.randint(time_key, (len(start),), 0, d.steps)
    noise = jax.random.normal(noise_key, start.shape)
    x = diffusion.add_noise(d, start, t, noise)
    out = self.model.apply({'params': params['upsampler']}, x, t, low)
    return diffusion.losses(d, out, start, x, t, noise)[0].mean(), ({}, ctx.mutable)

  def adopt(self, params: Any, config: Mapping[str, Any], rng: jax.Array) -> Any:
    """Parameters of another run, without the network for its last step, if it has one (Karlo), which is not trained."""
    return {'upsampler': params['upsampler']}

  def sample(self, params: Any, ctx: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Each image next to the resized small one and the sample from that: uint8[B, H, 3 * W, 3]."""
    start, low = self._both(batch)
    keys, steps = jax.random.split(ctx.rng, len(start)), self.model.diffusion.timesteps(self.c.sampling_steps)
    apply = lambda *args: self.model.apply({'params': params['upsampler']}, *args)
    samples = upsampler.sample(self.model, apply, low, keys, steps)
    panels = start, jax.image.resize(low, start.shape, 'cubic'), samples
    return jnp.concatenate([to_uint8(x) for x in panels], 2)

  def _both(self, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The large and the small images."""
    start = resized(to_float(batch['image']), self.model.image_size)
    return start, resized(start, self.model.low_size)

  def _crop(self, key: jax.Array, start: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same random crop of all images of a batch, large and small."""
    factor = self.model.image_size // self.model.low_size
    side = self.c.crop // factor or self.model.low_size
    y, x = jax.random.randint(key, (2,), 0, self.model.low_size - side + 1)
    part = lambda p, by: jax.lax.dynamic_slice(p, (0, y * by, x * by, 0), (len(p), side * by, side * by, 3))
    return part(start, factor), part(low, 1)


def from_config(config: ConfigDict, frozen_configs: Mapping[str, Any]) -> UpsamplerObjective:
  """The objective of `config.model` and `config.loss` (`DEFAULTS` are its fields).

  Raises ValueError for bad fields, if one size is not a multiple of the other, or for images smaller than the model's.
  """
  c = ConfigDict({**DEFAULTS, **variants.fields('config.loss', DEFAULTS, config.loss)})
  model = upsampler.of_run(config)
  factor = model.image_size // model.low_size
  if model.image_size % model.low_size or factor < 2:
    raise ValueError(
      f'model.image_size {model.image_size} is not a multiple of model.low_size {model.low_size}; change one of them.'
    )
  variants.check_ranges('config.loss', c, sizes=['blur', 'noise', 'crop'])
  variants.check_image_size(model.image_size, config.data)
  model.diffusion.timesteps(c.sampling_steps, 'config.loss.sampling_steps')
  if c.crop % factor or not 0 <= c.crop <= model.image_size:
    raise ValueError(f'config.loss.crop is {c.crop}; expected a multiple of {factor}, at most {model.image_size}.')
  return UpsamplerObjective(model, c)
