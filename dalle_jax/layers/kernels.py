"""Attention kernels over q, k, v [B, S, H, K]: XLA everywhere (blockwise where a pattern is sparse), cuDNN's flash
attention on NVIDIA GPUs, Pallas' splash attention on TPUs.

Axis legend: B batch, S stream, T queries, n keys, H heads, K head_dim; R rows (columns) of the image, whose queries
see the same keys.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import NamedSharding, PartitionSpec

from dalle_jax.layers.basic import inner_product, mesh_axes, num_shards, platform
from dalle_jax.layers.patterns import Pattern

KERNELS = ('auto', 'xla', 'cudnn', 'splash')
MAX_QUERIES = 256  # in a block of causal attention by XLA
LANES = 128  # of a TPU: the smallest block of a mask
MASKED = -1e30  # the score of a key that is not visible
FLASH, MASKED_FLASH = 8, 9  # compute capability from which cuDNN has it, also with a mask: Ampere, Hopper
ATTENTION_OUT = 'attention'  # the name by which remat policies save the output of attention


def stream_attention(q: jax.Array, k: jax.Array, v: jax.Array, pattern: Pattern, kernel: str = 'auto') -> jax.Array:
  """Self-attention of a whole stream, from its first position on, by a pattern: [B, S, H, K].

  'auto' takes splash on a TPU, cuDNN where it is available, and XLA otherwise. Row, column and convolutional patterns
  cost less than 'full' with splash, which skips blocks in which nothing is visible, and with XLA, which goes through
  the image by rows (columns; a convolutional window spans a few rows). With cuDNN they cost what 'full' does, which is
  less than with XLA, where scores go through memory. Where cuDNN takes no mask, XLA computes these patterns even if
  'cudnn' is asked for. Raises ValueError for a kernel that is unknown or not available on this platform.
  """
  check(kernel)
  if platform() == 'tpu' and kernel in ('auto', 'splash'):
    return splash_attention(q, k, v, pattern)
  if pattern.kind == 'full' or q.shape[1] <= pattern.prefix:
    return fused_attention(q, k, v, kernel, is_causal=True)
  if kernel != 'xla' and flash_takes(q, is_causal=True, masked=True):
    return fused_attention(q, k, v, kernel, is_causal=True, mask=pattern.mask(q.shape[1]))
  if pattern.kind == 'wrapped':
    return xla_attention(q, k, v, jnp.asarray(pattern.mask(q.shape[1]))[None, None])
  return blockwise_attention(q, k, v, pattern)


def check(kernel: str) -> None:
  """Raises ValueError for a kernel that is unknown or not available on this platform."""
  if kernel not in KERNELS:
    raise ValueError(f'attention kernel {kernel!r} is unknown; there are {", ".join(KERNELS)}.')
  if kernel == 'splash' and platform() != 'tpu':
    raise ValueError(f'attention kernel "splash" is for TPUs, this is {platform()}; use model.kernel="auto".')
  if kernel == 'cudnn' and capability() < FLASH:
    device = jax.devices()[0].device_kind
    raise ValueError(
      f'attention kernel "cudnn" is for NVIDIA GPUs (Ampere or later), this is {device}; use model.kernel="auto".'
    )


# --- XLA, cuDNN


def xla_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
  """Attention by XLA under an arbitrary mask, bool[B or 1, H or 1, T, S]."""
  return attend(q, (k.swapaxes(1, 2), v.swapaxes(1, 2), mask))


def capability() -> int:
  """Major CUDA compute capability of the GPU that is compiled for; 0 if it is not an NVIDIA GPU.

  For a GPU that is not present (`dalle_jax.aot`) this is a lower bound.
  """
  device, target = jax.devices()[0], jax.sharding.get_abstract_mesh().abstract_device
  if platform() != 'gpu':
    return 0
  if target and target.device_kind != device.device_kind:  # not present; `aot.machines` has none before Ampere
    return 8 if 'A100' in target.device_kind else 9
  major = str(getattr(device, 'compute_capability', '')).split('.')[0]
  return int(major) if 'nvidia' in device.device_kind.lower() and major.isdigit() else 0


def flash_takes(q: jax.Array, is_causal: bool, masked: bool = False) -> bool:
  """Whether cuDNN's flash attention supports q[B, T, H, K] over as many keys, on this device and mesh."""
  supported = capability() >= (MASKED_FLASH if masked else FLASH)
  fits = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
  even = q.shape[1] % 2 == 0  # the kernel needs even lengths; only causal attention can be padded to one
  whole = num_shards('seq') == 1  # it cannot attend from the queries of one device to the keys of all
  return supported and fits and (is_causal or even) and whole


