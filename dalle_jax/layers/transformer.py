"""The transformer of every model here: pre-LayerNorm blocks, scanned, with or without a cache.

Axis legend: B batch, S/T sequence, D embed.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.layers.attention import Attention, KVCache
from dalle_jax.layers.basic import Dense, LayerNorm, constrain, normal_init
from dalle_jax.layers.cross import Context, look

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
  'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),  # of the OpenAI CLIP weights
}
REMATS = ('none', 'full', 'dots')


class Block(nn.Module):
  """Attention, a look at a source where there is one, and MLP, each `x + f(norm(x))`; fields as in Stack."""

  depth: int
  heads: int
  activation: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array | None,
    cache: KVCache | None,
    layer: jax.Array,
    offset: jax.Array | int,
    context: Context | None = None,
    looking: jax.Array | None = None,
  ) -> tuple[jax.Array, KVCache | None]:
    x = constrain(x, ('batch', 'seq', 'embed'))
    d = x.shape[-1]
    inner, outer = normal_init(d**-0.5), normal_init((2 * self.depth * d) ** -0.5)  # the sum over layers keeps its size
    y = LayerNorm(dtype=self.dtype, name='norm_1')(x)
    attention = Attention(self.heads, self.dtype, inner, outer, name='attention')
    y, cache = attention(y, mask, cache, layer, offset)
    x = x + y
    if context is not None:
      x = look(x, context, looking)
    y = LayerNorm(dtype=self.dtype, name='norm_2')(x)
    y = Dense(4 * d, ('embed', 'mlp'), dtype=self.dtype, kernel_init=normal_init((2 * d) ** -0.5), name='mlp_in')(y)
    y = ACTIVATIONS[self.activation](y)
    return x + Dense(d, ('mlp', 'embed'), dtype=self.dtype, kernel_init=outer, name='mlp_out')(y), cache


class Period(nn.Module):
  """The blocks of one turn of the scan; fields as in Stack."""

  depth: int
  heads: int
  activation: str
  dtype: jnp.dtype
  period: int

  @nn.compact
  def __call__(
    self,
    carry: tuple[jax.Array, KVCache | None],
    turn: tuple[jax.Array, jax.Array, Context | None],
    masks: jax.Array | None,
    offset: jax.Array | int,
    looking: jax.Array | None,
  ) -> tuple[tuple[jax.Array, KVCache | None], None]:
    x, cache = carry
    index, kinds, context = turn  # int32[], int32[period], that of the looking layers of this period
    every = 0 if context is None else self.period // len(context.scale)
    for i in range(self.period):
      block = Block(self.depth, self.heads, self.activation, self.dtype, name=f'block_{i}')
      mask = None if masks is None else masks[kinds[i]]
      source = context.layer(i // every) if context is not None and (i + 1) % every == 0 else None
      x, cache = block(x, mask, cache, index * self.period + i, offset, source, looking)
    return (x, cache), None


class Stack(nn.Module):
  """`depth` blocks over [B, S, D], scanned over turns of `period` blocks: parameters are [depth / period, ...].

  Attributes:
    remat: what the backward pass computes again: 'none', 'full' (all but the inputs of each turn), 'dots' (all but
      products of matrices with parameters).
    unroll: turns of the scan that are compiled one after the other, without a loop. On the CPU all of them are 10
      to 15% faster than one by one; compilation takes longer.
  """

  depth: int
  heads: int
  activation: str = 'gelu'
  dtype: jnp.dtype = jnp.float32
  period: int = 1
  remat: str = 'none'
  unroll: int = 1

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    masks: jax.Array | np.ndarray | None = None,
    kinds: Sequence[int] | None = None,
    cache: KVCache | None = None,
    offset: jax.Array | int = 0,
    context: Context | None = None,
    looking: jax.Array | np.ndarray | None = None,
  ) -> tuple[jax.Array, KVCache | None]:
    """Runs all blocks; layer l attends by `masks[kinds[l]]`.

    Args:
      x: [B, T, D], the stream or, with a cache, its positions from `offset` on.
      masks: bool[M, T, keys]; None if all see all.
      kinds: the index in `masks` of each layer; all 0 by default.
      cache: written at `offset`, then read for the first `keys` positions.
      context: of a source that every (depth / L)-th layer looks at.
      looking: bool[T], the positions of x that look.

    Raises ValueError when heads, period, activation or remat do not fit.
    """
    if x.shape[-1] % self.heads:
      raise ValueError(f'a width of {x.shape[-1]} is not divisible by {self.heads} heads; change either.')
    if self.depth % self.period:
      raise ValueError(f'{self.depth} layers are not divisible by the period {self.period}; change either.')
    if self.activation not in ACTIVATIONS:
      raise ValueError(f'activation {self.activation!r} is unknown; there are {", ".join(ACTIVATIONS)}.')
    if self.remat not in REMATS:
      raise ValueError(f'remat {self.remat!r} is unknown; there are {", ".join(REMATS)}.')
    turns = self.depth // self.period
    body: type[nn.Module] = Period
    if self.remat != 'none':
      policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.remat == 'dots' else None
      body = nn.remat(Period, prevent_cse=False, policy=policy)
    scan = nn.scan(
      body,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
      length=turns,
      unroll=min(self.unroll, turns),
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    blocks = scan(self.depth, self.heads, self.activation, self.dtype, self.period, name='blocks')
    which = np.zeros(self.depth, np.int32) if kinds is None else np.asarray(kinds, np.int32)
    sources = None if context is None else context.turns(turns)
    turn = (jnp.arange(turns), jnp.asarray(which.reshape(turns, self.period)), sources)
    array = lambda x: None if x is None else jnp.asarray(x)
    (x, cache), _ = blocks((x, cache), turn, array(masks), jnp.asarray(offset), array(looking))
    return x, cache
