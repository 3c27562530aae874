"""The transformer of every model here: blocks of attention and MLP, scanned in training, unrolled when decoding.

Axis legend: B batch, S/T sequence, D embed.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.layers import kernels, token_shift
from dalle_jax.layers.attention import Attention, KVCache, Stream
from dalle_jax.layers.basic import Dense, LayerNorm, constrain, normal_init, num_shards, recomputed
from dalle_jax.layers.cross import Context, cross_attend, layers_per_step


def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU, x Phi(x), by erf in float32; `jax.nn.gelu` uses erfc, of which XLA computes both branches."""
  y = x.astype(jnp.float32)
  return (0.5 * y * (1 + jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'gelu': gelu,
  'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
  'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI's CLIP
  'relu': jax.nn.relu,
  'geglu': gelu,
}
GATED = ('geglu',)  # the activation of a second linear map is multiplied with the first (Shazeer, 2020)
REMATS = ('none', 'full', 'dots')
NORMS = ('pre', 'post', 'sandwich')


def residual(norms: str, eps: float, dtype: jnp.dtype) -> Callable[..., jax.Array]:
  """A residual connection with LayerNorms at the places that `norms` names; they belong to the calling module.

  It is called with (x, name, f), and in a reversible block with y, the other stream; otherwise y = x. 'pre': x +
  f(norm(y)); 'post': norm(x + f(y)), as in BERT; 'sandwich': x + norm_after(f(norm(y))) (CogView, Ding et al., 2021,
  section 2.4). The norms are called `name` and NAME_after.
  """
  norm = lambda name: LayerNorm(eps, dtype, name=name)

  def around(x, name, f, y=None):
    y = x if y is None else y
    match norms:
      case 'pre':
        return x + f(norm(name)(y))
      case 'post':
        return norm(name)(x + f(y))
    return x + norm(f'{name}_after')(f(norm(name)(y)))

  return around


class Block(nn.Module):
  """Self-attention, cross-attention if there is a context, and MLP; for the fields see `Stack`."""

  depth: int
  heads: int
  activation: str
  dtype: jnp.dtype
  norms: str = 'pre'
  mlp: int = 0
  eps: float = 1e-5
  kernel: str = 'auto'
  head_dim: int = 0
  shift_tokens: bool = False
  reversible: bool = False

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
    first, second = jnp.split(x, 2, -1) if self.reversible else (x, x)
    d = first.shape[-1]
    inner, outer = normal_init(d**-0.5), normal_init((2 * self.depth * d) ** -0.5)  # keeps the residual stream's scale
    around = residual(self.norms, self.eps, self.dtype)

    def shift(y: jax.Array, number: int) -> jax.Array:
      nonlocal cache
      if self.shift_tokens:
        y, cache = _shift(y, stream, cache, number)
      return y

    def attend(y: jax.Array) -> jax.Array:
      nonlocal cache
      attention = Attention(
        self.heads, self.dtype, inner, outer, kernel=self.kernel, head_dim=self.head_dim, name='attention'
      )
      y, cache = attention(shift(y, 2 * layer), mask, stream, kind, cache, layer)
      return y

    def mlp(y: jax.Array) -> jax.Array:
      y = shift(y, 2 * layer + 1)
      wide = normal_init((2 * d) ** -0.5)
      dense = lambda name: Dense(self.mlp or 4 * d, ('embed', 'mlp'), dtype=self.dtype, kernel_init=wide, name=name)
      z, activation = dense('mlp_in')(y), ACTIVATIONS[self.activation]
      if self.activation in GATED:
        z = recomputed(lambda z, gate: z * activation(gate))(z, dense('mlp_gate')(y))
      else:
        z = recomputed(activation)(z)
      return Dense(d, ('mlp', 'embed'), dtype=self.dtype, kernel_init=outer, name='mlp_out')(z)

    first = around(first, 'norm_1', attend, second)
    if context is not None:
      first = cross_attend(first, context, attending)
    second = around(second if self.reversible else first, 'norm_2', mlp, first)
    return (jnp.concatenate([first, second], -1) if self.reversible else second), cache


def _shift(x: jax.Array, stream: Stream, cache: KVCache | None, number: int) -> tuple[jax.Array, KVCache | None]:
  """Token shift of x[B, T, D], the shift `number` of all layers, and the cache with what it takes over."""
  pattern = stream.patterns[0]
  if stream.index is None:
    if cache is not None:
      cache = cache.replace(shifted=(*cache.shifted, token_shift.taken_over(x, pattern)))
    return token_shift.shift(x, pattern), cache
  x, past = token_shift.shift_one(x, cache.shifted[number], stream.index, pattern.grid[1])
  return x, cache.replace(shifted=(*cache.shifted[:number], past, *cache.shifted[number + 1 :]))


class Period(nn.Module):
  """The blocks of one scan step.

  Attributes:
    block: the fields of `Block`.
    kinds: the pattern of each block if it is the same in every step, or -1 if it is an input of the step.
  """

  block: tuple[Any, ...]
  kinds: tuple[int, ...]

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    inputs: tuple[jax.Array | None, Context | tuple[Context, ...] | None],
    mask: jax.Array | None,
    stream: Stream | None,
    attending: jax.Array | None,
    cache: KVCache | None = None,
    first: int = 0,
  ) -> tuple[jax.Array, KVCache | None]:
    """`inputs` are kinds int32[period] and the contexts of the layers with cross-attention, evenly spread over blocks.

    `first` is the index in the cache of the first layer.
    """
    kinds, context = inputs
    contexts = context.layers() if isinstance(context, Context) else context or ()
    every = len(self.kinds) // len(contexts) if contexts else 0
    for i, kind in enumerate(self.kinds):
      block = Block(*self.block, name=f'block_{i}')
      own = contexts[i // every] if contexts and (i + 1) % every == 0 else None
      x, cache = block(x, mask, stream, kinds[i] if kind < 0 else kind, cache, first + i, own, attending)
    return x, cache


class Stack(nn.Module):
  """`depth` blocks over [B, S, D], scanned in steps of `period` blocks: parameters are [depth / period, ...].

  Attributes:
    remat: what the backward pass recomputes: 'none'; 'full', everything but the inputs of each scan step; 'dots',
      everything but matrix products with parameters and the outputs of attention.
    unroll: scan steps compiled without a loop around them. On the CPU 4 is 5 to 15% faster than 1; with 12, XLA adds up
      the residual stream of all steps before for each of them. On a GPU unrolling all steps saves buffers that a loop
      first fills with zeros and copies, a tenth of a step of 1.3b (estimated). Compilation takes longer.
    norms: where the LayerNorms are, see `residual`.
    mlp: the width of the MLP; 0: four times that of x.
    eps: of the LayerNorms.
    kernel: of attention, see `layers.kernels.stream_attention`.
    head_dim: features of a head; 0: the width of x is split among the heads.
    shift_tokens: shifts the inputs of attention and MLP, see `layers.token_shift`; needs a `stream`.
    reversible: two residual streams that begin as x, y1 = x1 + attention(x2) and y2 = x2 + MLP(y1), whose mean is the
      result (RevNet, Gomez et al., 2017). Only the architecture: memory is saved by `remat`.
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
  head_dim: int = 0
  shift_tokens: bool = False
  reversible: bool = False

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
      mask: bool[T, T] or [B, T or 1, T], the keys that each query sees; all by default.
      stream: describes x as a stream of tokens; layer l attends by `stream.patterns[kinds[l]]`, and `mask` is ignored.
      kinds: all 0 by default.
      cache: keys and values of a stream. Layers are then compiled one after the other, without a scan, as a loop would
        copy its layer's part of the cache for every token; best with parameters cut by `models.decode_params.by_layer`.
      context: of a source that every (depth / L)-th layer cross-attends to; with a cache a tuple, one for each of them.
      attending: bool[T], the positions of x that cross-attend.

    Raises ValueError when heads, period, activation, remat or norms do not fit.
    """
    self._check(x)
    if self.reversible:
      x = jnp.concatenate([x, x], -1)
    by_layer = np.zeros(self.depth, np.int32) if kinds is None else np.asarray(kinds, np.int32)
    by_step = by_layer.reshape(-1, self.period)
    mask, attending = (None if a is None else jnp.asarray(a) for a in (mask, attending))
    if cache is not None:
      x, cache = self._decode(x, mask, stream, by_step, cache, cast(tuple, context or ()), attending)
    else:
      x = self._train(x, mask, stream, by_step, cast(Context, context), attending)
    if self.reversible:
      x = sum(jnp.split(x, 2, -1)) / 2
    return x, cache

  @property
  def _block(self) -> tuple[Any, ...]:
    """The fields of a `Block`."""
    return (
      self.depth, self.heads, self.activation, self.dtype, self.norms, self.mlp, self.eps, self.kernel, self.head_dim,
      self.shift_tokens, self.reversible,
    )  # fmt: skip

  def _check(self, x: jax.Array) -> None:
    if x.shape[-1] % self.heads and not self.head_dim:
      raise ValueError(f'a width of {x.shape[-1]} is not divisible by {self.heads} heads; change either.')
    if self.head_dim < 0:
      raise ValueError(f'head_dim is {self.head_dim}; expected 1 or more, or 0 to split the width among the heads.')
    if self.depth % self.period:
      raise ValueError(f'{self.depth} layers are not divisible by the period {self.period}; change either.')
    if self.activation not in ACTIVATIONS:
      raise ValueError(f'activation {self.activation!r} is unknown; there are {", ".join(ACTIVATIONS)}.')
    if self.remat not in REMATS:
      raise ValueError(f'remat {self.remat!r} is unknown; there are {", ".join(REMATS)}.')
    if self.norms not in NORMS:
      raise ValueError(f'norms {self.norms!r} is unknown; there are {", ".join(NORMS)}.')
    if self.shift_tokens and x.shape[-1] % 4:
      raise ValueError(f'token shift needs a width divisible by 4, not {x.shape[-1]}; change either.')
    if self.reversible and self.norms == 'post':
      raise ValueError('a reversible stack cannot have norms="post"; use pre or sandwich.')

  def _train(
    self,
    x: jax.Array,
    mask: jax.Array | None,
    stream: Stream | None,
    kinds: np.ndarray,
    context: Context | None,
    attending: jax.Array | None,
  ) -> jax.Array:
    """All blocks by a scan; kinds are int32[steps, period]."""
    steps, n = len(kinds), x.shape[1]
    body: type[nn.Module] = Period
    if self.remat != 'none':
      # Forward and backward pass of a scan are separate loops, which XLA does not merge; steps outside of a loop it
      # would, and so undo remat.
      looped = steps >= 2 * self.unroll and steps % self.unroll == 0
      body = nn.remat(Period, prevent_cse=not looped, policy=_dots_policy() if self.remat == 'dots' else None)
    scan = nn.scan(
      body,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
      length=steps,
      unroll=min(self.unroll, steps),
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    static = tuple(int(kind) if (kinds[:, i] == kind).all() else -1 for i, kind in enumerate(kinds[0]))
    contexts = None if context is None else context.per_step(steps)
    if stream is not None and (short := -n % num_shards('seq')):
      # Padded to divide over the devices; causal attention does not see what comes after the stream.
      x = jnp.pad(x, ((0, 0), (0, short), (0, 0)))
      attending = None if attending is None else jnp.pad(attending, (0, short))
    x, _ = scan(self._block, static, name='blocks')(x, (jnp.asarray(kinds), contexts), mask, stream, attending)
    return x[:, :n]

  def _decode(
    self,
    x: jax.Array,
    mask: jax.Array | None,
    stream: Stream | None,
    kinds: np.ndarray,
    cache: KVCache,
    contexts: tuple[Context, ...],
    attending: jax.Array | None,
  ) -> tuple[jax.Array, KVCache]:
    """All blocks one after the other, with the parameters that `_train` made."""
    params, each = self.variables['params']['blocks'], layers_per_step(len(contexts), len(kinds))
    for i, own_kinds in enumerate(kinds):
      own = params[i] if isinstance(params, tuple) else jax.tree.map(operator.itemgetter(i), params)
      inputs = None, contexts[i * each : (i + 1) * each]
      period = Period(self._block, tuple(int(kind) for kind in own_kinds), parent=None)
      x, cache = period.apply({'params': own}, x, inputs, mask, stream, attending, cache, i * self.period)
    return x, cache


def _dots_policy() -> Callable[..., Any]:
  """Saves matrix products with parameters and the outputs of attention."""
  policies = jax.checkpoint_policies
  attention = policies.save_from_both_policies(policies.save_only_these_names(kernels.ATTENTION_OUT), kernels.is_flash)
  return policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, attention)
