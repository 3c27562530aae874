"""Contextual attention: a feature map is rebuilt from patches of another ("Generative Image Inpainting with Contextual
Attention", Yu et al., CVPR 2018, section 4.1).

Axis legend: B batch, H W the target's positions, h w the source's, C channels, K = 9 C numbers of a patch of 3 x 3.
"""

import jax
import jax.numpy as jnp

from dalle_jax.layers.basic import patches

PATCH = 3  # positions a side
MIN_NORM = 1e-4  # of a patch, before it is divided by


def contextual_attention(target: jax.Array, source: jax.Array, scale: float = 10.0) -> jax.Array:
  """Attention from the targets [B * T, H, W, C] to patches of their source [B, h, w, C]: [B * T, H, W, C].

  The patch around each target position is replaced by a mean of all source patches, weighted by a softmax of `scale`
  times their cosine similarity to it; where patches overlap, the result is their mean. The paper uses convolutions with
  patches as kernels; here they are slices and matrix products.
  """
  rows = lambda x: x.reshape(len(source), -1, x.shape[-1])
  queries, keys = rows(patches(target, PATCH)), rows(patches(source, PATCH))
  cosines = jnp.einsum('bqk,bsk->bqs', unit(queries), unit(keys), preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(scale * cosines).astype(source.dtype)
  out = jnp.einsum('bqs,bsk->bqk', weights, keys).reshape(*target.shape[:3], -1)
  return put_back(out) / put_back(jnp.ones((1, *target.shape[1:3], PATCH**2), out.dtype))


def unit(x: jax.Array) -> jax.Array:
  """x[..., K] divided by its norm, or by MIN_NORM if that is larger; the gradient is finite where x is zero."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), MIN_NORM**2))


def put_back(patches: jax.Array) -> jax.Array:
  """Sums the overlapping patches [B, H, W, 9 C] of all positions, cropped to the map: [B, H, W, C].

  The transpose of `layers.basic.patches`.
  """
  b, h, w, k = patches.shape
  patches, edge = patches.reshape(b, h, w, PATCH, PATCH, k // PATCH**2), PATCH // 2
  canvas = jnp.zeros((b, h + 2 * edge, w + 2 * edge, patches.shape[-1]), patches.dtype)
  for i in range(PATCH):
    for j in range(PATCH):
      canvas = canvas.at[:, i : i + h, j : j + w].add(patches[:, :, :, i, j])
  return canvas[:, edge : edge + h, edge : edge + w]
