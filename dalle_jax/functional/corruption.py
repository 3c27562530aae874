"""Corruption of training inputs: token noise, caption dropout, image noise."""

import jax
import jax.numpy as jnp


def replace_tokens(rng: jax.Array, tokens: jax.Array, rate: float, vocab: int, spread: float = 0.0) -> jax.Array:
  """Replaces a random fraction `rate` of tokens int32[..., I] by uniform draws from [0, vocab).

  The model then relies less on neighbouring tokens and more on what it is conditioned on. With a `spread` each sequence
  has its own rate, uniform in [rate - spread, rate + spread].
  """
  where, what = jax.random.split(rng)
  if spread:
    offset = jax.random.uniform(jax.random.fold_in(rng, 2), (*tokens.shape[:-1], 1), minval=-spread, maxval=spread)
    rate = jnp.clip(rate + offset, 0.0, 1.0)
  noisy = jax.random.bernoulli(where, rate, tokens.shape)
  return jnp.where(noisy, jax.random.randint(what, tokens.shape, 0, vocab), tokens)


def drop_captions(rng: jax.Array, text: jax.Array, rate: float, padding: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Replaces a fraction `rate` of captions int32[..., N] by `padding` int32[N]; also returns 1.0 for those kept.

  The second result is float32[...].
  """
  drop = jax.random.bernoulli(rng, rate, text.shape[:-1])
  return jnp.where(drop[..., None], padding, text), 1.0 - drop


def damage(rng: jax.Array, images: jax.Array, blur: float, noise: float) -> jax.Array:
  """Blurs each of float32[B, H, W, 3] by a 3 x 3 Gaussian and adds normal noise.

  Their standard deviations are drawn for each image from U(0, blur), in pixels, and U(0, noise).
  """
  how, what = jax.random.split(rng)
  if blur:
    sigma = jnp.maximum(jax.random.uniform(how, (len(images), 1), maxval=blur), 1e-3)
    weights = jnp.exp(-0.5 * jnp.square(jnp.arange(-1, 2) / sigma))  # (B, 3)
    weights = (weights / weights.sum(1, keepdims=True))[:, :, None, None, None]
    for axis in (1, 2):
      padded = jnp.pad(images, [(0, 0), *((int(a == axis),) * 2 for a in (1, 2)), (0, 0)], mode='edge')
      n = images.shape[axis]
      parts = (jax.lax.slice_in_dim(padded, i, i + n, axis=axis) for i in range(3))
      images = sum(weights[:, i] * part for i, part in enumerate(parts))
  if noise:
    amount = jax.random.uniform(jax.random.fold_in(rng, 2), (len(images), 1, 1, 1), maxval=noise)
    images = images + amount * jax.random.normal(what, images.shape)
  return images
