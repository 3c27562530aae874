"""Losses of token models."""

import jax
import jax.numpy as jnp
import optax


def token_loss(logits: jax.Array, tokens: jax.Array, weights: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """Mean cross-entropy in nats and accuracy over all tokens, scalars.

  float32[B, S, V] and int32[B, S]; `weights` float32[B] counts each sequence that much.
  """
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean(-1)
  right = (logits.argmax(-1) == tokens).mean(-1)
  if weights is None:
    return loss.mean(), right.mean()
  total = jnp.maximum(weights.sum(), 1e-6)
  return (loss * weights).sum() / total, (right * weights).sum() / total
