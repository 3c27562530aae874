"""Vector quantisers, and codebook maintenance: moving averages, dead codes, usage.

Axis legend: N vectors in a batch, K codes, D code_dim. Everything here is float32.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from dalle_jax.layers.basic import Conv, param

State = dict[str, jax.Array]


class Quantized(struct.PyTreeNode):
  """The output of a quantiser; `losses` are unweighted scalars.

  Attributes:
    vectors: float32[B, h, w, D], codebook vectors, with straight-through gradients to the encoder.
    codes: int32[B, h, w] in [0, K).
    inputs: float32[B, h, w, D], the vectors that were quantised.
    losses: 'commitment' and 'codebook' (nearest neighbour) or 'kl' (Gumbel).
  """

  vectors: jax.Array
  codes: jax.Array
  inputs: jax.Array
  losses: dict[str, jax.Array]


class NearestQuantizer(nn.Module):
  """The nearest codebook vector, straight-through (van den Oord et al., 2017, section 3.2).

  The two halves of its loss are returned separately, as a codebook updated by moving averages only needs one. With
  `normalize`, vectors and codes are on the unit sphere (Yu et al., 2022, "ViT-VQGAN", section 3.2).
  """

  num_codes: int
  code_dim: int
  normalize: bool = False

  def setup(self):
    bound = 1 / self.num_codes
    init = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
    self.embedding = param(self, 'embedding', init, ('codes', None), (self.num_codes, self.code_dim))

  def __call__(self, z: jax.Array, rng: jax.Array | None = None, temperature: float = 1.0) -> Quantized:
    """Quantises `[B, h, w, D]`; `rng` and `temperature` are unused, see `GumbelQuantizer`."""
    z = self._project(z.astype(jnp.float32))
    table = self._project(self.embedding)
    codes = nearest(z, table)
    vectors = jnp.take(table, codes, axis=0)
    losses = {
      'commitment': jnp.square(z - jax.lax.stop_gradient(vectors)).mean(),
      'codebook': jnp.square(jax.lax.stop_gradient(z) - vectors).mean(),
    }
    return Quantized(z + jax.lax.stop_gradient(vectors - z), codes, z, losses)

  def lookup(self, codes: jax.Array) -> jax.Array:
    """int32[...] in [0, K) -> float32[..., D]."""
    return self._project(jnp.take(self.embedding, codes, axis=0))

  def _project(self, x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12) if self.normalize else x


class GumbelQuantizer(nn.Module):
  """Samples a code from logits with the Gumbel-softmax trick, straight-through (Jang et al., 2017, section 2.2)."""

  num_codes: int
  code_dim: int

  def setup(self):
    self.proj = Conv(self.num_codes, 1)
    init = nn.initializers.normal(1.0)
    self.embedding = param(self, 'embedding', init, ('codes', None), (self.num_codes, self.code_dim))

  def __call__(self, z: jax.Array, rng: jax.Array | None = None, temperature: float | jax.Array = 1.0) -> Quantized:
    """Quantises `[B, h, w, D]`. Codes are sampled with `rng`, and the most probable ones without."""
    z = z.astype(jnp.float32)
    logits = self.proj(z)  # (B, h, w, K)
    noise = 0.0 if rng is None else jax.random.gumbel(rng, logits.shape)
    soft = jax.nn.softmax((logits + noise) / temperature)
    codes = soft.argmax(-1)
    hard = jax.nn.one_hot(codes, self.num_codes) + soft - jax.lax.stop_gradient(soft)
    log_probs = jax.nn.log_softmax(logits)
    kl = (jnp.exp(log_probs) * (log_probs + jnp.log(self.num_codes))).sum(-1).mean()  # to the uniform distribution
    return Quantized(hard @ self.embedding, codes, z, {'kl': kl})

  def lookup(self, codes: jax.Array) -> jax.Array:
    """int32[...] in [0, K) -> float32[..., D]."""
    return jnp.take(self.embedding, codes, axis=0)


def nearest(z: jax.Array, table: jax.Array) -> jax.Array:
  """Index of the row of `table[K, D]` nearest to each of `z[..., D]`: int32[...]."""
  products = jnp.matmul(z, table.T, precision=jax.lax.Precision.HIGHEST)
  return (jnp.square(table).sum(-1) - 2 * products).argmin(-1).astype(jnp.int32)  # |z|^2 does not change the order


def usage(codes: jax.Array, num_codes: int) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Relative frequency of each code, float32[K] with mean 1, and metrics: the number of used codes and perplexity."""
  counts = jnp.zeros(num_codes).at[codes.ravel()].add(1.0)
  p = counts / codes.size
  perplexity = jnp.exp(-(p * jnp.log(jnp.maximum(p, 1e-10))).sum())
  return p * num_codes, {'used_codes': (counts > 0).sum().astype(jnp.float32), 'perplexity': perplexity}


