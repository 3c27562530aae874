"""Losses of token models."""

import jax
import jax.numpy as jnp
import optax


def token_loss(
  logits: jax.Array, tokens: jax.Array, weights: jax.Array | None = None, first: float = 1.0
) -> tuple[jax.Array, jax.Array]:
  """Mean cross-entropy in nats and accuracy over all tokens, scalars.

  `logits` are float32[B, S, V], `tokens` int32[B, S]; `weights`, float32[B], weighs sequences. The first token of a
  sequence weighs as much as `first` others. A token counts as correct if no other has a larger logit.
  """
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
  share = jnp.ones(loss.shape[-1]).at[0].set(first)
  loss = (loss * share).sum(-1) / share.sum()
  # Not by argmax, which on a CPU takes longer than the exponentials; the loss computes the largest logit anyway.
  right = (jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0] >= logits.max(-1)).mean(-1)
  if weights is None:
    return loss.mean(), right.mean()
  total = jnp.maximum(weights.sum(), 1e-6)
  return (loss * weights).sum() / total, (right * weights).sum() / total
