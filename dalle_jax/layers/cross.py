"""Retro-fitted cross-attention from the stream of a trained transformer to a source (StoryDALL-E, section 3.3).

Axis legend: L layers with cross-attention, B sources, C source positions, R rows, T queries, D embed, H heads,
K head_dim.

Its parameters are a tree next to the transformer's, stacked over layers, so that a retro-fitted model contains the
pretrained tree unchanged. What does not depend on the stream (keys and values) is computed once, in training and in
sampling; the transformer passes it through its scan together with the other parameters as a `Context`.
"""

import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from dalle_jax.layers import kernels
from dalle_jax.layers.basic import constrain, layer_norm, normal_init, num_shards, param, product

AXES = ('batch', 'heads', None, None)  # of keys and values in one layer


class Context(struct.PyTreeNode):
  """Parameters, keys and values of cross-attention; the axis L is absent in the `Context` of a single layer.

  Attributes:
    scale, bias: [L, D], of the LayerNorm of the stream.
    query, query_bias: [L, D, H, K] and [L, H, K].
    k, v: [L, B, H, C, K], keys and values of the source.
    out, out_bias: [L, H, K, D] and [L, D].
  """

  scale: jax.Array
  bias: jax.Array
  query: jax.Array
  query_bias: jax.Array
  k: jax.Array
  v: jax.Array
  out: jax.Array
  out_bias: jax.Array

  def tile(self, n: int) -> 'Context':
    """Repeats all sources n times: the halves of classifier-free guidance."""
    put = lambda x: constrain(jnp.concatenate([x] * n, axis=-4), ('layers', *AXES)[-x.ndim :])
    return self.replace(k=put(self.k), v=put(self.v))

  def per_step(self, steps: int) -> 'Context':
    """[L, ...] -> [steps, L / steps, ...], for a scan. Raises ValueError when L is not divisible."""
    each = layers_per_step(len(self.scale), steps)
    return jax.tree.map(lambda x: x.reshape(steps, each, *x.shape[1:]), self)

  def layers(self) -> 'tuple[Context, ...]':
    """One `Context` for each layer, without the axis L."""
    return tuple(jax.tree.map(operator.itemgetter(i), self) for i in range(len(self.scale)))


def layers_per_step(layers: int, steps: int) -> int:
  """Layers with cross-attention in one scan step. Raises ValueError when they are not divisible."""
  if layers % steps:
    raise ValueError(
      f'{layers} layers with cross-attention do not fit {steps} steps of the scan; model.retro, the distance between '
      'them, must divide model.period, which a pretrained run determines.'
    )
  return layers // steps


class CrossAttention(nn.Module):
  """Parameters of `layers` cross-attention layers; maps a source [B, C, D] to their `Context`.

  The output projection starts at zero, so that the initial model is the pretrained one.
  """

  layers: int
  heads: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, source: jax.Array) -> Context:
    d = source.shape[-1]
    if d % self.heads:
      raise ValueError(f'a width of {d} is not divisible by {self.heads} heads; change either.')
    heads, inner = (self.heads, d // self.heads), normal_init(d**-0.5)
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    of_heads = ('layers', 'embed', 'heads', 'head_dim')

    def table(name, init, shape, axes):
      return param(self, name, init, axes, (self.layers, *shape))

    def project(name):
      kernel = table(f'{name}_kernel', inner, (d, *heads), of_heads)
      bias = table(f'{name}_bias', zeros, heads, ('layers', 'heads', 'head_dim'))
      return kernel.astype(self.dtype), bias.astype(self.dtype)

    scale, shift = (table(f'norm_{k}', i, (d,), ('layers', 'norm')) for k, i in (('scale', ones), ('bias', zeros)))
    query, query_bias = project('query')
    source = source.astype(self.dtype)

    def keys(name):
      kernel, bias = project(name)
      y = jnp.einsum('BCD,LDHK->LBHCK', source, kernel) + bias[:, None, :, None]
      return constrain(y, ('layers', *AXES))

    k, v = keys('key'), keys('value')
    out = table('out_kernel', zeros, (*heads, d), ('layers', 'heads', 'head_dim', 'embed')).astype(self.dtype)
    out_bias = table('out_bias', zeros, (d,), ('layers', 'embed')).astype(self.dtype)
    return Context(scale, shift, query, query_bias, k, v, out, out_bias)


def cross_attend(x: jax.Array, context: Context, attending: jax.Array) -> jax.Array:
  """Residual cross-attention of x[R, T, D] with one layer's context, only at the positions `attending`, bool[T].

  Each of the B sources belongs to R / B consecutive rows: frames of a story, candidates of a frame.
  """
  y = layer_norm(x, context.scale, context.bias, dtype=x.dtype)
  q = product(y, context.query) + context.query_bias
  # The rows of a source become one axis of queries, unless the sequence is sharded and must stay a separate axis.
  rows = q.shape[2:] if num_shards('seq') == 1 else q.shape[1:]
  out = kernels.attend(q.reshape(len(context.k), -1, *rows), (context.k, context.v, None))
  y = product(out.reshape(q.shape), context.out, 2) + context.out_bias
  return x + jnp.where(attending[:, None], y, 0)
