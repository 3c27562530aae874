"""Contextual attention: a map takes over patches of another one ("Generative Image Inpainting with Contextual
Attention", Yu et al., CVPR 2018, section 4.1).

Axis legend: B batch, H W the target's positions, h w the source's, C channels, K = 9 C numbers of a patch of 3 x 3.
"""

import jax
import jax.numpy as jnp

from dalle_jax.layers.basic import patches

PATCH = 3  # positions a side
FLOOR = 1e-4  # of the norm of a patch


def contextual_attention(target: jax.Array, source: jax.Array, scale: float = 10.0) -> jax.Array:
  """What each place of the targets [B * T, H, W, C] finds in their source [B, h, w, C]: [B * T, H, W, C].

  The patch around each position of the target is compared with all patches of the source by their cosine; the mean of
  these, weighted by a softmax of `scale` times the cosines, is put in its place, and where patches overlap the result
  is their mean. What the paper does by convolutions with patches as kernels are slices and matrix products here.
  """
  rows = lambda x: x.reshape(len(source), -1, x.shape[-1])
  queries, keys = rows(patches(target, PATCH)), rows(patches(source, PATCH))
  cosines = jnp.einsum('bqk,bsk->bqs', unit(queries), unit(keys), preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(scale * cosines).astype(source.dtype)
  found = jnp.einsum('bqs,bsk->bqk', weights, keys).reshape(*target.shape[:3], -1)
  return put_back(found) / put_back(jnp.ones((1, *target.shape[1:3], PATCH**2), found.dtype))


def unit(x: jax.Array) -> jax.Array:
  """x[..., K] divided by its norm, or by 1e-4 where that is smaller; its gradient is finite where x is zero."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), FLOOR**2))


def put_back(found: jax.Array) -> jax.Array:
  """Adds the patches [B, H, W, 9 C] of all positions up, what lies outside left out: [B, H, W, C].

  The transpose of `patches`, a transposed convolution.
  """
  b, h, w, k = found.shape
  found, edge = found.reshape(b, h, w, PATCH, PATCH, k // PATCH**2), PATCH // 2
  canvas = jnp.zeros((b, h + 2 * edge, w + 2 * edge, found.shape[-1]), found.dtype)
  for i in range(PATCH):
    for j in range(PATCH):
      canvas = canvas.at[:, i : i + h, j : j + w].add(found[:, :, :, i, j])
  return canvas[:, edge : edge + h, edge : edge + w]
