"""The transformer of every model here: blocks of attention and MLP, scanned, with or without a cache.

Axis legend: B batch, S/T sequence, D embed.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.layers import kernels
from dalle_jax.layers.attention import Attention, KVCache, Stream
from dalle_jax.layers.basic import Dense, LayerNorm, constrain, normal_init, num_shards, recomputed
from dalle_jax.layers.cross import Context, cross_attend, layers_per_step


def gelu(x: jax.Array) -> jax.Array:
  """x Phi(x) by erf, in float32, as PyTorch has it; `jax.nn.gelu` takes erfc, of which XLA computes both branches."""
  y = x.astype(jnp.float32)
  return (0.5 * y * (1 + jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'gelu': gelu,
  'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
  'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),  # of the OpenAI CLIP weights
  'relu': jax.nn.relu,
}
REMATS = ('none', 'full', 'dots')
NORMS = ('pre', 'post', 'sandwich')


def residual(
  norms: str, eps: float, dtype: jnp.dtype
) -> Callable[[jax.Array, str, Callable[[jax.Array], jax.Array]], jax.Array]:
  """x + f(x) with its LayerNorms, made in the calling module as `name` and NAME_after; `norms` says where they are.

  'pre': x + f(norm(x)); 'post': norm(x + f(x)), as BERT; 'sandwich': x + norm_after(f(norm(x))) (CogView, Ding et al.,
  2021, section 2.4).
  """
  norm = lambda name: LayerNorm(eps, dtype, name=name)

  def pre(x, name, f):
    return x + f(norm(name)(x))

  def post(x, name, f):
    return norm(name)(x + f(x))

  def sandwich(x, name, f):
    return x + norm(f'{name}_after')(f(norm(name)(x)))

  return {'pre': pre, 'post': post, 'sandwich': sandwich}[norms]


class Block(nn.Module):
  """Attention, a look at a source where there is one, and MLP; fields as in Stack."""

  depth: int
  heads: int
  activation: str
  dtype: jnp.dtype
  norms: str = 'pre'
  mlp: int = 0
  eps: float = 1e-5
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
    context: Context | None = None,
    attending: jax.Array | None = None,
  ) -> tuple[jax.Array, KVCache | None]:
    x = constrain(x, ('batch', 'seq', 'embed'))
    d = x.shape[-1]
    inner, outer = normal_init(d**-0.5), normal_init((2 * self.depth * d) ** -0.5)  # the sum over layers keeps its size
    around = residual(self.norms, self.eps, self.dtype)
    caches = []

    def attend(y: jax.Array) -> jax.Array:
      attention = Attention(self.heads, self.dtype, inner, outer, kernel=self.kernel, name='attention')
      y, new = attention(y, mask, stream, kind, cache, layer)
      caches.append(new)
      return y

    def mlp(y: jax.Array) -> jax.Array:
      wide = normal_init((2 * d) ** -0.5)
      y = Dense(self.mlp or 4 * d, ('embed', 'mlp'), dtype=self.dtype, kernel_init=wide, name='mlp_in')(y)
      y = recomputed(ACTIVATIONS[self.activation])(y)
      return Dense(d, ('mlp', 'embed'), dtype=self.dtype, kernel_init=outer, name='mlp_out')(y)

    x = around(x, 'norm_1', attend)
    if context is not None:
      x = cross_attend(x, context, attending)
    return around(x, 'norm_2', mlp), caches[0]


class Period(nn.Module):
  """The blocks of one turn of the scan, with the fields `block`.

  Attributes:
    kinds: of each block, where it is the same in every turn; -1 for one that the turn brings.
  """

  block: tuple[Any, ...]
  kinds: tuple[int, ...]

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    turn: tuple[jax.Array | None, Context | tuple[Context, ...] | None],
    mask: jax.Array | None,
    stream: Stream | None,
    attending: jax.Array | None,
    cache: KVCache | None = None,
    first: int = 0,
  ) -> tuple[jax.Array, KVCache | None]:
    """`turn` has int32[period] kinds and what the looking layers of this period need; `first` is the first's number."""
    kinds, context = turn
    sources = context.layers() if isinstance(context, Context) else context or ()
    every = len(self.kinds) // len(sources) if sources else 0
    for i, kind in enumerate(self.kinds):
      block = Block(*self.block, name=f'block_{i}')
      source = sources[i // every] if sources and (i + 1) % every == 0 else None
      x, cache = block(x, mask, stream, kinds[i] if kind < 0 else kind, cache, first + i, source, attending)
    return x, cache


class Stack(nn.Module):
  """`depth` blocks over [B, S, D], scanned over turns of `period` blocks: parameters are [depth / period, ...].

  With a cache turns are compiled one after the other, as every token would copy what a loop reads of its layer: best
  with parameters as of `models.decode_params.by_layer`.

  Attributes:
    remat: what the backward pass computes again: 'none', 'full' (all but the inputs of each turn), 'dots' (all but
      products of matrices with parameters and what attention finds).
    unroll: turns of the scan that are compiled one after the other, without a loop. On the CPU four are 5 to 15% faster
      than one by one; with twelve XLA sums up the residual stream of all turns before for each of them. On a GPU all
      of them save what a loop first fills with zeros and copies: a tenth of a step of 1.3b (estimated). Compilation
      takes longer.
    norms: where the LayerNorms are, see `residual`.
    mlp: the width of the MLP; 0: four times that of x.
    eps: of the LayerNorms.
    kernel: of attention, see `layers.kernels.stream_attention`.
  """

  depth: int
  heads: int
  activation: str = 'gelu'
  dtype: jnp.dtype = jnp.float32
  period: int = 1
  remat: str = 'none'
  unroll: int = 1
  norms: str = 'pre'
  mlp: int = 0
  eps: float = 1e-5
  kernel: str = 'auto'

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array | np.ndarray | None = None,
    stream: Stream | None = None,
    kinds: Sequence[int] | None = None,
    cache: KVCache | None = None,
    context: Context | tuple[Context, ...] | None = None,
    attending: jax.Array | np.ndarray | None = None,
  ) -> tuple[jax.Array, KVCache | None]:
    """Runs all blocks.

    Args:
      x: [B, T, D].
      mask: bool[T, T] or [B, T or 1, T], which positions of x count in all layers; by default all do.
      stream: what x is a part of; layer l sees by `stream.patterns[kinds[l]]`, and `mask` is not read.
      kinds: all 0 by default.
      cache: of keys and values, for a stream.
      context: of a source that every (depth / L)-th layer looks at; with a cache one for each of them.
      attending: bool[T], the positions of x that look.

    Raises ValueError when heads, period, activation, remat or norms do not fit.
    """
    if x.shape[-1] % self.heads:
      raise ValueError(f'a width of {x.shape[-1]} is not divisible by {self.heads} heads; change either.')
    if self.depth % self.period:
      raise ValueError(f'{self.depth} layers are not divisible by the period {self.period}; change either.')
    if self.activation not in ACTIVATIONS:
      raise ValueError(f'activation {self.activation!r} is unknown; there are {", ".join(ACTIVATIONS)}.')
    if self.remat not in REMATS:
      raise ValueError(f'remat {self.remat!r} is unknown; there are {", ".join(REMATS)}.')
    if self.norms not in NORMS:
      raise ValueError(f'norms {self.norms!r} is unknown; there are {", ".join(NORMS)}.')
    turns = self.depth // self.period
    body: type[nn.Module] = Period
    if self.remat != 'none':
      keep = jax.checkpoint_policies
      both, found = keep.save_from_both_policies, keep.save_only_these_names(kernels.ATTENTION_OUT)
      dots = both(keep.dots_with_no_batch_dims_saveable, both(found, kernels.is_flash))
      policy = dots if self.remat == 'dots' else None
      # Forward and backward pass are loops of their own, which XLA does not merge; turns outside of a loop it would.
      looped = turns >= 2 * self.unroll and turns % self.unroll == 0
      body = nn.remat(Period, prevent_cse=not looped, policy=policy)
    scan = nn.scan(
      body,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
      length=turns,
      unroll=min(self.unroll, turns),
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    which = np.zeros(self.depth, np.int32) if kinds is None else np.asarray(kinds, np.int32)
    which = which.reshape(turns, self.period)
    static = tuple(int(kind) if (which[:, i] == kind).all() else -1 for i, kind in enumerate(which[0]))
    block = (self.depth, self.heads, self.activation, self.dtype, self.norms, self.mlp, self.eps, self.kernel)
    array = lambda x: None if x is None else jnp.asarray(x)
    mask, attending, n = array(mask), array(attending), x.shape[1]
    if cache is not None:
      looks = () if context is None else cast(tuple, context)
      params, each = self.variables['params']['blocks'], layers_per_step(len(looks), turns)
      for t in range(turns):
        own = params[t] if isinstance(params, tuple) else jax.tree.map(operator.itemgetter(t), params)
        turn = None, looks[t * each : (t + 1) * each]
        period = Period(block, tuple(int(kind) for kind in which[t]), parent=None)
        x, cache = period.apply({'params': own}, x, turn, mask, stream, attending, cache, t * self.period)
      return x, cache
    sources = None if context is None else cast(Context, context).per_step(turns)
    if stream is not None and (short := -n % num_shards('seq')):
      # Split over devices, the stream is made as long as they need; nothing sees what comes after it.
      x = jnp.pad(x, ((0, 0), (0, short), (0, 0)))
      attending = None if attending is None else jnp.pad(attending, (0, short))
    x, _ = scan(block, static, name='blocks')(x, (jnp.asarray(which), sources), mask, stream, attending)
    return x[:, :n], None
