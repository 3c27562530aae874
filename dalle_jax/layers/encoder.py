"""A pre-LayerNorm Transformer of whole sequences, without a cache (CLIP's two towers).

Axis legend: B batch, S/T sequence, D embed, H heads, K head_dim.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.layers.basic import Dense, Einsum, LayerNorm, constrain, normal_init

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),  # of the OpenAI CLIP weights
}


class EncoderBlock(nn.Module):
  """Attention and MLP, each `x + f(norm(x))`; fields as in Encoder. Returns (x, None), as a scan wants it."""

  depth: int
  heads: int
  causal: bool
  activation: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
    x = constrain(x, ('batch', 'seq', 'embed'))
    s, d = x.shape[1:]
    inner, outer = normal_init(d**-0.5), normal_init((2 * self.depth * d) ** -0.5)  # the sum over layers keeps its size
    shape, axes = (d, self.heads, d // self.heads), ('embed', 'heads', 'head_dim')

    y = LayerNorm(dtype=self.dtype, name='norm_1')(x)
    q, k, v = (
      Einsum(shape, axes, bias_axes=(1, 2), dtype=self.dtype, init=inner, name=n)('BSD,DHK->BSHK', y)
      for n in ('query', 'key', 'value')
    )
    scores = jnp.einsum('BSHK,BTHK->BHST', q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if self.causal:
      scores = jnp.where(jnp.tril(jnp.ones((s, s), bool)), scores, -1e30)
    y = jnp.einsum('BHST,BTHK->BSHK', jax.nn.softmax(scores).astype(self.dtype), v)
    out = Einsum((*shape[1:], d), (*axes[1:], 'embed'), bias_axes=(2,), dtype=self.dtype, init=outer, name='out')
    x = x + out('BSHK,HKD->BSD', y)

    y = LayerNorm(dtype=self.dtype, name='norm_2')(x)
    y = Dense(4 * d, ('embed', 'mlp'), dtype=self.dtype, init=normal_init((2 * d) ** -0.5), name='mlp_in')(y)
    y = ACTIVATIONS[self.activation](y)
    return x + Dense(d, ('mlp', 'embed'), dtype=self.dtype, init=outer, name='mlp_out')(y), None


class Encoder(nn.Module):
  """`depth` blocks over `[B, S, D]`, scanned: parameters are stacked `[depth, ...]` under 'blocks'.

  Raises ValueError when the width is not divisible by `heads`, or for an unknown activation.
  """

  depth: int
  heads: int
  causal: bool = False
  activation: str = 'gelu'
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    if x.shape[-1] % self.heads:
      raise ValueError(f'a width of {x.shape[-1]} is not divisible by {self.heads} heads; change either.')
    if self.activation not in ACTIVATIONS:
      raise ValueError(f'activation {self.activation!r} is unknown; there are {", ".join(ACTIVATIONS)}.')
    blocks = nn.scan(
      EncoderBlock,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=self.depth,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    x, _ = blocks(self.depth, self.heads, self.causal, self.activation, self.dtype, name='blocks')(x)
    return x
