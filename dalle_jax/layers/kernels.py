"""How attention is computed, [B, S, H, K] each: by XLA anywhere, in blocks where a pattern is sparse, by the kernels of
cuDNN on NVIDIA's GPUs and of Pallas ("splash") on TPUs.

Axis legend: B batch, S stream, H heads, K head_dim, P prefix; R blocks of Q queries that see the same T keys of the
picture.
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
QUERIES = 256  # of a block of causal attention by XLA, at most
LANES = 128  # of a TPU: the smallest block of a mask
NEVER = -1e30
FLASH, MASKED_FLASH = 8, 9  # from which capability on cuDNN has it, and with gradients through a mask: Ampere, Hopper
ATTENTION_OUT = 'attention'  # the name by which remat can keep what attention finds


def stream_attention(q: jax.Array, k: jax.Array, v: jax.Array, pattern: Pattern, kernel: str = 'auto') -> jax.Array:
  """The attention of a stream, from its first position on, by a pattern: [B, S, H, K].

  'auto' takes splash on a TPU, cuDNN where it can be, and else XLA. Rows, columns and windows cost less than 'full'
  with splash, which leaves out blocks that nothing is seen of, and by XLA, which goes by rows (columns) of the picture,
  of which a window of conv lies in a few. With cuDNN they cost what 'full' does, less than by XLA: there scores go
  through memory. Where cuDNN cannot have a mask XLA does these, whatever is asked. Raises ValueError for a kernel that
  is unknown, or not of this platform.
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
  """Raises ValueError for a kernel that is unknown, or not of this platform."""
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
  """By XLA, for a bool[B or 1, H or 1, T, S] mask of any form."""
  return attend(q, (k.swapaxes(1, 2), v.swapaxes(1, 2), mask))


def capability() -> int:
  """The major version of CUDA's compute capability of the GPU that is compiled for, or less where that is not here; 0
  where it is none of NVIDIA's."""
  device, target = jax.devices()[0], jax.sharding.get_abstract_mesh().abstract_device
  if platform() != 'gpu':
    return 0
  if target and target.device_kind != device.device_kind:  # one that is not here; `aot.machines` has none before Ampere
    return 8 if 'A100' in target.device_kind else 9
  major = str(getattr(device, 'compute_capability', '')).split('.')[0]
  return int(major) if 'nvidia' in device.device_kind.lower() and major.isdigit() else 0


def flash_takes(q: jax.Array, is_causal: bool, masked: bool = False) -> bool:
  """Whether cuDNN's flash attention can be had for q[B, T, H, K] over as many keys."""
  able = capability() >= (MASKED_FLASH if masked else FLASH)
  odd = q.shape[1] % 2  # the kernel takes even lengths alone
  numbers = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
  whole = num_shards('seq') == 1  # cuDNN has no queries of one device over the keys of all
  return numbers and (is_causal or not odd) and whole and able


def fused_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, kernel: str, is_causal: bool = False, mask: np.ndarray | None = None
) -> jax.Array:
  """Attention by `kernel`; by cuDNN also of what a mask bool[T, T] leaves of a causal one.

  'cudnn' is the flash attention of NVIDIA's GPUs, 'xla' runs everywhere; 'auto' is the former where it can be. Raises
  ValueError for an unknown kernel, and for 'cudnn' where it cannot be.
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
  q, k, v = (jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))) for x in (q, k, v))  # nothing sees what comes after it
  return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=is_causal, implementation='cudnn')[:, :n]


def is_flash(primitive: Any, *_: Any, **params: Any) -> bool:
  """Whether this is cuDNN's forward pass: a policy of remat, as what it leaves for the backward pass has no name."""
  return primitive.name.startswith('dot_product_attention_fwd')


def save_for_remat(found: jax.Array) -> jax.Array:
  """Marks what attention finds for remat."""
  return checkpoint_name(found, ATTENTION_OUT)


Parts = tuple[tuple[jax.Array, jax.Array, jax.Array | None], ...]


