"""Trains a VQGAN: reconstruction, perceptual, quantizer and adversarial losses (Esser et al., 2021, section 3.1)."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dalle_jax.functional import gan
from dalle_jax.functional.pixels import to_float, to_uint8
from dalle_jax.layers import quantize
from dalle_jax.models import lpips, patchgan, variants, vqgan

Metrics = dict[str, jax.Array]
DEFAULTS = dict(
  l1_weight=1.0,
  l2_weight=0.0,
  lpips_weight=1.0,  # needs config.frozen.lpips; without it there is no perceptual loss
  beta=0.25,  # weight of the commitment loss; that of the codebook loss is 1
  ema_decay=0.0,  # 0.0: the codebook is trained by gradients; else it is moving averages with this decay
  usage_decay=0.99,  # without ema_decay: decay of the average usage by which dead codes are detected
  revive=0.03,  # a code used less than this fraction of the mean is dead and re-initialised; 0.0: never
  data_init=True,  # the first batch initialises the codebook; with config.init.path the default is False
  window=100,  # steps over which used_codes_window counts
  kl_weight=1e-8,  # Gumbel: weight of the KL loss
  temperature=1.0,  # Gumbel: initial temperature
  temperature_end=0.0625,  # Gumbel: temperature at the last step, reached by a cosine
  disc_weight=0.0,  # weight of the GAN loss; 0.0: no discriminator
  disc_start=0.0,  # when the GAN loss starts: a fraction of training up to 1.0, above it a step
  disc_variant='base',  # of models/patchgan.py
  disc=ConfigDict(),  # other fields of models/patchgan.py
  adaptive_limit=1e4,  # upper bound of the adaptive weight of the GAN loss
)
FROZEN = ('lpips',)  # the frozen networks that it can use


class VQGANObjective:
  """The players are 'vqgan' and, with a discriminator, 'discriminator'. Batches: image uint8[B, H, W, 3]."""

  convolutional = True  # see training.state.Objective

  def __init__(self, model: vqgan.VQGAN, c: ConfigDict, steps: int, perceptual: lpips.LPIPS | None = None):
    self.model, self.c, self.steps, self.perceptual = model, c, steps, perceptual
    self.disc = patchgan.build(c.disc_variant, dtype=model.dtype, **c.disc) if c.disc_weight else None
    self.disc_start = c.disc_start if c.disc_start > 1 else c.disc_start * steps

  def init(self, rng: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[Any, Any]:
    images = jnp.zeros((1, *batch['image'].shape[1:]))
    params = {'vqgan': self.model.init(rng, images)['params']}
    if self.disc:
      params['discriminator'] = self.disc.init(jax.random.fold_in(rng, 1), images)['params']
    mutable = {'last_used': jnp.full(self.model.num_codes, -self.c.window, jnp.int32)}
    if self.model.quantizer == 'nearest':
      mutable['codebook'] = quantize.codebook_state(self.model.num_codes, self.model.code_dim, self.c.data_init)
    return params, mutable

  def loss(self, params: Any, ctx: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, tuple[Metrics, Any]]:
    c, images = self.c, to_float(batch['image'])
    noise, shuffle = jax.random.split(ctx.rng)
    temperature = self.temperature(ctx.step)
    out = self.model.apply({'params': params['vqgan']}, images, noise if ctx.train else None, temperature)

    distances = lambda recon: self._distances(ctx, recon, images)
    nll = lambda recon: sum(c[f'{k}_weight'] * v for k, v in distances(recon).items())
    metrics = distances(out.recon) | {f'{k}_loss': v for k, v in out.quantized.losses.items()}
    total = nll(out.recon)
    if self.model.quantizer == 'gumbel':
      total += c.kl_weight * out.quantized.losses['kl']
      metrics['temperature'] = temperature
    else:
      total += c.beta * out.quantized.losses['commitment']
      total += 0.0 if c.ema_decay else out.quantized.losses['codebook']
    if self.disc:
      adversarial, values = self._adversarial(params, ctx, images, out, nll)
      total += adversarial
      metrics |= values
    mutable, values = self._codebook(params, ctx, out.quantized, shuffle)
    return total, (metrics | values, mutable)

  def temperature(self, step: jax.Array) -> jax.Array:
    """Temperature of the Gumbel softmax: a cosine from `temperature` to `temperature_end`."""
    done = jnp.minimum(step / self.steps, 1.0)
    end = self.c.temperature_end
    return end + (self.c.temperature - end) * 0.5 * (1 + jnp.cos(math.pi * done))

  def _distances(self, ctx: Any, recon: jax.Array, images: jax.Array) -> Metrics:
    distances = {'l1': jnp.abs(recon - images).mean(), 'l2': jnp.square(recon - images).mean()}
    if self.perceptual:
      distances['lpips'] = self.perceptual.apply({'params': ctx.frozen['lpips']}, recon, images).mean()
    return distances

  def _adversarial(self, params: Any, ctx: Any, images: jax.Array, out: vqgan.VQGANOutput, nll: Any):
    """The generator loss with the discriminator fixed, plus the discriminator loss with the reconstructions fixed."""
    stop = jax.lax.stop_gradient
    logits = lambda disc, x: self.disc.apply({'params': disc}, x)
    generator_loss = lambda recon: gan.hinge_generator(logits(stop(params['discriminator']), recon))

    last = stop(params['vqgan']['conv_out'])

    def head(kernel: jax.Array) -> jax.Array:
      variables = {'params': {'conv_out': {**last, 'kernel': kernel}}}
      return self.model.apply(variables, stop(out.features), method='to_pixels')

    weight = gan.adaptive_weight(head, last['kernel'], nll, generator_loss, self.c.adaptive_limit)
    started = (ctx.step >= self.disc_start).astype(jnp.float32)
    real, fake = logits(params['discriminator'], images), logits(params['discriminator'], stop(out.recon))
    generator, discriminator = generator_loss(out.recon), gan.hinge_discriminator(real, fake)
    metrics = {
      'generator_loss': generator,
      'disc_loss': discriminator,
      'logits_real': real.mean(),
      'logits_fake': fake.mean(),
      'adaptive_weight': weight,
    }
    return started * (self.c.disc_weight * weight * generator + discriminator), metrics

  def _codebook(self, params: Any, ctx: Any, quantized: quantize.Quantized, rng: jax.Array) -> tuple[Any, Metrics]:
    c, counts, metrics = self.c, *quantize.usage(quantized.codes, self.model.num_codes)
    if not ctx.train:
      return ctx.mutable, metrics
    last_used = jnp.where(counts > 0, ctx.step, ctx.mutable['last_used'])
    metrics['used_codes_window'] = (last_used > ctx.step - c.window).sum().astype(jnp.float32)
    mutable = {'last_used': last_used}
    if self.model.quantizer == 'nearest':
      mutable['codebook'] = quantize.update_codebook(
        ctx.mutable['codebook'],
        params['vqgan']['quantize']['embedding'],
        quantized,
        rng,
        ctx.step,
        decay=c.ema_decay or c.usage_decay,
        revive=c.revive,
        average=c.ema_decay > 0,
      )
    return mutable, metrics

  def after_update(self, params: Any, mutable: Any) -> Any:
    """Write moving averages and revived codes into the codebook."""
    if 'codebook' not in mutable:
      return params
    table = quantize.write_codebook(mutable['codebook'], params['vqgan']['quantize']['embedding'])
    return {**params, 'vqgan': {**params['vqgan'], 'quantize': {'embedding': table}}}

  def sample(self, params: Any, ctx: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Each image next to its reconstruction: uint8[B, H, 2 * W, 3]."""
    recon = self.model.apply({'params': params['vqgan']}, to_float(batch['image'])).recon
    return jnp.concatenate([batch['image'], to_uint8(recon)], 2)