def codebook_state(num_codes: int, code_dim: int, data_init: bool = True) -> State:
  """Statistics before the first batch. A negative `count` marks a code not initialised yet, see `update_codebook`."""
  return {
    'step': jnp.int32(-1),  # of the last update
    'count': jnp.full(num_codes, -1.0 if data_init else 1.0, jnp.float32),  # moving average of `usage`
    'vectors': jnp.zeros((num_codes, code_dim)),  # to be written into the rows of the codebook
    'write': jnp.zeros(num_codes, bool),  # where this is True
  }


def update_codebook(
  state: State,
  embedding: jax.Array,
  quantized: Quantized,
  rng: jax.Array,
  step: jax.Array,
  *,
  decay: float,
  revive: float,
  average: bool,
) -> State:
  """Updates the statistics by a batch, and chooses the rows of the codebook that `write_codebook` overwrites.

  Args:
    embedding: float32[K, D], the codebook that quantised the batch.
    step: updates with the same step (gradient accumulation) add up.
    decay: of the moving averages (van den Oord et al., 2017, appendix A.1).
    revive: a code used less than this fraction of the mean is dead and is replaced by a vector of the batch, as is one
      that was never initialised from data; 0.0 only does the latter.
    average: moves every code to the moving average of its vectors.
  """
  num_codes, dim = embedding.shape
  z, quantised = (jax.lax.stop_gradient(x).reshape(-1, dim) for x in (quantized.inputs, quantized.vectors))
  codes = quantized.codes.ravel()
  again = state['step'] == step
  vectors = jnp.where(again, state['vectors'], embedding) if average else embedding
  uninitialised = state['count'] < 0  # not 0, to which the average of an unused code decays
  old = decay * jnp.maximum(state['count'], 0.0)
  new = (1 - decay) * usage(codes, num_codes)[0]
  count = old + new
  if average:
    sums = jnp.zeros_like(embedding).at[codes].add(z) * (num_codes / len(z))
    mean = (old[:, None] * vectors + (1 - decay) * sums) / jnp.maximum(count, 1e-10)[:, None]
    vectors = jnp.where(new[:, None] > 0, mean, vectors)  # an unused code does not move, however small its count
  # Dead codes take vectors of the batch, sampled without replacement and with probability proportional to their
  # quantisation error, as in k-means++ (Arthur and Vassilvitskii, 2007). If there are too few, they wait.
  dead = uninitialised | (count < revive)
  rank = jnp.cumsum(dead) - 1
  dead &= rank < len(z)
  error = jnp.square(z - quantised).sum(-1)
  sampled = jnp.argsort(-(jnp.log(error + 1e-12) + jax.random.gumbel(rng, error.shape)))
  fresh = z[sampled[rank % len(z)]]
  pending = jnp.where(again, state['write'], False)
  if not average:
    vectors = jnp.where(pending[:, None], state['vectors'], vectors)
  return {
    'step': jnp.asarray(step, jnp.int32),
    'count': jnp.select([dead, uninitialised], [1.0, -1.0], count),  # 1: has time to be used before it is dead again
    'vectors': jnp.where(dead[:, None], fresh, vectors),
    'write': jnp.full(num_codes, True) if average else dead | pending,
  }


def write_codebook(state: State, embedding: jax.Array) -> jax.Array:
  """The codebook `embedding[K, D]` with the rows that `update_codebook` chose overwritten."""
  return jnp.where(state['write'][:, None], state['vectors'], embedding)
