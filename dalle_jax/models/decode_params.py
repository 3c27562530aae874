"""Parameters of a transformer laid out for decoding: cast, quantized to int8 or transposed, and cut by layer.

Axis legend: L layers, I input features, O output features.
"""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


class Int8(struct.PyTreeNode):
  """Weights quantised to int8 with a scale for each output; layers read them by `astype`."""

  values: jax.Array  # int8
  scale: jax.Array  # float32, 1 along the contracted axis

  def astype(self, dtype: Any) -> jax.Array:
    return self.values.astype(dtype) * self.scale.astype(dtype)


def to_int8(x: jax.Array, axis: int) -> Int8:
  """Quantises weights that are contracted along `axis`; the largest weight of each output becomes 127."""
  scale = jnp.maximum(jnp.abs(x).max(axis, keepdims=True), 1e-12) / 127
  return Int8(jnp.round(x / scale).astype(jnp.int8), scale.astype(jnp.float32))


class ByOutput(struct.PyTreeNode):
  """Weights [I, O] stored in memory as [O, I], under the original shape, for products with few rows on a CPU.

  Layers read them by `astype` and multiply by `product`. With two rows or more XLA for CPUs (jaxlib 0.10) reads plain
  weights at half of the memory bandwidth or less, and these at nearly all of it.
  """

  values: jax.Array  # float32

  def astype(self, dtype: Any) -> 'ByOutput':
    return ByOutput(self.values.astype(dtype))

  @property
  def T(self) -> 'ByOutput':
    """The transpose, for an output head whose shape is [O, I] as well."""
    return ByOutput(self.values.reshape(self.values.shape[::-1]))

  def product(self, x: jax.Array, axes: int, dtype: Any) -> jax.Array:
    """See `layers.basic.product`."""
    inner, outer = math.prod(self.values.shape[:axes]), self.values.shape[axes:]
    y = jnp.dot(self.values.reshape(-1, inner), x.reshape(-1, inner).T, preferred_element_type=dtype)
    y = jax.lax.optimization_barrier(y).T  # else XLA swaps the operands and reads by columns again
    return y.reshape(*x.shape[: x.ndim - axes], *outer)


def by_output(x: jax.Array, axes: int) -> ByOutput:
  """Lays out weights [L, ...] of L layers whose next `axes` axes are contracted."""
  inner = math.prod(x.shape[1 : 1 + axes])
  return ByOutput(x.reshape(len(x), inner, -1).swapaxes(1, 2).reshape(x.shape))


def compute_params(params: Any, dtype: Any, int8: bool = False, few_rows: bool = False) -> Any:
  """Casts kernels and heads to the compute dtype `dtype`, which layers do anyway; bfloat16 halves what a step reads.

  With `int8` the blocks and heads, which every decoding step reads whole, are quantised to a quarter of float32. With
  `few_rows` those that stay float32 are laid out as `ByOutput`, for a single CPU. Other parameters (norms, biases,
  embeddings) are used in float32 and stay unchanged. Kernels of layers that compute in float32 inside a bfloat16 model,
  such as the last one of a U-Net, are rounded as well.
  """

  def cast(path: Any, x: jax.Array) -> Any:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if not name.endswith(('kernel', '_head')) or x.dtype != jnp.float32:
      return x
    head = name.endswith('_head')
    if int8 and (head or 'blocks/' in name):
      return to_int8(x, -1 if head else 1)  # kernels of layers are [L, in, ...]
    every_step = 'blocks/' in name or name.endswith(('cross/query_kernel', 'cross/out_kernel'))
    if few_rows and dtype == jnp.float32 and (head or every_step):
      return ByOutput(x) if head else by_output(x, 2 if name.endswith(('/out/kernel', '/out_kernel')) else 1)
    return x.astype(dtype)

  return jax.tree_util.tree_map_with_path(cast, params)


def by_layer(params: Mapping[str, Any], take: Callable[[Any, int], Any] = operator.getitem) -> dict[str, Any]:
  """Unstacks the `blocks` of a transformer, [steps, ...], into a tuple with the parameters of each scan step.

  `take(array, step)` cuts them out. Decoding then need not copy them out of stacked arrays for every token.
  """
  stacked = params['blocks']['blocks']
  steps = range(len(jax.tree.leaves(stacked)[0]))
  return {**params, 'blocks': {'blocks': tuple(jax.tree.map(lambda x, i=i: take(x, i), stacked) for i in steps)}}
