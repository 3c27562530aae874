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
  """Weights as whole numbers with a `scale` for each output, for those who read them by `astype`."""

  values: jax.Array  # int8
  scale: jax.Array  # float32, one where `values` are many along what is summed over

  def astype(self, dtype: Any) -> jax.Array:
    return self.values.astype(dtype) * self.scale.astype(dtype)


def to_int8(x: jax.Array, axis: int) -> Int8:
  """Each output's largest weight becomes 127; `axis` is summed over."""
  scale = jnp.maximum(jnp.abs(x).max(axis, keepdims=True), 1e-12) / 127
  return Int8(jnp.round(x / scale).astype(jnp.int8), scale.astype(jnp.float32))


class ByOutput(struct.PyTreeNode):
  """Weights [I, O] that lie as [O, I] under the shape of the weights, for products with few rows on a CPU.

  For those who read them by `astype` and multiply by `product`. Plain weights XLA for CPUs (of jaxlib 0.10) reads at
  half of the rate of memory or less where there are two rows or more, these at nearly all of it.
  """

  values: jax.Array  # float32

  def astype(self, dtype: Any) -> 'ByOutput':
    return ByOutput(self.values.astype(dtype))

  @property
  def T(self) -> 'ByOutput':
    """Of a head, [O, I] by its shape as well."""
    return ByOutput(self.values.reshape(self.values.shape[::-1]))

  def product(self, x: jax.Array, axes: int, dtype: Any) -> jax.Array:
    """As `layers.basic.product`."""
    inner, outer = math.prod(self.values.shape[:axes]), self.values.shape[axes:]
    y = jnp.dot(self.values.reshape(-1, inner), x.reshape(-1, inner).T, preferred_element_type=dtype)
    y = jax.lax.optimization_barrier(y).T  # XLA would change the operands' places, and read by columns again
    return y.reshape(*x.shape[: x.ndim - axes], *outer)


def by_output(x: jax.Array, axes: int) -> ByOutput:
  """Of weights [L, ...] of L layers, whose next `axes` axes are summed over."""
  inner = math.prod(x.shape[1 : 1 + axes])
  return ByOutput(x.reshape(len(x), inner, -1).swapaxes(1, 2).reshape(x.shape))


def compute_params(params: Any, dtype: Any, int8: bool = False, few_rows: bool = False) -> Any:
  """Kernels and heads of a transformer in the type of its computation: the same results, and a step reads half as much.

  With `int8` the blocks and the heads, which every step reads whole, are rounded to eight bits, a quarter of float32.
  With `few_rows` what every step reads whole is laid out as `ByOutput` where it stays float32: for one CPU. Other
  parameters (norms, biases, embeddings) are used in float32, and stay so.
  """

  def cast(path: Any, x: jax.Array) -> Any:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if not name.endswith(('kernel', '_head')) or x.dtype != jnp.float32:
      return x
    head = name.endswith('_head')
    if int8 and (head or 'blocks/' in name):
      return to_int8(x, -1 if head else 1)  # kernels of layers are [L, in, ...]
    read_whole = 'blocks/' in name or name.endswith(('cross/query_kernel', 'cross/out_kernel'))
    if few_rows and dtype == jnp.float32 and (head or read_whole):
      return ByOutput(x) if head else by_output(x, 2 if name.endswith(('/out/kernel', '/out_kernel')) else 1)
    return x.astype(dtype)

  return jax.tree_util.tree_map_with_path(cast, params)


def by_layer(params: Mapping[str, Any], take: Callable[[Any, int], Any] = operator.getitem) -> dict[str, Any]:
  """Parameters of a transformer whose `blocks` are stacked, [turns, ...], with those of each turn apart in a tuple.

  `take(array, turn)` cuts them out. What reads them for every token need not copy them out of the whole each time.
  """
  stacked = params['blocks']['blocks']
  turns = range(len(jax.tree.leaves(stacked)[0]))
  return {**params, 'blocks': {'blocks': tuple(jax.tree.map(lambda x, t=t: take(x, t), stacked) for t in turns)}}
