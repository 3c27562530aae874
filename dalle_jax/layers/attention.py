"""Multi-head attention: self-attention under a mask, or over a stream of text and image tokens with a KV cache.

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
from dalle_jax.layers.rotary import Rotary, rotate

CACHE_AXES = ('batch', 'heads', None, None)
Pair = tuple[jax.Array, jax.Array]


class Stream(struct.PyTreeNode):
  """Marks x as a stream of text and image tokens, whose layers attend by `patterns`, which differ only in `kind`.

  Attributes:
    index: int32[], the number of the single image token that x is, when the others are in the cache; None when x is the
      stream from its first position on.
    rotary: the positions by which queries, keys and values are rotated; None for no rotation.
  """

  patterns: tuple[Pattern, ...] = struct.field(pytree_node=False)
  index: jax.Array | None = None
  rotary: Rotary | None = struct.field(pytree_node=False, default=None)


class KVCache(struct.PyTreeNode):
  """Keys and values so far: for every layer two pairs (k, v) of [B, H, S, K], the layout that decoding products read.

  Every layer has separate arrays: slicing them out of stacked ones for each token would cost more than the products.

  Attributes:
    text: keys and values of the prefix of the stream, which never change.
    image: those of image tokens, with room for more.
    shifted: what the next image tokens take over from these (`layers.token_shift`), for every layer two arrays
      [B, 1, S, D / 2], before attention and before the MLP; () without token shift.
  """

  text: tuple[Pair, ...] = ()
  image: tuple[Pair, ...] = ()
  shifted: tuple[jax.Array, ...] = ()

  @property
  def prefix(self) -> int:
    return self.text[0][0].shape[2]

  def append(self, prefix: int, k: jax.Array, v: jax.Array) -> 'KVCache':
    """Adds a layer with k and v [B, T, H, K] of a stream: `prefix` positions, then image tokens."""
    k, v = (x.swapaxes(1, 2) for x in (k, v))
    part = lambda x, where: constrain(x[:, :, where], CACHE_AXES)
    text, image = (tuple(part(x, where) for x in (k, v)) for where in (slice(prefix), slice(prefix, None)))
    return self.replace(text=(*self.text, text), image=(*self.image, image))

  def write(self, layer: int, index: jax.Array, k: jax.Array, v: jax.Array) -> 'KVCache':
    """Writes k and v [B, 1, H, K] of image token `index` into a layer; in place under jit."""
    put = lambda whole, new: jax.lax.dynamic_update_slice(
      whole, new.swapaxes(1, 2).astype(whole.dtype), (0, 0, index, 0)
    )
    pair = tuple(put(whole, new) for whole, new in zip(self.image[layer], (k, v), strict=True))
    return self.replace(image=(*self.image[:layer], pair, *self.image[layer + 1 :]))

  def extend(self, n: int) -> 'KVCache':
    """Makes room for n more image tokens."""
    pad = lambda x: constrain(jnp.pad(x, ((0, 0), (0, 0), (0, n), (0, 0))), CACHE_AXES)
    return self.replace(**jax.tree.map(pad, {'image': self.image, 'shifted': self.shifted}))

  @property
  def copies(self) -> int:
    """Copies of each row during decoding: 2 for a single row on a GPU, where XLA (jaxlib 0.10) compiles the norms and
    matrix-vector products of one row to more kernels that read more memory; otherwise 1."""
    rows = self.text[0][0].shape[0]
    return 2 if platform() == 'gpu' and rows == num_shards('batch') else 1

  def repeat(self, n: int) -> 'KVCache':
    """Repeats every row n times: candidates that share a prefix."""
    return jax.tree.map(lambda x: constrain(jnp.repeat(x, n, axis=0), CACHE_AXES), self)


class Attention(nn.Module):
  """Multi-head self-attention of x[B, T, D]; for `kernel` see `layers.kernels.stream_attention`."""

  heads: int
  dtype: jnp.dtype = jnp.float32
  kernel_init: Init = normal_init(0.02)
  out_init: Init = normal_init(0.02)
  value_init: Init | None = None  # kernel_init
  kernel: str = 'auto'
  head_dim: int = 0  # D // heads

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
    """Returns [B, T, D] and, if there is one, the cache with the keys and values of x.

    Args:
      mask: bool[T, T] or [B, T or 1, T], the keys that each query sees; all by default.
      stream: describes x as a stream of tokens; `mask` is then ignored.
      kind: index into `stream.patterns`; an int when there is a cache.
      layer: index of this layer in the cache.
    """
    d = x.shape[-1]
    shape, axes = (d, self.heads, self.head_dim or d // self.heads), ('embed', 'heads', 'head_dim')
    inits = {'query': self.kernel_init, 'key': self.kernel_init, 'value': self.value_init or self.kernel_init}
    q, k, v = (
      Einsum(shape, axes, bias_axes=(1, 2), dtype=self.dtype, kernel_init=init, name=name)('BSD,DHK->BSHK', x)
      for name, init in inits.items()
    )
    if stream is not None and stream.rotary:
      angles = stream.rotary.angles(shape[-1], q.shape[1], stream.index)
      q, k, v = (rotate(x, angles) for x in (q, k, v))
    q = constrain(q, ('batch', 'seq', 'heads', None))
    k, v = (
      constrain(x, ('batch', None, 'heads', None)) for x in (k, v)
    )  # with 'seq' sharded, every shard needs all keys
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
  """Self-attention under `mask`; softmax in float32."""
  if mask is None:
    return kernels.fused_attention(q, k, v, kernel)
  mask = jnp.asarray(mask)
  mask = mask[None, None] if mask.ndim == 2 else mask[:, None]  # (B or 1, 1, T, T)
  return kernels.xla_attention(q, k, v, mask)


def attend_by_kind(
  q: jax.Array, k: jax.Array, v: jax.Array, stream: Stream, kind: jax.Array | int, kernel: str
) -> jax.Array:
  """Self-attention of a stream from its first position on, by the pattern number `kind`."""
  branches = [functools.partial(kernels.stream_attention, pattern=p, kernel=kernel) for p in stream.patterns]
  if isinstance(kind, int):
    return branches[kind](q, k, v)
  # Recomputed in the backward pass: otherwise every layer would store residuals for every pattern.
  return kernels.save_for_remat(jax.lax.switch(kind, [jax.checkpoint(branch) for branch in branches], q, k, v))


def decode_attention(q: jax.Array, text: Pair, image: Pair, index: jax.Array, pattern: Pattern) -> jax.Array:
  """Attention of the image token q[B, 1, H, K] over all text and the image tokens that `pattern` lets it see."""
  length = image[0].shape[2]
  if pattern.kind == 'full':
    return kernels.attend(q, (*text, None), (*image, jnp.arange(length) <= index))
  visible = pattern.visible()
  if 4 * visible.shape[1] > length:  # gathering would cost more than reading everything
    mask = pattern.mask(pattern.prefix + length)[pattern.prefix :, pattern.prefix :]
    return kernels.attend(q, (*text, None), (*image, jnp.asarray(mask)[index]))
  keys = jnp.asarray(visible)[index]
  k, v = (jnp.take(x, jnp.maximum(keys, 0), axis=2) for x in image)
  return kernels.attend(q, (*text, None), (k, v, keys >= 0))