def fused_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, kernel: str, is_causal: bool = False, mask: np.ndarray | None = None
) -> jax.Array:
  """Full or causal self-attention by `kernel`; with cuDNN a mask, bool[T, T], may restrict causal attention further.

  'cudnn' is flash attention on NVIDIA GPUs, 'xla' runs everywhere, 'auto' is the former where it is available. Raises
  ValueError for an unknown kernel, and for 'cudnn' where it is not available.
  """
  check(kernel)
  fits = flash_takes(q, is_causal, mask is not None)
  if kernel == 'cudnn' and not fits:
    raise ValueError(
      f'attention kernel "cudnn" does not take {q.dtype}{list(q.shape)} over {num_shards("seq")} parts of a sequence; '
      'it needs bfloat16 or float16, heads of at most 128, even lengths where there is no mask, and the whole '
      'sequence on one device; use model.kernel="auto".'
    )
  if not fits or kernel == 'xla':
    k, v = (x.swapaxes(1, 2) for x in (k, v))
    return causal_attention(q, k, v) if is_causal else attend(q, (k, v, None))
  n, odd = q.shape[1], q.shape[1] % 2
  if mask is not None:
    mask = jnp.pad(jnp.asarray(mask), (0, odd), constant_values=True)[None, None]
  q, k, v = (jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))) for x in (q, k, v))  # causal: the padding is not visible
  return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=is_causal, implementation='cudnn')[:, :n]


def is_flash(primitive: Any, *_: Any, **params: Any) -> bool:
  """Remat policy that saves the outputs of cuDNN's forward pass, whose residuals have no checkpoint name."""
  return primitive.name.startswith('dot_product_attention_fwd')


def save_for_remat(x: jax.Array) -> jax.Array:
  """Names an output of attention, so that remat policies can save it."""
  return checkpoint_name(x, ATTENTION_OUT)


Parts = tuple[tuple[jax.Array, jax.Array, jax.Array | None], ...]