def attend(q: jax.Array, *parts: tuple[jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
  """Attention of q[B, T, H, K], or q[B, R, T, H, K], over all of `parts` at once, in its shape; softmax in float32.

  A part is k and v [B, H, n, K], laid out as products read them, or [B, H, R, n, K] where each of R has its own; and
  which of them count, bool of a shape that broadcasts to the scores [B, H, T, n] or [B, H, R, T, n]; None for all. A
  query must see something. What R share is never copied for them: XLA for CPUs (of jaxlib 0.10) reads beyond the end of
  a second operand that is broadcast over the batch.
  """
  return _attend(q * q.shape[-1] ** -0.5, parts)


def _equations(q: jax.Array, k: jax.Array) -> tuple[str, str]:
  """Axes of queries and of keys of a part, as of `jnp.einsum`."""
  rows = 'r' * (q.ndim - 4)
  return f'bh{rows}tk', f'bh{rows if k.ndim == q.ndim else ""}nk'


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _scores(q: jax.Array, parts: Parts) -> list[jax.Array]:
  """Of q[B, H, T, K] (or [B, H, R, T, K]) with each part, float32[B, H, T, n]."""
  every = []
  for k, _, mask in parts:
    of_q, of_k = _equations(q, k)
    scores = _product(f'{of_q},{of_k}->{of_q[:-1]}n', q, k)
    every.append(scores if mask is None else jnp.where(mask, scores, NEVER))
  return every


@jax.custom_vjp
def _attend(q: jax.Array, parts: Parts) -> jax.Array:
  return _attend_fwd(q, parts)[0]


def _attend_fwd(q: jax.Array, parts: Parts) -> tuple[jax.Array, tuple[Any, ...]]:
  """What q finds, and what the backward pass has: not the scores, but the logarithm of their sum (FlashAttention, Dao
  et al., 2022, section 3.1)."""
  scores = _scores(jnp.moveaxis(q, -2, 1), parts)
  ends = np.cumsum([s.shape[-1] for s in scores])[:-1]
  if one := q.shape[-3] == 1:  # a token that is drawn: GPUs take one kernel for a softmax, and a dozen for one in parts
    scores = [jnp.concatenate(scores, -1)]
  top = functools.reduce(jnp.maximum, [s.max(-1, keepdims=True) for s in scores if s.shape[-1]])
  scores = [jnp.exp(s - top) for s in scores]
  total = sum(s.sum(-1, keepdims=True) for s in scores)
  weights = [(s / total).astype(q.dtype) for s in scores]
  weights = jnp.split(weights[0], ends, -1) if one else weights
  found = 0.0
  for w, (_, v, _) in zip(weights, parts, strict=True):
    of_q, of_k = _equations(q, v)
    found += _product(f'{of_q[:-1]}n,{of_k}->{of_q}', w, v)
  found = save_for_remat(jnp.moveaxis(found, 1, -2).astype(q.dtype))
  return found, (q, parts, found, save_for_remat(top + jnp.log(total)))


def _attend_bwd(residuals: tuple[Any, ...], slope: jax.Array) -> tuple[jax.Array, Any]:
  q, parts, found, log_total = residuals
  # What the weights lose to their sum is the slope along what was found: no sum over keys is needed.
  q, slope, lost = (jnp.moveaxis(x, -2, 1) for x in (q, slope, inner_product(slope, found)))
  of_q, of_parts = 0.0, []
  for k, v, mask in parts:
    # Scores with the keys first: so two of three gradients are products of what lies as products read it.
    own = k.ndim == q.ndim
    queries, keys = _equations(q, k)
    turned = f'{keys[:-1]}t' if own else f'bhn{queries[2:-1]}'
    turn = lambda x, own=own: jnp.moveaxis(x, -1, -2 if own else 2)
    scores = _product(f'{keys},{queries}->{turned}', k, q)
    if mask is not None:
      scores = jnp.where(turn(jnp.expand_dims(mask, tuple(range(q.ndim - mask.ndim)))), scores, NEVER)
    weights = jnp.exp(scores - turn(log_total))
    of_scores = (weights * (_product(f'{keys},{queries}->{turned}', v, slope) - turn(lost))).astype(q.dtype)
    of_q += _product(f'{turned},{keys}->{queries}', of_scores, k)
    of_k = _product(f'{turned},{queries}->{keys}', of_scores, q)
    of_v = _product(f'{turned},{queries}->{keys}', weights.astype(q.dtype), slope)
    of_parts.append((of_k.astype(k.dtype), of_v.astype(v.dtype), None))
  return jnp.moveaxis(of_q, 1, -2).astype(q.dtype), tuple(of_parts)


_attend.defvjp(_attend_fwd, _attend_bwd)


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Of q[B, T, H, K] over k, v[B, H, T, K] by XLA; by blocks of queries over the keys up to their last, so that half of
  all products are made."""
  return _causal(q * q.shape[-1] ** -0.5, k, v)


def _blocks(n: int) -> list[tuple[int, int]]:
  """The first query of each block, and the first after it."""
  count = -(-n // QUERIES) if num_shards('seq') == 1 else 1
  bounds = [n * i // count for i in range(count + 1)]
  return list(itertools.pairwise(bounds))


def _up_to(k: jax.Array, v: jax.Array, first: int, end: int) -> Parts:
  """What the queries first, ..., end - 1 see."""
  return ((k[:, :, :end], v[:, :, :end], jnp.asarray(np.tri(end - first, end, first, dtype=bool))),)


@jax.custom_vjp
def _causal(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  return _causal_fwd(q, k, v)[0]


def _causal_fwd(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[Any, ...]]:
  """Of each block as `_attend_fwd`."""
  each = [_attend_fwd(q[:, a:b], _up_to(k, v, a, b)) for a, b in _blocks(q.shape[1])]
  found, log_total = [x for x, _ in each], [rest[-1] for _, rest in each]
  return jnp.concatenate(found, axis=1), (q, k, v, found, log_total)


def _causal_bwd(residuals: tuple[Any, ...], slope: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  q, k, v, found, log_total = residuals
  blocks = _blocks(q.shape[1])
  each = [
    _attend_bwd((q[:, a:b], _up_to(k, v, a, b), *own), slope[:, a:b])
    for (a, b), *own in zip(blocks, found, log_total, strict=True)
  ]
  # Keys of a block are seen from its queries on. Left to JAX, every sum would be one of arrays padded to the whole.
  of_k, of_v = (
    jnp.concatenate(
      [sum(parts[0][i][:, :, a:b] for _, parts in each[block:]) for block, (a, b) in enumerate(blocks)], axis=2
    )
    for i in (0, 1)
  )
  return jnp.concatenate([of_q for of_q, _ in each], axis=1), of_k, of_v


_causal.defvjp(_causal_fwd, _causal_bwd)


# --- Blocks of a picture


@functools.lru_cache(maxsize=32)
def _block_mask(pattern: Pattern, rows: int, reach: int) -> np.ndarray:
  """Which of the tokens of a block's `reach` + 1 rows its tokens see; a block is a row, with 'column' a column."""
  w = pattern.grid[1]
  mask = Pattern(pattern.kind, 0, (rows, w), pattern.conv_kernel).mask(rows * w).reshape(rows, w, rows, w)
  if pattern.kind == 'column':
    return np.stack([mask[:, c, :, c] for c in range(w)])
  mask = np.pad(mask, ((0, 0), (0, 0), (reach, 0), (0, 0)))
  return np.stack([mask[r, :, r : r + reach + 1].reshape(w, -1) for r in range(rows)])


def blockwise_attention(q: jax.Array, k: jax.Array, v: jax.Array, pattern: Pattern) -> jax.Array:
  """The patterns 'row', 'column' and 'conv': each row (column) of image tokens over the text and the rows it sees."""
  n, prefix, w = q.shape[1], pattern.prefix, pattern.grid[1]
  rows = -(-(n - prefix) // w)
  reach = min({'row': 1, 'column': 0, 'conv': pattern.conv_kernel // 2}[pattern.kind], rows - 1)
  text, k, v = q[:, :prefix], k.swapaxes(1, 2), v.swapaxes(1, 2)
  of_text = (k[:, :, :prefix], v[:, :, :prefix])

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
  found = attend(image, (*of_text, None), (with_rows_above(blocks(k)), with_rows_above(blocks(v)), mask))
  found = found.swapaxes(1, 2) if pattern.kind == 'column' else found
  found = found.reshape(len(q), rows * w, *q.shape[2:])[:, : n - prefix]
  return jnp.concatenate([causal_attention(text, *of_text), found], axis=1)


# --- TPU


@functools.lru_cache(maxsize=32)
def _order(pattern: Pattern, n: int) -> np.ndarray | None:
  """The stream with its picture column by column, so that what a column sees lies together; None to leave it alone."""
  if pattern.kind != 'column' or n <= pattern.prefix:
    return None
  image = np.arange(n - pattern.prefix)
  by_column = image[np.lexsort((image // pattern.grid[1], image % pattern.grid[1]))]
  return np.concatenate([np.arange(pattern.prefix), pattern.prefix + by_column])


@functools.lru_cache(maxsize=32)
def _tiles(pattern: Pattern, n: int, length: int) -> splash_attention_mask.Mask:
  """The mask of a stream of `length` >= n positions in the order of `_order`; what is beyond n sees itself."""
  if pattern.kind == 'full':
    return splash_attention_mask.CausalMask((length, length))
  mask, order = np.eye(length, dtype=bool), _order(pattern, n)
  seen = pattern.mask(n)
  mask[:n, :n] = seen if order is None else seen[np.ix_(order, order)]
  return splash_attention_mask.NumpyMask(mask)


def splash_attention(q: jax.Array, k: jax.Array, v: jax.Array, pattern: Pattern, interpret: bool = False) -> jax.Array:
  """By blocks of the mask: one that nothing in it is seen of is not computed. Split over heads, batch and sequence."""
  n, heads = q.shape[1], q.shape[2]
  mesh = jax.sharding.get_abstract_mesh()
  # Of the batch and the heads an axis that does not divide stays whole; the sequence is made longer.
  batch, of_heads = (
    mesh_axes(name) if size % num_shards(name) == 0 else () for name, size in (('batch', len(q)), ('heads', heads))
  )
  seq = mesh_axes('seq')
  head_parts, parts = num_shards('heads') if of_heads else 1, num_shards('seq')
  unit = LANES * parts
  length = -(-n // unit) * unit
  block = next(b for b in (512, 384, 256, LANES) if length // parts % b == 0) if pattern.kind == 'full' else LANES
  names = ('block_q', 'block_kv', 'block_kv_compute', 'block_q_dkv', 'block_kv_dkv', 'block_kv_dkv_compute')
  sizes = splash_attention_kernel.BlockSizes(**dict.fromkeys((*names, 'block_q_dq', 'block_kv_dq'), block))
  run = splash_attention_kernel.make_splash_mha(
    splash_attention_mask.MultiHeadMask([_tiles(pattern, n, length)] * heads),
    block_sizes=sizes,
    head_shards=head_parts,
    q_seq_shards=parts,
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
    spec = lambda sequence: PartitionSpec(batch or None, of_heads or None, sequence or None, None)
    where = run.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(of_heads or None, seq or None)))
    call = jax.shard_map(
      call, mesh=mesh, in_specs=(where, spec(seq), spec(()), spec(())), out_specs=spec(seq), check_vma=False
    )
  out = call(run, q, k, v).swapaxes(1, 2)[:, :n]
  return out if order is None else out[:, np.argsort(order)]
