"""Losses of adversarial training: of a VQGAN ("Taming Transformers", Esser et al., 2021, section 3.1), of a GAN."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def hinge_discriminator(real: jax.Array, fake: jax.Array) -> jax.Array:
  """Hinge loss of logits of any shape, a scalar (Lim and Ye, 2017)."""
  return 0.5 * (jax.nn.relu(1.0 - real).mean() + jax.nn.relu(1.0 + fake).mean())


def hinge_generator(fake: jax.Array) -> jax.Array:
  """The generator's side of `hinge_discriminator`."""
  return -fake.mean()


def bce(logits: jax.Array, targets: jax.Array | float) -> jax.Array:
  """Mean binary cross-entropy of logits of any shape with targets in [0, 1], a scalar."""
  return optax.sigmoid_binary_cross_entropy(logits, targets).mean()


def bce_discriminator(real: jax.Array, fake: jax.Array, wrong: jax.Array) -> jax.Array:
  """Cross-entropy of logits for real, generated and real but wrongly described samples (Reed et al., 2016, GAN-CLS)."""
  return bce(real, 1.0) + 0.5 * (bce(fake, 0.0) + bce(wrong, 0.0))


def adaptive_weight(
  head: Callable[[jax.Array], jax.Array],
  kernel: jax.Array,
  nll: Callable[[jax.Array], jax.Array],
  adversarial: Callable[[jax.Array], jax.Array],
  limit: float = 1e4,
) -> jax.Array:
  """|grad of nll| / (|grad of adversarial| + 1e-4) with respect to the last kernel, in [0, limit], a constant.

  The gradients go through `head` alone: `head(kernel)` is the picture, of which `nll` and `adversarial` are losses.
  """
  picture, pull = jax.vjp(head, kernel)
  norm = lambda loss: jnp.sqrt(jnp.square(pull(jax.grad(loss)(picture))[0]).sum())
  return jax.lax.stop_gradient(jnp.clip(norm(nll) / (norm(adversarial) + 1e-4), 0.0, limit))