def attend(q: jax.Array, *parts: tuple[jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
  """Attention of q[B, T, H, K] or q[B, R, T, H, K] over the keys of all `parts` jointly; softmax in float32.

  A part is (k, v, mask): k and v [B, H, n, K], in the layout that the products read, or [B, H, R, n, K] with separate
  keys for each of R; mask is bool, broadcastable to the scores [B, H, T, n] or [B, H, R, T, n], or None. Every query
  must see at least one key. Keys shared by R are never broadcast over R: XLA for CPUs (jaxlib 0.10) reads beyond the
  end of a second operand that is broadcast over the batch. Returns the shape of q.
  """
  return _attend(q * q.shape[-1] ** -0.5, parts)


def _equations(q: jax.Array, k: jax.Array) -> tuple[str, str]:
  """The `jnp.einsum` axes of the queries and of a part's keys."""
  rows = 'r' * (q.ndim - 4)
  return f'bh{rows}tk', f'bh{rows if k.ndim == q.ndim else ""}nk'


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _scores(q: jax.Array, parts: Parts) -> list[jax.Array]:
  """Scores of q[B, H, T, K] (or [B, H, R, T, K]) with the keys of each part, float32[B, H, T, n]."""
  every = []
  for k, _, mask in parts:
    q_axes, k_axes = _equations(q, k)
    scores = _product(f'{q_axes},{k_axes}->{q_axes[:-1]}n', q, k)
    every.append(scores if mask is None else jnp.where(mask, scores, MASKED))
  return every


@jax.custom_vjp
def _attend(q: jax.Array, parts: Parts) -> jax.Array:
  return _attend_fwd(q, parts)[0]


def _attend_fwd(q: jax.Array, parts: Parts) -> tuple[jax.Array, tuple[Any, ...]]:
  """The output, and residuals with the logsumexp of the scores in their place (FlashAttention, Dao et al., 2022)."""
  scores = _scores(jnp.moveaxis(q, -2, 1), parts)
  bounds = np.cumsum([s.shape[-1] for s in scores])[:-1]
  single_query = q.shape[-3] == 1
  if single_query:  # decoding: one softmax is one kernel on a GPU, a softmax in parts is a dozen
    scores = [jnp.concatenate(scores, -1)]
  top = functools.reduce(jnp.maximum, [s.max(-1, keepdims=True) for s in scores if s.shape[-1]])
  exps = [jnp.exp(s - top) for s in scores]
  total = sum(e.sum(-1, keepdims=True) for e in exps)
  weights = [(e / total).astype(q.dtype) for e in exps]
  if single_query:
    weights = jnp.split(weights[0], bounds, -1)
  out = 0.0
  for w, (_, v, _) in zip(weights, parts, strict=True):
    q_axes, v_axes = _equations(q, v)
    out += _product(f'{q_axes[:-1]}n,{v_axes}->{q_axes}', w, v)
  out = save_for_remat(jnp.moveaxis(out, 1, -2).astype(q.dtype))
  return out, (q, parts, out, save_for_remat(top + jnp.log(total)))


def _attend_bwd(residuals: tuple[Any, ...], dout: jax.Array) -> tuple[jax.Array, Any]:
  """FlashAttention, algorithm 4, without its tiles."""
  q, parts, out, logsumexp = residuals
  delta = inner_product(dout, out)  # rowsum(P * dP) = rowsum(dO * O), without a sum over keys
  q, dout, delta = (jnp.moveaxis(x, -2, 1) for x in (q, dout, delta))
  dq, dparts = 0.0, []
  for k, v, mask in parts:
    # Scores with the keys first: two of the three gradients are then products without a transpose.
    separate = k.ndim == q.ndim  # each of R has its own keys
    q_axes, k_axes = _equations(q, k)
    p_axes = f'{k_axes[:-1]}t' if separate else f'bhn{q_axes[2:-1]}'
    keys_first = lambda x, separate=separate: jnp.moveaxis(x, -1, -2 if separate else 2)
    scores = _product(f'{k_axes},{q_axes}->{p_axes}', k, q)
    if mask is not None:
      mask = jnp.expand_dims(mask, tuple(range(q.ndim - mask.ndim)))
      scores = jnp.where(keys_first(mask), scores, MASKED)
    p = jnp.exp(scores - keys_first(logsumexp))
    dp = _product(f'{k_axes},{q_axes}->{p_axes}', v, dout)
    ds = (p * (dp - keys_first(delta))).astype(q.dtype)
    dq += _product(f'{p_axes},{k_axes}->{q_axes}', ds, k)
    dk = _product(f'{p_axes},{q_axes}->{k_axes}', ds, q)
    dv = _product(f'{p_axes},{q_axes}->{k_axes}', p.astype(q.dtype), dout)
    dparts.append((dk.astype(k.dtype), dv.astype(v.dtype), None))
  return jnp.moveaxis(dq, 1, -2).astype(q.dtype), tuple(dparts)


_attend.defvjp(_attend_fwd, _attend_bwd)


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Causal attention of q[B, T, H, K] over k, v[B, H, T, K] by XLA.

  Goes by blocks of queries over the keys up to the block's last, so that only half of all products are computed.
  """
  return _causal(q * q.shape[-1] ** -0.5, k, v)


def _blocks(n: int) -> list[tuple[int, int]]:
  """(first, end) of each block of queries."""
  count = -(-n // MAX_QUERIES) if num_shards('seq') == 1 else 1
  bounds = [n * i // count for i in range(count + 1)]
  return list(itertools.pairwise(bounds))


def _visible(k: jax.Array, v: jax.Array, first: int, end: int) -> Parts:
  """The keys and values that the queries first, ..., end - 1 see."""
  return ((k[:, :, :end], v[:, :, :end], jnp.asarray(np.tri(end - first, end, first, dtype=bool))),)


@jax.custom_vjp
def _causal(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  return _causal_fwd(q, k, v)[0]


def _causal_fwd(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[Any, ...]]:
  blocks = [_attend_fwd(q[:, a:b], _visible(k, v, a, b)) for a, b in _blocks(q.shape[1])]
  out, logsumexp = [out for out, _ in blocks], [residuals[-1] for _, residuals in blocks]
  return jnp.concatenate(out, axis=1), (q, k, v, out, logsumexp)


def _causal_bwd(residuals: tuple[Any, ...], dout: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  q, k, v, out, logsumexp = residuals
  bounds = _blocks(q.shape[1])
  blocks = [
    _attend_bwd((q[:, a:b], _visible(k, v, a, b), *saved), dout[:, a:b])
    for (a, b), *saved in zip(bounds, out, logsumexp, strict=True)
  ]
  # The keys of a block are visible from its own queries on. Left to JAX, these would be sums of arrays padded to the
  # whole length.
  dk, dv = (
    jnp.concatenate(
      [sum(parts[0][i][:, :, a:b] for _, parts in blocks[block:]) for block, (a, b) in enumerate(bounds)], axis=2
    )
    for i in (0, 1)
  )
  return jnp.concatenate([dq for dq, _ in blocks], axis=1), dk, dv


_causal.defvjp(_causal_fwd, _causal_bwd)


# --- Blocks of an image


@functools.lru_cache(maxsize=32)
def _block_mask(pattern: Pattern, rows: int, reach: int) -> np.ndarray:
  """Mask of the queries of a row over the keys of `reach` rows above it and itself, bool[R, w, (reach + 1) * w].

  With 'column' blocks are columns, and `reach` is 0.
  """
  w = pattern.grid[1]
  mask = Pattern(pattern.kind, 0, (rows, w), pattern.conv_kernel).mask(rows * w).reshape(rows, w, rows, w)
  if pattern.kind == 'column':
    return np.stack([mask[:, c, :, c] for c in range(w)])
  mask = np.pad(mask, ((0, 0), (0, 0), (reach, 0), (0, 0)))
  return np.stack([mask[r, :, r : r + reach + 1].reshape(w, -1) for r in range(rows)])


def blockwise_attention(q: jax.Array, k: jax.Array, v: jax.Array, pattern: Pattern) -> jax.Array:
  """Sparse patterns except 'wrapped' by XLA: each row (column) of the image over the text and the rows it sees."""
  n, prefix, w = q.shape[1], pattern.prefix, pattern.grid[1]
  rows = -(-(n - prefix) // w)
  window = {'conv': pattern.conv_kernel // 2, 'causal_conv': pattern.conv_kernel - 1}
  reach = min({'row': 1, 'own_row': 0, 'column': 0, **window}[pattern.kind], rows - 1)
  text, k, v = q[:, :prefix], k.swapaxes(1, 2), v.swapaxes(1, 2)
  text_keys = (k[:, :, :prefix], v[:, :, :prefix])

  def blocks(x):  # (..., rows, w, K)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, prefix + rows * w - n), (0, 0)))[:, :, prefix:]
    x = x.reshape(*x.shape[:2], rows, w, x.shape[-1])
    return x.swapaxes(2, 3) if pattern.kind == 'column' else x

  def with_rows_above(x):
    if not reach:
      return x
    x = jnp.pad(x, ((0, 0), (0, 0), (reach, 0), (0, 0), (0, 0)))
    return jnp.concatenate([x[:, :, i : i + rows] for i in range(reach + 1)], axis=3)

  image = jnp.moveaxis(blocks(q.swapaxes(1, 2)), 1, -2)
  mask = jnp.asarray(_block_mask(pattern, rows, reach))
  out = attend(image, (*text_keys, None), (with_rows_above(blocks(k)), with_rows_above(blocks(v)), mask))
  out = out.swapaxes(1, 2) if pattern.kind == 'column' else out
  out = out.reshape(len(q), rows * w, *q.shape[2:])[:, : n - prefix]
  return jnp.concatenate([causal_attention(text, *text_keys), out], axis=1)


# --- TPU


@functools.lru_cache(maxsize=32)
def _order(pattern: Pattern, n: int) -> np.ndarray | None:
  """Order that makes the keys of an image column contiguous; None where raster order does."""
  if pattern.kind != 'column' or n <= pattern.prefix:
    return None
  image = np.arange(n - pattern.prefix)
  by_column = image[np.lexsort((image // pattern.grid[1], image % pattern.grid[1]))]
  return np.concatenate([np.arange(pattern.prefix), pattern.prefix + by_column])


@functools.lru_cache(maxsize=32)
def _tiles(pattern: Pattern, n: int, length: int) -> splash_attention_mask.Mask:
  """The mask of a stream padded from n to `length`, in the order of `_order`; padding only sees itself."""
  if pattern.kind == 'full':
    return splash_attention_mask.CausalMask((length, length))
  mask, order = np.eye(length, dtype=bool), _order(pattern, n)
  visible = pattern.mask(n)
  mask[:n, :n] = visible if order is None else visible[np.ix_(order, order)]
  return splash_attention_mask.NumpyMask(mask)


def splash_attention(q: jax.Array, k: jax.Array, v: jax.Array, pattern: Pattern, interpret: bool = False) -> jax.Array:
  """Splash attention: blocks of the mask without a visible key are skipped. Sharded over batch, heads and sequence."""
  n, heads = q.shape[1], q.shape[2]
  mesh = jax.sharding.get_abstract_mesh()
  # Batch or heads stay unsharded if they do not divide; the sequence is padded.
  batch_axes, head_axes = (
    mesh_axes(name) if size % num_shards(name) == 0 else () for name, size in (('batch', len(q)), ('heads', heads))
  )
  seq_axes = mesh_axes('seq')
  head_shards, seq_shards = num_shards('heads') if head_axes else 1, num_shards('seq')
  unit = LANES * seq_shards
  length = -(-n // unit) * unit
  block = next(b for b in (512, 384, 256, LANES) if length // seq_shards % b == 0) if pattern.kind == 'full' else LANES
  names = ('block_q', 'block_kv', 'block_kv_compute', 'block_q_dkv', 'block_kv_dkv', 'block_kv_dkv_compute')
  sizes = splash_attention_kernel.BlockSizes(**dict.fromkeys((*names, 'block_q_dq', 'block_kv_dq'), block))
  run = splash_attention_kernel.make_splash_mha(
    splash_attention_mask.MultiHeadMask([_tiles(pattern, n, length)] * heads),
    block_sizes=sizes,
    head_shards=head_shards,
    q_seq_shards=seq_shards,
    interpret=interpret,
    residual_checkpoint_name=ATTENTION_OUT,
  )
  order = _order(pattern, n)

  def arrange(x):
    x = x if order is None else x[:, order]
    return jnp.pad(x, ((0, 0), (0, length - n), (0, 0), (0, 0))).swapaxes(1, 2)  # (B, H, length, K)

  q, k, v = arrange(q * q.shape[-1] ** -0.5), arrange(k), arrange(v)
  call = lambda run, q, k, v: jax.vmap(run)(q, k, v)
  if not mesh.empty:
    spec = lambda sequence: PartitionSpec(batch_axes or None, head_axes or None, sequence or None, None)
    where = run.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(head_axes or None, seq_axes or None)))
    call = jax.shard_map(
      call, mesh=mesh, in_specs=(where, spec(seq_axes), spec(()), spec(())), out_specs=spec(seq_axes), check_vma=False
    )
  out = call(run, q, k, v).swapaxes(1, 2)[:, :n]
  return out if order is None else out[:, np.argsort(order)]
