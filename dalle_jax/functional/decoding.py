"""Autoregressive sampling over plain callables: temperature, top-k, top-p, classifier-free guidance.

Axis legend: B sequences, V vocabulary.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

MASKED = -1e30  # the logit of a token that must not be sampled
SMALLEST = 1e-9  # temperature other than 0, and top_p; still smaller ones would be 0 or overflow in float32
OFF = {'temperature': 0, 'top_p': 1, 'guidance': 1}  # the numbers that leave an option of `Sampling` out of a program


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is sampled; a pytree, so that one program serves all values of an option that is in use.

  Under jit the numbers are traced, but for top_k and for those that stand for an option that is off (greedy sampling,
  no top-p, no guidance), which leave that option out of the program.

  Attributes:
    temperature: divides the logits; 0.0 is greedy.
    top_k: samples among the k most probable tokens; 0 for all.
    top_p: samples among the smallest set of tokens with this total probability (Holtzman et al., 2020); 1.0 for all.
      Tokens with equal logits stay or go together.
    guidance: s of uncond + s (cond - uncond) (Ho and Salimans, 2021); 1.0 for no guidance.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  guidance: float = 1.0

  def __post_init__(self):
    for name in ('temperature', 'top_p', 'guidance'):
      value = getattr(self, name)
      if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f'{name} is {value!r}; expected a finite number.')
    if not isinstance(self.top_k, numbers.Integral):
      raise ValueError(f'top_k is {self.top_k!r}; expected a whole number.')
    if self.temperature < 0:
      raise ValueError(f'temperature {self.temperature} is negative; use 0.0 (greedy) or more.')
    if 0 < self.temperature < SMALLEST:
      raise ValueError(f'temperature {self.temperature} is too small; use 0.0 (greedy), or {SMALLEST} or more.')
    if self.top_k < 0:
      raise ValueError(f'top_k {self.top_k} is negative; use 0 for all tokens.')
    if not SMALLEST <= self.top_p <= 1:
      raise ValueError(f'top_p {self.top_p} is not in [{SMALLEST}, 1]; use 1.0 for all tokens.')

  @property
  def guided(self) -> bool:
    return not _known(self.guidance, OFF['guidance'])

  def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[int, tuple[str, ...]]]:
    traced = tuple(name for name, off in OFF.items() if not _known(getattr(self, name), off))
    values = (getattr(self, name) for name in traced)
    # Integers would make another program than floats.
    return tuple(float(v) if isinstance(v, numbers.Real) else v for v in values), (self.top_k, traced)

  @classmethod
  def tree_unflatten(cls, fixed: tuple[int, tuple[str, ...]], values: Sequence[Any]) -> 'Sampling':
    top_k, traced = fixed
    new = object.__new__(cls)  # not by __init__, which cannot check tracers
    for name, value in {**OFF, 'top_k': top_k, **dict(zip(traced, values, strict=True))}.items():
      object.__setattr__(new, name, value)
    return new


def _known(value: Any, number: float) -> bool:
  """Whether an option is known to be that number; a traced one is not."""
  return isinstance(value, numbers.Real) and value == number


def filter_logits(logits: jax.Array, top_k: int = 0, top_p: float | jax.Array = 1.0) -> jax.Array:
  """Sets float32[B, V] to MASKED for tokens outside of top-k and top-p; the most probable one always stays."""
  if 0 < top_k < logits.shape[-1]:
    threshold = jax.lax.top_k(logits, top_k)[0][:, -1:]
    logits = jnp.where(logits < threshold, MASKED, logits)
  if not _known(top_p, OFF['top_p']):
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(ordered)
    before = jnp.cumsum(probs, axis=-1) - probs  # the total probability of more probable tokens
    threshold = jnp.where(before < top_p, ordered, jnp.inf).min(-1, keepdims=True)
    logits = jnp.where(logits < threshold, MASKED, logits)
  return logits


def guide(logits: jax.Array, scale: float | jax.Array) -> jax.Array:
  """Classifier-free guidance of float32[2 * B, V], conditional rows first: float32[B, V]."""
  cond, uncond = jnp.split(logits, 2)
  return uncond + scale * (cond - uncond)


def choose(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
  """The next token of each sequence, int32[B], from float32[B, V] ([2 * B, V] when guided) and keys[B]."""
  if sampling.guided:
    logits = guide(logits, sampling.guidance)
  if _known(sampling.temperature, OFF['temperature']):
    return first_largest(logits)
  logits = filter_logits(logits / sampling.temperature, sampling.top_k, sampling.top_p)
  noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)  # Gumbel-max, as categorical does
  return first_largest(logits + noise)


def first_largest(x: jax.Array) -> jax.Array:
  """argmax of x[..., V], int32[...]; jnp.argmax takes XLA for CPUs (jaxlib 0.10) much longer."""
  index = jnp.where(x == x.max(-1, keepdims=True), jnp.arange(x.shape[-1], dtype=jnp.int32), x.shape[-1] - 1)
  return index.min(-1)


def generate(
  step: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]],
  logits: jax.Array,
  cache: Any,
  keys: jax.Array,
  *,
  start: int,
  length: int,
  sampling: Sampling,
  segments: int = 0,
) -> jax.Array:
  """Samples tokens start, ..., length - 1 of B sequences: int32[B, length - start].

  Args:
    step: (token int32[2 * B or B], its index int32[], cache) -> (logits of the next token, cache).
    logits: of token `start`, [B, V]; [2 * B, V] with guidance, as are `step`'s (conditional rows first).
    keys: a key for each sequence, [B]; token i uses `fold_in(key, i)`, so a sequence does not depend on its batch.
    cache: of the tokens before `start`; `cache.extend(n)` makes room for n more.
    segments: number of scans, each with a longer cache than the one before, so that early tokens are cheap; 0: one for
      every 64 tokens, at most 4.
  """

  # All keys at once, [length - start, B]: hashing a few keys for each token takes as long as a small layer.
  fold_in_each = jax.vmap(jax.random.fold_in, (0, None))
  token_keys = jax.vmap(fold_in_each, (None, 0))(keys, jnp.arange(start, length))

  def body(carry, inputs):
    token, cache = carry
    index, keys = inputs
    rows = jnp.tile(token, 2) if sampling.guided else token
    logits, cache = step(rows, index, cache)
    new = choose(logits, keys, sampling)
    return (new, cache), new

  token = choose(logits, token_keys[0], sampling)
  tokens, last = [token[None]], length - 1  # token `last` is sampled but never an input
  segments = segments or min(4, -(-(last - start) // 64))
  bounds = sorted({start + (last - start) * (i + 1) // segments for i in range(segments)} - {start})
  for first, end in zip([start, *bounds], bounds, strict=False):
    inputs = jnp.arange(first, end), token_keys[first - start + 1 : end - start + 1]
    (token, cache), more = jax.lax.scan(body, (token, cache.extend(end - first)), inputs)
    tokens.append(more)
  return jnp.concatenate(tokens).T


def complete_text(
  next_logits: Callable[[jax.Array, jax.Array], jax.Array],
  text: jax.Array,
  lengths: jax.Array,
  padding: jax.Array,
  words: int,
  keys: jax.Array,
  sampling: Sampling,
  end: int = -1,
) -> jax.Array:
  """Samples the rest of B captions, then padding: int32[B, T].

  Each token takes a pass over the whole text, as captions are short and have no cache.

  Args:
    next_logits: (text, t) -> the logits of token t, float32[B, V], which depend on the tokens before t.
    text: int32[B, T], of which the first lengths[b] tokens are given.
    padding: int32[T], the padding id of each position, which ends a caption, as does `end`.
    words: the ids below this one, and the padding of its position, are what a token may be.
    keys: a key for each caption, [B].
  """

  def body(t: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    text, ended = carry
    logits = next_logits(text, t)
    ids = jnp.arange(logits.shape[-1])
    logits = jnp.where((ids < words) | (ids == padding[t]), logits, MASKED)
    token = choose(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, t), sampling)
    given = t < lengths
    token = jnp.where(given, text[:, t], jnp.where(ended, padding[t], token))
    return text.at[:, t].set(token), ended | (~given & ((token == padding[t]) | (token == end)))

  first = lengths.min()  # what all captions are given needs no pass
  return jax.lax.fori_loop(first, text.shape[1], body, (text, jnp.zeros(len(text), bool)))[0]


def sample(
  apply: Callable[..., Any],
  text: jax.Array,
  image: jax.Array,
  keys: jax.Array,
  *,
  empty: jax.Array,
  length: int,
  n: int,
  sampling: Sampling,
) -> jax.Array:
  """Samples the tokens of `n` images for each text; the n share one prefill.

  Args:
    apply: a model's `apply` with its parameters; `apply(text, image, method='prefill')` -> (logits, cache) and
      `apply(token, index, cache, method='step')` -> (logits, cache), see `models.dalle`.
    text: int32[B, T].
    image: int32[B, k], the given first k < length tokens of the images.
    keys: a key for each image, [B * n].
    empty: int32[T], the text of the unconditional half of guidance.
    length: tokens of an image.

  Returns:
    int32[B * n, length], the n images of a text next to each other.
  """
  given = jnp.repeat(image, n, axis=0)
  if sampling.guided:
    text = jnp.concatenate([text, jnp.broadcast_to(jnp.asarray(empty), text.shape)])
    image = jnp.tile(image, (2, 1))
  logits, cache = apply(text, image, method='prefill')
  cache = cache.repeat(n)
  copies = cache.copies  # duplicate rows, where that is faster

  def step(token: jax.Array, index: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
    logits, cache = apply(jnp.repeat(token, copies), index, cache, method='step')
    return logits.reshape(-1, copies, logits.shape[-1])[:, 0], cache

  tokens = generate(
    step,
    jnp.repeat(logits, n, axis=0),
    cache.repeat(copies),
    keys,
    start=image.shape[1],
    length=length,
    sampling=sampling,
  )
  return jnp.concatenate([given, tokens], 1)
