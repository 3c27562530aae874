"""The contrastive loss of CLIP (Radford et al., 2021, figure 3)."""

import jax
import jax.numpy as jnp
import optax


def contrastive(images: jax.Array, texts: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Loss and accuracy, scalars, of finding the matching row in the batch, averaged over both directions.

  Row i of `images` matches row i of `texts`, float32[B, E] of unit length; `scale` multiplies the cosines. B is the
  global batch: under jit over several devices the matrix of logits spans them all.
  """
  logits = scale * jnp.matmul(images, texts.T, precision=jax.lax.Precision.HIGHEST)
  labels = jnp.arange(len(logits))
  sides = (logits, logits.T)
  losses = [optax.softmax_cross_entropy_with_integer_labels(x, labels).mean() for x in sides]
  right = [(x.argmax(-1) == labels).mean() for x in sides]
  return sum(losses) / 2, sum(right) / 2
