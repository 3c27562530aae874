"""Attention of x over itself, over what a mask lets it see, or over a stream whose keys and values are cached.

Axis legend: L layers, B batch, S stream, T the queries of one call, H heads, K head_dim.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dalle_jax.layers import kernels
from dalle_jax.layers.basic import Einsum, Init, constrain, normal_init
from dalle_jax.layers.patterns import Pattern

CACHE_AXES = ('layers', 'batch', None, 'heads', None)


@struct.dataclass
class Stream:
  """That x is a stream of text and image tokens, whose layers see by `patterns`, which differ in kind alone.

  Attributes:
    position: int32[], of the one token that x is, the others being in the cache; None when x is the stream from its
      first position on.
    end: nothing from this position on need be read.
  """

  patterns: tuple[Pattern, ...] = struct.field(pytree_node=False)
  position: jax.Array | None = None
  end: int = struct.field(pytree_node=False, default=0)


@struct.dataclass
class KVCache:
  """Keys and values of every layer and position so far: two arrays [L, B, S, H, K]."""

  k: jax.Array
  v: jax.Array

  @classmethod
  def zeros(cls, layers: int, batch: int, length: int, heads: int, head_dim: int, dtype: jnp.dtype) -> 'KVCache':
    x = constrain(jnp.zeros((layers, batch, length, heads, head_dim), dtype), CACHE_AXES)
    return cls(x, x)

  def write(self, layer: jax.Array | int, offset: jax.Array | int, k: jax.Array, v: jax.Array) -> 'KVCache':
    """With k and v [B, T, H, K] of one layer at positions offset, ..., offset + T - 1; in place under jit."""
    put = lambda whole, part: jax.lax.dynamic_update_slice(
      whole, part[None].astype(whole.dtype), (layer, 0, offset, 0, 0)
    )
    return KVCache(put(self.k, k), put(self.v, v))

  def read(self, layer: jax.Array | int, length: int) -> tuple[jax.Array, jax.Array]:
    """k and v [B, length, H, K] of one layer, from position 0."""
    take = lambda whole: jax.lax.dynamic_slice(
      whole, (layer, 0, 0, 0, 0), (1, whole.shape[1], length, *whole.shape[3:])
    )[0]
    return take(self.k), take(self.v)

  def take(self, layer: jax.Array | int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """k and v [B, n, H, K] of one layer at int32[n] `positions`."""
    return tuple(jnp.moveaxis(x[layer, :, positions], 0, 1) for x in (self.k, self.v))

  def repeat(self, n: int) -> 'KVCache':
    """Every row n times: candidates that share a prefix."""
    return jax.tree.map(lambda x: constrain(jnp.repeat(x, n, axis=1), CACHE_AXES), self)


class Attention(nn.Module):
  """Multi-head attention of x[B, T, D]; `kernel` as of `layers.kernels.over_stream`."""

  heads: int
  dtype: jnp.dtype = jnp.float32
  kernel_init: Init = normal_init(0.02)
  out_init: Init = normal_init(0.02)
  value_init: Init | None = None  # kernel_init
  kernel: str = 'auto'

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array | None = None,
    stream: Stream | None = None,
    kind: jax.Array | int = 0,
    cache: KVCache | None = None,
    layer: jax.Array | int = 0,
  ) -> tuple[jax.Array, KVCache | None]:
    """[B, T, D], and the cache with the keys and values of x, where there is one.

    Args:
      mask: bool[T, T] or [B, T, T], which positions of x count; all do by default.
      stream: what x is a part of; `mask` is not read then.
      kind: the index of this layer's pattern.
      layer: whose part of the cache is this one's.
    """
    d = x.shape[-1]
    shape, axes = (d, self.heads, d // self.heads), ('embed', 'heads', 'head_dim')
    inits = {'query': self.kernel_init, 'key': self.kernel_init, 'value': self.value_init or self.kernel_init}
    q, k, v = (
      Einsum(shape, axes, bias_axes=(1, 2), dtype=self.dtype, kernel_init=init, name=name)('BSD,DHK->BSHK', x)
      for name, init in inits.items()
    )
    q = constrain(q, ('batch', 'seq', 'heads', None))
    k, v = (constrain(x, ('batch', None, 'heads', None)) for x in (k, v))  # with 'seq' split, all see all keys
    if cache is not None:
      cache = cache.write(layer, 0 if stream.position is None else stream.position, k, v)
    if stream is None:
      y = masked(q, k, v, mask, self.kernel)
    elif stream.position is None:
      y = by_kind(q, k, v, stream, kind, self.kernel)
    else:
      y = look_back(q, cache, layer, stream, kind)
    out = Einsum(
      (*shape[1:], d), (*axes[1:], 'embed'), bias_axes=(2,), dtype=self.dtype, kernel_init=self.out_init, name='out'
    )
    return out('BSHK,HKD->BSD', y), cache


def masked(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, kernel: str) -> jax.Array:
  """Attention of x over itself, as far as `mask` goes; softmax in float32."""
  if mask is None:
    return kernels.fused(q, k, v, kernel)
  mask = jnp.asarray(mask)
  mask = mask[None, None] if mask.ndim == 2 else mask[:, None]  # (B or 1, 1, T, T)
  return jax.nn.dot_product_attention(q, k, v, mask=mask)


def by_kind(q: jax.Array, k: jax.Array, v: jax.Array, stream: Stream, kind: jax.Array | int, kernel: str) -> jax.Array:
  """Attention of a stream from its first position on, by the pattern `kind`."""
  ways = [functools.partial(kernels.over_stream, pattern=p, kernel=kernel) for p in stream.patterns]
  if isinstance(kind, int):
    return ways[kind](q, k, v)
  # Computed again in the backward pass: else every layer would keep room for the scores of every pattern.
  return jax.lax.switch(kind, [jax.checkpoint(way) for way in ways], q, k, v)


def look_back(q: jax.Array, cache: KVCache, layer: jax.Array | int, stream: Stream, kind: jax.Array | int) -> jax.Array:
  """Attention of the one image token q[B, 1, H, K] over what it sees of the cache, and no more of that than needed."""
  patterns, position = stream.patterns, stream.position
  if {p.kind for p in patterns} == {'full'}:
    k, v = cache.read(layer, stream.end)
    return jax.nn.dot_product_attention(q, k, v, mask=(jnp.arange(stream.end) <= position)[None, None, None])
  prefix, tables = patterns[0].prefix, [p.seen() for p in patterns]
  most = max(t.shape[1] for t in tables)
  tables = np.stack([np.pad(t, ((0, 0), (0, most - t.shape[1])), constant_values=-1) for t in tables])
  seen = jnp.asarray(tables)[kind, position - prefix]  # of image tokens, int32[most]
  keys, values = (x[:, None] for x in cache.take(layer, prefix + jnp.maximum(seen, 0)))
  return kernels.two_parts(q[:, None], keys, values, (seen >= 0)[None, None], *cache.read(layer, prefix))[:, 0]
