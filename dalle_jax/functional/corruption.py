"""What training hides from a transformer, so that it explains tokens by their cause and not by their neighbours."""

import jax
import jax.numpy as jnp


def replace_tokens(rng: jax.Array, tokens: jax.Array, rate: float, vocab: int, spread: float = 0.0) -> jax.Array:
  """int32[..., I] of which the fraction `rate`, chosen at random, are uniform draws of [0, vocab).

  With a `spread` each sequence has a rate of its own, uniform in [rate - spread, rate + spread].
  """
  where, what = jax.random.split(rng)
  if spread:
    own = jax.random.uniform(jax.random.fold_in(rng, 2), (*tokens.shape[:-1], 1), minval=-spread, maxval=spread)
    rate = jnp.clip(rate + own, 0.0, 1.0)
  noisy = jax.random.bernoulli(where, rate, tokens.shape)
  return jnp.where(noisy, jax.random.randint(what, tokens.shape, 0, vocab), tokens)


def drop_captions(rng: jax.Array, text: jax.Array, rate: float, padding: jax.Array) -> tuple[jax.Array, jax.Array]:
  """int32[..., N], of which the fraction `rate` is replaced by `padding` int32[N]; 1.0 for those kept, float32[...]."""
  drop = jax.random.bernoulli(rng, rate, text.shape[:-1])
  return jnp.where(drop[..., None], padding, text), 1.0 - drop
