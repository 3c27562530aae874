"""Token shift: part of a token's features comes from the tokens before it (DALLE-pytorch, after RWKV by Bo Peng).

A text token takes the first half of its features from the one before it. An image token takes the first quarter from
the token above and the second one from the token to the left. What is outside of text or image counts as zero.

Axis legend: B batch, S stream, I image tokens so far, D embed.
"""

import jax
import jax.numpy as jnp

from dalle_jax.layers.patterns import Pattern


def shift(x: jax.Array, pattern: Pattern) -> jax.Array:
  """Shifts a stream from its first position on, x[B, S, D], whose prefix and grid are those of `pattern`."""
  n, quarter, width = x.shape[1], x.shape[-1] // 4, pattern.grid[1]
  before = lambda x, k: jnp.pad(x, ((0, 0), (k, 0), (0, 0)))[:, :n]
  image = jnp.arange(n)[:, None] - pattern.prefix  # negative in the text
  first, second, rest = jnp.split(x, (quarter, 2 * quarter), -1)
  above = jnp.where(image < width, 0, before(first, width))
  first = jnp.where(image < 0, before(first, 1), above)
  second = jnp.where((image >= 0) & (image % width == 0), 0, before(second, 1))
  return jnp.concatenate([first, second, rest], -1)


def taken_over(x: jax.Array, pattern: Pattern) -> jax.Array:
  """The features that later image tokens take from the image tokens of a stream x[B, S, D]: [B, 1, I, D / 2]."""
  return x[:, None, pattern.prefix :, : x.shape[-1] // 2]


def shift_one(x: jax.Array, past: jax.Array, index: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
  """Shifts the image token number `index`, x[B, 1, D], of an image `width` tokens wide.

  `past` [B, 1, I, D / 2] is `taken_over` of the image tokens before it, and returned with this one.
  """
  half = past.shape[-1]
  past = jax.lax.dynamic_update_slice(past, x[:, None, :, :half].astype(past.dtype), (0, 0, index, 0))
  token = lambda i: jax.lax.dynamic_slice_in_dim(past, jnp.maximum(i, 0), 1, axis=2)[:, 0]
  above = jnp.where(index < width, 0, token(index - width)[..., : half // 2])
  left = jnp.where(index % width == 0, 0, token(index - 1)[..., half // 2 :])
  return jnp.concatenate([above, left, x[..., half:]], -1).astype(x.dtype), past
