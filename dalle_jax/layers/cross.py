"""Retro-fitted cross-attention: the stream of a trained transformer looks at a source (StoryDALL-E, section 3.3).

Axis legend: L layers that look, B sources, R rows, T queries, C source positions, D embed, H heads, K head_dim.

Its parameters live beside the transformer's, stacked over layers, so that a retro-fitted model is the pretrained tree
with another one next to it. Whatever does not depend on the stream (keys and values) is computed once, for training
and for sampling alike; the transformer carries the rest through its scan as a `Context`.
"""

import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from dalle_jax.layers import kernels
from dalle_jax.layers.basic import boxed, constrain, layer_norm, normal_init, num_shards, product

AXES = ('batch', 'heads', None, None)  # of keys and values in one layer


class Context(struct.PyTreeNode):
  """What the looking layers need beside the stream; every leaf begins with L, or with nothing for one layer.

  Attributes:
    scale, bias: [L, D], of the norm of the stream.
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
    """All sources, n times over: the halves of guidance."""
    put = lambda x: constrain(jnp.concatenate([x] * n, axis=-4), ('layers', *AXES)[-x.ndim :])
    return self.replace(k=put(self.k), v=put(self.v))

  def per_step(self, turns: int) -> 'Context':
    """[L, ...] -> [turns, L / turns, ...], for a scan. Raises ValueError when L is not divisible."""
    each = layers_per_step(len(self.scale), turns)
    return jax.tree.map(lambda x: x.reshape(turns, each, *x.shape[1:]), self)

  def layers(self) -> 'tuple[Context, ...]':
    """One a layer, without L."""
    return tuple(jax.tree.map(operator.itemgetter(i), self) for i in range(len(self.scale)))


def layers_per_step(layers: int, turns: int) -> int:
  """How many layers look in a turn. Raises ValueError when they are not divisible."""
  if layers % turns:
    raise ValueError(
      f'{layers} layers with cross-attention do not fit {turns} turns of the scan; make model.period a multiple of the '
      'distance between them.'
    )
  return layers // turns


class CrossAttention(nn.Module):
  """Parameters of `layers` cross-attentions and, for a source [B, C, D], their `Context`.

  The output projection starts at zero: the first step is that of the pretrained model.
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
      return self.param(name, boxed(init, axes), (self.layers, *shape), jnp.float32)

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
  """x[R, T, D] plus what it finds in the source of one layer, at the positions of bool[T] `attending` alone.

  Of B sources each has R / B rows, one after the other: frames of a story, candidates of a frame.
  """
  y = layer_norm(x, context.scale, context.bias, dtype=x.dtype)
  q = product(y, context.query) + context.query_bias
  # Rows of a source are one axis of queries; where the sequence is split over a mesh, it stays an axis of its own.
  rows = q.shape[2:] if num_shards('seq') == 1 else q.shape[1:]
  found = kernels.attend(q.reshape(len(context.k), -1, *rows), (context.k, context.v, None))
  y = product(found.reshape(q.shape), context.out, 2) + context.out_bias
  return x + jnp.where(attending[:, None], y, 0)
