"""Adversarial losses of VQGANs ("Taming Transformers", Esser et al., 2021, section 3.1) and of StoryGANc."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def hinge_discriminator(real: jax.Array, fake: jax.Array) -> jax.Array:
  """Hinge loss of the discriminator from logits of any shape, a scalar (Lim and Ye, 2017)."""
  return 0.5 * (jax.nn.relu(1.0 - real).mean() + jax.nn.relu(1.0 + fake).mean())


def hinge_generator(fake: jax.Array) -> jax.Array:
  """Hinge loss of the generator."""
  return -fake.mean()


def bce(logits: jax.Array, targets: jax.Array | float) -> jax.Array:
  """Mean binary cross-entropy of logits of any shape with targets in [0, 1], a scalar."""
  return optax.sigmoid_binary_cross_entropy(logits, targets).mean()


def bce_discriminator(real: jax.Array, fake: jax.Array, wrong: jax.Array) -> jax.Array:
  """Cross-entropy of logits for real, generated, and real but mismatched samples (GAN-CLS, Reed et al., 2016)."""
  return bce(real, 1.0) + 0.5 * (bce(fake, 0.0) + bce(wrong, 0.0))


def adaptive_weight(
  head: Callable[[jax.Array], jax.Array],
  kernel: jax.Array,
  nll: Callable[[jax.Array], jax.Array],
  adversarial: Callable[[jax.Array], jax.Array],
  limit: float = 1e4,
) -> jax.Array:
  """|d nll / d kernel| / (|d adversarial / d kernel| + 1e-4), in [0, limit], without a gradient.

  The gradients only go through `head`: `head(kernel)` is the image, of which `nll` and `adversarial` are losses.
  """
  image, vjp = jax.vjp(head, kernel)
  norm = lambda loss: jnp.sqrt(jnp.square(vjp(jax.grad(loss)(image))[0]).sum())
  return jax.lax.stop_gradient(jnp.clip(norm(nll) / (norm(adversarial) + 1e-4), 0.0, limit))
