"""Attention among the tokens of one stream of text and image: masks, the cache of keys and values, the product.

Axis legend: L layers, B batch, S stream, T the queries of one call, H heads, K head_dim.

The stream is a prefix of text, then the image tokens in raster order. For a prefix of 2 and 3 x 3 image tokens, with
queries down and keys across, image queries see (x) under each kind of attention

         full          row          column       conv (3 x 3)
  text   x........     x........     x........     x........
         xx.......     xx.......     xx.......     xx.......
  image  xxx......     xxx......     xxx......     xxx......
         xxxx.....     xxxx.....     xx.x.....     xxxx.....
         xxxxx....     xxxxx....     xx..x....     xx.xx....
         xxxxxx...     xxxxxx...     xxx..x...     xxxx.x...   and so on
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dalle_jax.layers.basic import Einsum, Init, constrain, normal_init, platform

KERNELS = ('auto', 'xla', 'cudnn')
KINDS = ('full', 'row', 'column', 'conv', 'wrapped')
CACHE_AXES = ('layers', 'batch', None, 'heads', None)


@functools.lru_cache(maxsize=32)
def stream_mask(kind: str, prefix: int, grid: tuple[int, int], conv_kernel: int = 11) -> np.ndarray:
  """Which keys each query sees, bool[S, S] for S = prefix + h * w (DALL-E, appendix B.1, figure 11).

  Everything is causal and sees all text before it. Among image tokens a query sees, beside itself, with 'full' all
  earlier ones, with 'row' the w ones before it in raster order, with 'column' those above it, with 'conv' the earlier
  ones of the conv_kernel x conv_kernel window around it; with 'wrapped' (ru-DALLE) that window goes on at the opposite
  edges of the picture. Raises ValueError for an unknown kind.
  """
  h, w = grid
  stream = np.arange(prefix + h * w)
  q, k = stream[:, None] - prefix, stream[None, :] - prefix  # image indices; negative in the text
  rows, columns = q // w - k // w, q % w - k % w
  reach = conv_kernel // 2
  match kind:
    case 'full':
      seen = np.ones((len(stream), len(stream)), bool)
    case 'row':
      seen = q - k <= w
    case 'column':
      seen = columns == 0
    case 'conv':
      seen = (np.abs(rows) <= reach) & (np.abs(columns) <= reach)
    case 'wrapped':
      near = lambda distance, size: np.minimum(distance % size, -distance % size) <= reach
      seen = near(rows, h) & near(columns, w)
    case _:
      raise ValueError(f'attention kind {kind!r} is unknown; there are {", ".join(KINDS)}.')
  return (k <= q) & (seen | (k < 0) | (q < 0))


def layer_kinds(pattern: str, depth: int) -> tuple[str, ...]:
  """The attention kind of every layer, e.g. 'row,column,row,row' repeated; 'paper' is DALL-E's (section 2.2).

  There layer i, from 1, is column when (i - 2) mod 4 = 0, else row, and the last one is conv. Raises ValueError for an
  unknown kind.
  """
  cycle = ('row', 'column', 'row', 'row') if pattern == 'paper' else tuple(p.strip() for p in pattern.split(','))
  if unknown := sorted(set(cycle) - set(KINDS)):
    raise ValueError(f'attention {pattern!r} has {", ".join(unknown)}; kinds are {", ".join(KINDS)}, or "paper".')
  kinds = tuple(cycle[i % len(cycle)] for i in range(depth))
  return (*kinds[:-1], 'conv') if pattern == 'paper' else kinds


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

  def repeat(self, n: int) -> 'KVCache':
    """Every row n times: candidates that share a prefix."""
    return jax.tree.map(lambda x: constrain(jnp.repeat(x, n, axis=1), CACHE_AXES), self)


class Attention(nn.Module):
  """Multi-head attention of x[B, T, D] over itself, or over a cache that x is written into first."""

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
    mask: jax.Array | None,
    cache: KVCache | None = None,
    layer: jax.Array | int = 0,
    offset: jax.Array | int = 0,
    causal: bool = False,
  ) -> tuple[jax.Array, KVCache | None]:
    """`mask` bool[T, keys] or [B, T, keys] says which of the first `keys` positions count; without it all do.

    With `causal`, x is all there is so far and each position sees itself and those before it; `mask` is not read.
    """
    d = x.shape[-1]
    shape, axes = (d, self.heads, d // self.heads), ('embed', 'heads', 'head_dim')
    inits = {'query': self.kernel_init, 'key': self.kernel_init, 'value': self.value_init or self.kernel_init}
    q, k, v = (
      Einsum(shape, axes, bias_axes=(1, 2), dtype=self.dtype, kernel_init=init, name=name)('BSD,DHK->BSHK', x)
      for name, init in inits.items()
    )
    out = Einsum(
      (*shape[1:], d), (*axes[1:], 'embed'), bias_axes=(2,), dtype=self.dtype, kernel_init=self.out_init, name='out'
    )
    if cache is not None:
      cache = cache.write(layer, offset, k, v)
    if causal:
      return out('BSHK,HKD->BSD', fused(q, k, v, self.kernel, is_causal=True)), cache
    if cache is not None:
      k, v = cache.read(layer, mask.shape[-1])
    if mask is not None:
      mask = jnp.asarray(mask)
      mask = mask[None, None] if mask.ndim == 2 else mask[:, None]  # (B or 1, 1, T, keys)
      return out('BSHK,HKD->BSD', jax.nn.dot_product_attention(q, k, v, mask=mask)), cache  # softmax in float32
    return out('BSHK,HKD->BSD', fused(q, k, v, self.kernel)), cache


@functools.cache
def has_flash() -> bool:
  """Whether cuDNN's flash attention runs on this backend."""
  device = jax.devices()[0]
  capability = str(getattr(device, 'compute_capability', ''))
  cuda = device.platform == 'gpu' and 'nvidia' in device.device_kind.lower()
  return cuda and capability.split('.')[0].isdigit() and int(capability.split('.')[0]) >= 8


def fused(q: jax.Array, k: jax.Array, v: jax.Array, kernel: str, is_causal: bool = False) -> jax.Array:
  """Attention without a mask of its own, [B, S, H, K], by `kernel`.

  'cudnn' is the flash attention of NVIDIA's GPUs, 'xla' runs everywhere; 'auto' is the former where it can be. Raises
  ValueError for an unknown kernel, and for 'cudnn' where it cannot be.
  """
  if kernel not in KERNELS:
    raise ValueError(f'attention kernel {kernel!r} is unknown; there are {", ".join(KERNELS)}.')
  odd = q.shape[1] % 2  # the kernel takes even lengths alone
  numbers = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
  fits = numbers and (is_causal or not odd) and platform() == 'gpu' and has_flash()
  if kernel == 'cudnn' and not fits:
    raise ValueError(
      f'attention kernel "cudnn" does not take {q.dtype}{list(q.shape)} on {jax.devices()[0].device_kind}; it needs '
      'an NVIDIA GPU (Ampere or later), bfloat16, heads of at most 128; use model.kernel="auto".'
    )
  kernel = 'xla' if kernel == 'xla' or not fits else 'cudnn'
  if odd and kernel == 'cudnn':  # nothing sees what comes after it
    longer = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    return jax.nn.dot_product_attention(*longer, is_causal=is_causal, implementation=kernel)[:, :-1]
  return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, implementation=kernel)
