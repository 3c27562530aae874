"""Leaf layers whose parameters carry logical axis names beside their shapes.

Axis legend: B batch, S sequence, D embed (model width), H heads, K head_dim, F mlp, V vocab, C channels.
Parameters are float32; computation is in `dtype`. `training.sharding` maps the axis names to mesh axes.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

Init = Callable[..., jax.Array]
Axes = tuple[str | None, ...]

normal_init = nn.initializers.normal
constrain = nn.with_logical_constraint  # a no-op without a mesh; an axis that does not divide stays whole
# For functions that save only their inputs and recompute the rest in the backward pass: a scan over layers saves all
# residuals that it is not told to drop. Forward and backward pass of a scan are separate loops, which XLA does not
# merge; without a scan and without remat it may merge the recomputation with the forward pass.
recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


def mesh_axes(name: str) -> tuple[str, ...]:
  """The axes of the current mesh over which the rules shard a logical axis."""
  mesh, rules = jax.sharding.get_abstract_mesh(), dict(nn.get_logical_axis_rules())
  return tuple(a for a in rules.get(name) or () if mesh.shape.get(a, 1) > 1)


def num_shards(name: str) -> int:
  """Number of shards of a logical axis on the current mesh."""
  return math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in mesh_axes(name))


def platform() -> str:
  """The platform to compile for, 'cpu', 'gpu' or 'tpu': that of the current mesh, or else of this process.

  The two differ when a machine compiles for devices that it does not have (`dalle_jax.aot`).
  """
  target = jax.sharding.get_abstract_mesh().abstract_device
  return target.platform if target else jax.default_backend()


def param(module: nn.Module, name: str, init: Init, axes: Axes, shape: Sequence[int]) -> jax.Array:
  """The parameter `name` of `module`, float32 of `shape`; `axes` are the logical names of its axes.

  Flax alone would trace the initialiser of every parameter that it is given, to learn its shape: 40% of the time of
  tracing a VQGAN.
  Raises flax.errors.ScopeParamShapeError, as Flax does, if a given parameter has another shape.
  """
  if not module.has_variable('params', name):
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
  value = nn.unbox(module.get_variable('params', name))
  found = jax.tree.leaves(value)[0].shape  # of `models.decode_params.Int8` the shape of its values
  if found != tuple(shape):
    raise flax.errors.ScopeParamShapeError(name, module.scope.path_text, found, shape)
  return value


def product(x: jax.Array, kernel: jax.Array, axes: int = 1, dtype: jnp.dtype | None = None) -> jax.Array:
  """Contracts the last `axes` axes of x[..., I] with the first ones of kernel[I, O]: [..., O], in `dtype` if given.

  On the CPU it is a product of two matrices, and so are its gradients: XLA would transpose the operands of a sum over
  two axes first. A kernel with its own `product` method (`models.decode_params.ByOutput`) is multiplied by that.
  """
  if hasattr(kernel, 'product'):
    return kernel.product(x, axes, dtype)
  if platform() != 'cpu' or num_shards('seq') > 1:  # a merged batch-and-sequence axis cannot be sharded over both
    return jnp.tensordot(x, kernel, axes, preferred_element_type=dtype)
  inner, (rows, outer) = math.prod(kernel.shape[:axes]), (x.shape[: x.ndim - axes], kernel.shape[axes:])
  y = jnp.dot(x.reshape(-1, inner), kernel.reshape(inner, -1), preferred_element_type=dtype)
  return y.reshape(*rows, *outer)


class Einsum(nn.Module):
  """A weight `kernel[shape]` contracted with the input: `Einsum((D, H, K), axes)('BSD,DHK->BSHK', x)`."""

  shape: tuple[int, ...]
  axes: Axes
  bias_axes: tuple[int, ...] = ()  # the axes of `shape` that the bias spans; () for no bias
  dtype: jnp.dtype = jnp.float32
  kernel_init: Init = normal_init(0.02)

  @nn.compact
  def __call__(self, eqn: str, x: jax.Array) -> jax.Array:
    kernel = param(self, 'kernel', self.kernel_init, self.axes, self.shape)
    inputs, weights = eqn.split('->')[0].split(',')
    shared = sum(axis in inputs for axis in weights)
    if not inputs.endswith(weights[:shared]):
      raise ValueError(f'Einsum {eqn!r}: the last axes of the input must be the first ones of the kernel.')
    y = product(x.astype(self.dtype), kernel.astype(self.dtype), shared)
    if self.bias_axes:
      shape = tuple(self.shape[i] for i in self.bias_axes)
      axes = tuple(self.axes[i] for i in self.bias_axes)
      y = y + param(self, 'bias', nn.initializers.zeros, axes, shape).astype(self.dtype)
    return y


class Dense(nn.Module):
  """Linear map of the last axis: `[..., in] -> [..., features]`; `axes` names (in, out)."""

  features: int
  axes: Axes
  use_bias: bool = True
  dtype: jnp.dtype = jnp.float32
  kernel_init: Init = normal_init(0.02)

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = param(self, 'kernel', self.kernel_init, self.axes, (x.shape[-1], self.features))
    y = product(x.astype(self.dtype), kernel.astype(self.dtype))
    if self.use_bias:
      bias = param(self, 'bias', nn.initializers.zeros, self.axes[1:], (self.features,))
      y = y + bias.astype(self.dtype)
    return y


class Conv(nn.Module):
  """2-D convolution, NHWC; `kernel_size` is the side of a square kernel or (height, width).

  `padding` is as in `lax.conv_general_dilated`: a string or ((top, bottom), (left, right)). With `upsample` the input
  is upsampled by 2 first (nearest neighbour), which needs a 3 x 3 kernel, stride 1 and 'SAME'; else raises ValueError.
  """

  features: int
  kernel_size: int | tuple[int, int] = 3
  stride: int = 1
  padding: str | tuple[tuple[int, int], tuple[int, int]] = 'SAME'
  upsample: bool = False
  use_bias: bool = True
  dtype: jnp.dtype = jnp.float32
  kernel_init: Init = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    h, w = self.kernel_size if isinstance(self.kernel_size, tuple) else (self.kernel_size, self.kernel_size)
    shape = (h, w, x.shape[-1], self.features)
    kernel = param(self, 'kernel', self.kernel_init, (None, None, 'conv_in', 'conv_out'), shape)
    x = x.astype(self.dtype)
    small = x.shape[1] * x.shape[2] <= 16 and self.stride == 1 and self.padding == 'SAME' and h == w and h % 2
    if self.upsample:
      if (h, w, self.stride, self.padding) != (3, 3, 1, 'SAME'):
        raise ValueError(f'an upsampling convolution must be 3 x 3, stride 1, SAME, not {self}.')
      y = upsampled_conv(x, kernel)
    elif small and platform() == 'cpu':
      y = conv_as_product(x, kernel.astype(self.dtype))
    else:
      y = conv(x, kernel.astype(self.dtype), self.stride, self.padding)
    if self.use_bias:
      bias = param(self, 'bias', nn.initializers.zeros, ('conv_out',), (self.features,))
      y = y + bias.astype(self.dtype)
    return y


def conv(
  x: jax.Array, kernel: jax.Array, stride: int = 1, padding: str | Sequence[tuple[int, int]] = 'SAME'
) -> jax.Array:
  """Convolves [B, H, W, C] with [h, w, C, O]; `padding` as in `lax.conv_general_dilated`."""
  names = ('NHWC', 'HWIO', 'NHWC')
  return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=names)


def upsampled_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Nearest-neighbour upsampling of [B, H, W, C] by 2, then a 'SAME' convolution by [3, 3, C, O]: [B, 2H, 2W, O].

  Of the three rows (columns) under a kernel, two are always copies of the same one. Adding up their weights leaves a
  2 x 2 kernel on the small map for each of the four output phases: 4/9 of the products.
  """
  b, h, w, _ = x.shape
  pair = lambda i, k: jnp.stack([k[0], k[1] + k[2]] if i == 0 else [k[0] + k[1], k[2]])

  def phase(i: int, j: int) -> jax.Array:
    small = pair(i, pair(j, kernel.swapaxes(0, 1)).swapaxes(0, 1))  # in the dtype of the parameters
    return conv(x, small.astype(x.dtype), 1, ((1 - i, i), (1 - j, j)))

  rows = [jnp.stack([phase(i, j) for j in range(2)], 3) for i in range(2)]
  return jnp.stack(rows, 2).reshape(b, 2 * h, 2 * w, -1)