def from_config(config: ConfigDict, frozen_configs: Mapping[str, Any]) -> VQGANObjective:
  """The objective of `config.model` and `config.loss` (`DEFAULTS` are its fields).

  The perceptual loss needs the frozen run 'lpips'; without it there is only the pixel loss. Raises ValueError for an
  unknown field or a value out of range.
  """
  defaults = {**DEFAULTS, 'data_init': not config.init.path}
  c = ConfigDict({**defaults, **variants.fields('config.loss', defaults, config.loss)})
  sizes = ['beta', *(name for name in c if name.endswith('_weight'))]
  variants.check_ranges('config.loss', c, ['ema_decay', 'usage_decay'], sizes)
  for name in ('temperature', 'temperature_end'):
    if c[name] <= 0:  # logits are divided by it
      raise ValueError(f'config.loss.{name} is {c[name]}; expected a temperature above 0.')
  model = vqgan.build(**config.model)
  model.grid(config.data.image_size)
  perceptual = None
  if c.lpips_weight and 'lpips' in frozen_configs:
    perceptual = lpips.build(**{**frozen_configs['lpips']['model'], 'dtype': model.dtype})
  else:
    weights = ' + '.join(f'{w} {name}' for name, w in (('L1', c.l1_weight), ('L2', c.l2_weight)) if w)
    print(f'VQGAN: no LPIPS weights (config.frozen.lpips), so there is only the pixel loss, {weights}', flush=True)
  return VQGANObjective(model, c, config.train.steps, perceptual)
