"""Attention of x over itself, over what a mask lets it see, or over a stream whose keys and values are cached.

Axis legend: L layers, B batch, S stream, T the queries of one call, H heads, K head_dim.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from dalle_jax.layers import kernels
from dalle_jax.layers.basic import Einsum, Init, constrain, normal_init, num_shards, platform
from dalle_jax.layers.patterns import Pattern

CACHE_AXES = ('batch', 'heads', None, None)
Pair = tuple[jax.Array, jax.Array]


class Stream(struct.PyTreeNode):
  """That x is a stream of text and image tokens, whose layers see by `patterns`, which differ in kind alone.

  Attributes:
    index: int32[], which image token the one that x is, the others being in the cache; None when x is the stream from
      its first position on.
  """

  patterns: tuple[Pattern, ...] = struct.field(pytree_node=False)
  index: jax.Array | None = None


class KVCache(struct.PyTreeNode):
  """Keys and values so far: of every layer two pairs [B, H, S, K], as the products with a query read them.

  Layers are arrays of their own, and nothing is cut out of an array for a token: that would take longer than products.

  Attributes:
    text: of the prefix of the stream, which stays as it is.
    image: of image tokens, and room for more.
  """

  text: tuple[Pair, ...] = ()
  image: tuple[Pair, ...] = ()

  @property
  def prefix(self) -> int:
    return self.text[0][0].shape[2]

  def append(self, prefix: int, k: jax.Array, v: jax.Array) -> 'KVCache':
    """With one layer more, which has k and v [B, T, H, K] of a stream: `prefix` positions, then image tokens."""
    k, v = (x.swapaxes(1, 2) for x in (k, v))
    part = lambda x, where: constrain(x[:, :, where], CACHE_AXES)
    text, image = (tuple(part(x, where) for x in (k, v)) for where in (slice(prefix), slice(prefix, None)))
    return KVCache((*self.text, text), (*self.image, image))

  def write(self, layer: int, index: jax.Array, k: jax.Array, v: jax.Array) -> 'KVCache':
    """With k and v [B, 1, H, K] of image token `index` in that layer; in place under jit."""
    put = lambda whole, new: jax.lax.dynamic_update_slice(
      whole, new.swapaxes(1, 2).astype(whole.dtype), (0, 0, index, 0)
    )
    pair = tuple(put(whole, new) for whole, new in zip(self.image[layer], (k, v), strict=True))
    return self.replace(image=(*self.image[:layer], pair, *self.image[layer + 1 :]))

  def extend(self, n: int) -> 'KVCache':
    """With room for n more image tokens."""
    pad = lambda x: constrain(jnp.pad(x, ((0, 0), (0, 0), (0, n), (0, 0))), CACHE_AXES)
    return self.replace(image=jax.tree.map(pad, self.image))

  @property
  def copies(self) -> int:
    """How often each row had better be there: twice where a GPU has one alone. XLA (of jaxlib 0.10) makes the norms and
    products of a single row of more kernels, which read more."""
    rows = self.text[0][0].shape[0]
    return 2 if platform() == 'gpu' and rows == num_shards('batch') else 1

  def repeat(self, n: int) -> 'KVCache':
    """Every row n times: candidates that share a prefix."""
    return jax.tree.map(lambda x: constrain(jnp.repeat(x, n, axis=0), CACHE_AXES), self)


class Attention(nn.Module):
  """Multi-head attention of x[B, T, D]; `kernel` as of `layers.kernels.stream_attention`."""

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
    layer: int = 0,
  ) -> tuple[jax.Array, KVCache | None]:
    """[B, T, D], and the cache with the keys and values of x, where there is one.

    Args:
      mask: bool[T, T] or [B, T, T], which positions of x count; all do by default.
      stream: what x is a part of; `mask` is not read then.
      kind: the index of this layer's pattern; with a cache an int.
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
    if stream is None:
      y = masked(q, k, v, mask, self.kernel)
    elif stream.index is None:
      cache = None if cache is None else cache.append(stream.patterns[0].prefix, k, v)
      y = attend_by_kind(q, k, v, stream, kind, self.kernel)
    else:
      cache = cache.write(layer, stream.index, k, v)
      y = decode_attention(q, cache.text[layer], cache.image[layer], stream.index, stream.patterns[kind])
    out = Einsum(
      (*shape[1:], d), (*axes[1:], 'embed'), bias_axes=(2,), dtype=self.dtype, kernel_init=self.out_init, name='out'
    )
    return out('BSHK,HKD->BSD', y), cache


def masked(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, kernel: str) -> jax.Array:
  """Attention of x over itself, as far as `mask` goes; softmax in float32."""
  if mask is None:
    return kernels.fused_attention(q, k, v, kernel)
  mask = jnp.asarray(mask)
  mask = mask[None, None] if mask.ndim == 2 else mask[:, None]  # (B or 1, 1, T, T)
  return kernels.xla_attention(q, k, v, mask)


def attend_by_kind(
  q: jax.Array, k: jax.Array, v: jax.Array, stream: Stream, kind: jax.Array | int, kernel: str
) -> jax.Array:
  """Attention of a stream from its first position on, by the pattern `kind`."""
  ways = [functools.partial(kernels.stream_attention, pattern=p, kernel=kernel) for p in stream.patterns]
  if isinstance(kind, int):
    return ways[kind](q, k, v)
  # Computed again in the backward pass: else every layer would keep room for the scores of every pattern.
  return kernels.save_for_remat(jax.lax.switch(kind, [jax.checkpoint(way) for way in ways], q, k, v))


def decode_attention(q: jax.Array, text: Pair, image: Pair, index: jax.Array, pattern: Pattern) -> jax.Array:
  """Attention of the image token q[B, 1, H, K] over what it sees: all text, and of the image by `pattern`."""
  length = image[0].shape[2]
  if pattern.kind == 'full':
    return kernels.attend(q, (*text, None), (*image, jnp.arange(length) <= index))
  seen = pattern.visible()
  if 4 * seen.shape[1] > length:  # to gather costs more than to read it all
    mask = pattern.mask(pattern.prefix + length)[pattern.prefix :, pattern.prefix :]
    return kernels.attend(q, (*text, None), (*image, jnp.asarray(mask)[index]))
  seen = jnp.asarray(seen)[index]
  k, v = (jnp.take(x, jnp.maximum(seen, 0), axis=2) for x in image)
  return kernels.attend(q, (*text, None), (k, v, seen >= 0))