def conv_as_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """A 'SAME' convolution, stride 1, odd kernel, as one matrix product over shifted copies of [B, H, W, C].

  For maps of 2 x 2 XLA's convolution on the CPU takes 15 times as long, forward and backward.
  """
  (_, h, w, c), k = x.shape, kernel.shape[0]
  if h == w == 1:  # only the centre of the kernel lies inside the map
    return product(x, kernel[k // 2, k // 2])
  return product(patches(x, k), kernel.reshape(k * k * c, -1))


def patches(x: jax.Array, k: int) -> jax.Array:
  """The k x k neighbourhood of each position of [B, H, W, C], row by row, zero padded: [B, H, W, k * k * C]; k odd."""
  h, w = x.shape[1:3]
  x = jnp.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
  return jnp.concatenate([x[:, i : i + h, j : j + w] for i in range(k) for j in range(k)], -1)


class Embed(nn.Module):
  """Lookup table `embedding[vocab, features]`; ids must lie in [0, vocab)."""

  vocab: int
  features: int
  axes: Axes = ('vocab', 'embed')
  dtype: jnp.dtype = jnp.float32
  kernel_init: Init = normal_init(0.02)

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    table = param(self, 'embedding', self.kernel_init, self.axes, (self.vocab, self.features))
    return embedding_lookup(table, ids).astype(self.dtype)


def embedding_lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
  """Rows [..., D] of table[vocab, D] for ids[...], which must lie in [0, vocab).

  The embedding axis is gathered first: rows looked up in shards would have to be exchanged between devices afterwards.
  The rows are not split over the sequence: where its shards do not divide them and the vocabulary is sharded as well,
  XLA (jaxlib 0.10) computes a wrong gradient of the table.
  """
  rows = jnp.take(constrain(table, ('vocab', None)), ids, axis=0)
  return constrain(rows, ('batch', *(None,) * (rows.ndim - 1)))


class LayerNorm(nn.Module):
  """Layer normalisation of the last axis; statistics in float32, output in `dtype`."""

  eps: float = 1e-5
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = param(self, 'scale', nn.initializers.ones, ('norm',), (x.shape[-1],))
    bias = param(self, 'bias', nn.initializers.zeros, ('norm',), (x.shape[-1],))
    return layer_norm(x, scale, bias, self.eps, self.dtype)


def layer_norm(
  x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float = 1e-5, dtype: jnp.dtype = jnp.float32
) -> jax.Array:
  """Normalises the last axis of x[..., D] in float32 and applies float32[D] scale and bias.

  Only x is saved for the backward pass, which normalises it again.
  """
  return _layer_norm(x, scale, bias, eps, dtype)


def _normalised(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
  """x in float32 with mean 0 and variance 1 along the last axis, and the factor 1 / std, [..., 1]."""
  x = x.astype(jnp.float32)
  x = x - x.mean(-1, keepdims=True)
  factor = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)
  return x * factor, factor


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float, dtype: jnp.dtype) -> jax.Array:
  return (_normalised(x, eps)[0] * scale + bias).astype(dtype)


def _layer_norm_fwd(x, scale, bias, eps, dtype):
  return _layer_norm(x, scale, bias, eps, dtype), (x, scale)


def _layer_norm_bwd(eps, dtype, residuals, dout):
  x, scale = residuals
  y, factor = _normalised(x, eps)
  dout, rows = dout.astype(jnp.float32), tuple(range(x.ndim - 1))
  dy = dout * scale
  # The mean and the variance project out the components of dy along 1 and along y.
  dx = factor * (dy - dy.mean(-1, keepdims=True) - y * (inner_product(dy, y) / x.shape[-1]))
  return dx.astype(x.dtype), (dout * y).sum(rows), dout.sum(rows)


_layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


def inner_product(x: jax.Array, y: jax.Array) -> jax.Array:
  """(x * y).sum(-1, keepdims=True) in float32; as an einsum it takes XLA for CPUs (jaxlib 0.10) a tenth of the time."""
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  return jnp.einsum('...d,...d->...', x, y, precision=jax.lax.Precision.HIGHEST)[..., None]


def sinusoid(at: jax.Array, width: int) -> jax.Array:
  """Sines, then cosines, of positions at[N] with wavelengths from 2 pi to 20,000 pi: float32[N, width].

  "Attention Is All You Need", Vaswani et al., 2017, section 3.5. Raises ValueError for an odd width.
  """
  if width % 2:
    raise ValueError(f'sinusoidal positions need an even width, not {width}.')
  angle = at.astype(jnp.float32)[:, None] * 1e4 ** (-jnp.arange(width // 2) / (width // 2))
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], 1)


class BatchNorm(nn.Module):
  """Batch normalisation of each channel of [..., C] (Ioffe and Szegedy, 2015).

  The running mean and variance are parameters without a gradient, so that a network is fully described by its
  parameters and each row is independent of its batch at inference. With `train` the statistics are those of the global
  batch; they are sown into the collection 'statistics', from which `update_statistics` updates the parameters.
  """

  eps: float = 1e-5
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    ones, zeros, shape = nn.initializers.ones, nn.initializers.zeros, (x.shape[-1],)
    table = lambda name, init: param(self, name, init, ('norm',), shape)
    scale, bias = table('scale', ones), table('bias', zeros)
    mean, var = (jax.lax.stop_gradient(table(name, init)) for name, init in (('mean', zeros), ('var', ones)))
    x = x.astype(jnp.float32)
    if train:
      rows = tuple(range(x.ndim - 1))
      mean = x.mean(rows)
      var = jnp.square(x - mean).mean(rows)
      for name, value in (('mean', mean), ('var', var)):
        self.sow('statistics', name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)
    return ((x - mean) * jax.lax.rsqrt(var + self.eps) * scale + bias).astype(self.dtype)


def statistics_of(params: Any) -> Any:
  """The subtree of `params` with the running statistics of every BatchNorm; None if there is none."""
  if not isinstance(params, Mapping):
    return None
  if {'mean', 'var'} <= set(params):
    return {name: params[name] for name in ('mean', 'var')}
  parts = {name: statistics_of(part) for name, part in params.items()}
  return {name: part for name, part in parts.items() if part} or None


def update_statistics(params: Any, statistics: Any, decay: float) -> Any:
  """`params` with an exponential moving average step, by `decay`, towards the values in the subtree `statistics`."""
  if not isinstance(statistics, Mapping):
    return decay * params + (1 - decay) * statistics
  return {**params, **{name: update_statistics(params[name], part, decay) for name, part in statistics.items()}}


class GroupNorm(nn.Module):
  """Group normalisation over (H, W, C / groups) of NHWC; statistics in float32, output in `dtype`."""

  groups: int = 32
  eps: float = 1e-6
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    channels = x.shape[-1]
    groups = min(self.groups, channels)
    if channels % groups:
      raise ValueError(f'GroupNorm: {channels} channels are not divisible into {groups} groups; change the channels.')
    scale = param(self, 'scale', nn.initializers.ones, ('norm',), (channels,))
    bias = param(self, 'bias', nn.initializers.zeros, ('norm',), (channels,))
    y = x.astype(jnp.float32).reshape(x.shape[0], -1, channels)  # (B, HW, C)
    # The mean over pixels, then over the channels of a group: both at once take XLA for CPUs seven times as long.
    mean = lambda y: y.mean(1).reshape(x.shape[0], groups, -1).mean(2)  # (B, G)
    spread = lambda per_group: jnp.repeat(per_group, channels // groups, 1)[:, None]
    center = spread(mean(y))
    factor = spread(jax.lax.rsqrt(mean(jnp.square(y - center)) + self.eps)) * scale
    return (y * factor + (bias - center * factor)).reshape(x.shape).astype(self.dtype)
