"""Gaussian diffusion over plain callables: noise added step by step, and drawing that takes it away again.

"Denoising Diffusion Probabilistic Models", Ho et al., 2020 (DDPM); "Improved Denoising Diffusion Probabilistic Models",
Nichol and Dhariwal, 2021 (IDDPM). Axis legend: B rows, T steps of training; x is float32[B, ...].
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SCHEDULES = ('cosine', 'linear')
PREDICTS = ('noise', 'start', 'velocity')
VARIANCES = ('small', 'learned')
LEAST = 1e-20  # of a variance, before its logarithm


@dataclasses.dataclass(frozen=True)
class Diffusion:
  """What is added, and what a network says of it; hashable. Step t of 0 .. steps - 1 has the more noise the later.

  Attributes:
    steps: T.
    schedule: 'cosine' (IDDPM, section 3.2) or 'linear' (DDPM, section 4, which scales with T).
    predicts: the 'noise' in x, its 'start', which is x without noise, or the 'velocity', of which a network learns both
      ends alike ("Progressive Distillation", Salimans and Ho, 2022, section 4): signal * noise - amount * start.
    variance: of a step back: 'small', that of the true one if the start were known, or 'learned', where between it and
      the largest the network says in as many channels more, -1 to 1 (IDDPM, equation 15).
    clip: while drawing, the start is kept in [-clip, clip].
    shift: the signal of 'cosine' beside its noise is as many times as much. Below 1 for pictures whose pixels repeat
      each other, so that much noise still shows what is there: large ones, flat ones ("Simple Diffusion", Hoogeboom et
      al., 2023, section 3.1: 64 / side).
  """

  steps: int = 1000
  schedule: str = 'cosine'
  predicts: str = 'noise'
  variance: str = 'small'
  clip: float = 1.0
  shift: float = 1.0

  def __post_init__(self):
    for name, known in (('schedule', SCHEDULES), ('predicts', PREDICTS), ('variance', VARIANCES)):
      if getattr(self, name) not in known:
        raise ValueError(f'diffusion {name} {getattr(self, name)!r} is unknown; there are {", ".join(known)}.')
    if self.steps < 2 or self.clip <= 0:
      raise ValueError(f'diffusion has {self.steps} steps and clip {self.clip}; expected 2 or more, and above 0.')
    if self.shift <= 0 or (self.shift != 1 and self.schedule != 'cosine'):
      raise ValueError(f'diffusion shift is {self.shift}; expected one above 0, and 1 but for the schedule cosine.')
    if self.schedule == 'linear' and self.steps <= 20:
      raise ValueError(f'diffusion has {self.steps} steps; schedule linear needs more than 20, or use cosine.')

  @property
  def outputs(self) -> int:
    """How many channels a network gives for each of x."""
    return 2 if self.variance == 'learned' else 1

  def betas(self) -> np.ndarray:
    """The share of the variance of x that each step makes noise of: float32[T] (DDPM: beta)."""
    if self.schedule == 'linear':
      return np.linspace(1e-4, 0.02, self.steps, dtype=np.float32) * np.float32(1000 / self.steps)
    cosine = np.square(np.cos((np.arange(self.steps + 1) / self.steps + 0.008) / 1.008 * np.pi / 2))
    signal, noise = self.shift**2 * cosine, cosine[0] - cosine
    kept = signal / (signal + noise)
    return np.minimum(1 - kept[1:] / kept[:-1], 0.999).astype(np.float32)

  def alphas_cumprod(self) -> np.ndarray:
    """The share of it that is the start's after each step, falling: float32[T] (DDPM: alpha bar)."""
    return np.cumprod(1 - self.betas(), dtype=np.float64).astype(np.float32)

  def timesteps(self, count: int, name: str = 'steps') -> tuple[int, ...]:
    """`count` of the T steps, evenly, from the last to 0. Raises ValueError, which says `name`, for no 2 to T."""
    if not 2 <= count <= self.steps:
      raise ValueError(f'{name} is {count}; expected 2 to {self.steps}, the steps of diffusion in training.')
    return tuple(int(t) for t in np.round(np.arange(count) * (self.steps - 1) / (count - 1))[::-1])


def _posterior(d: Diffusion, later: Sequence[int], earlier: Sequence[int]) -> dict[str, np.ndarray]:
  """From steps to earlier ones, numbers for each pair, float32 (DDPM, equations 6 and 7); step -1 is the start itself.

  The mean is of_start * start + of_x * x; 'small' and 'large' are logarithms of the least and the largest variance; x
  at the later step is signal * start + noise * a normal draw.

  In float64 from what is rounded to float32, as in public code: its weights are made for the mean at step 0 being
  0.9995 of the start, as 1 - kept is off by so much there.
  """
  kept, added = np.append(d.alphas_cumprod(), 1.0).astype(np.float64), d.betas().astype(np.float64)
  at, to = np.asarray(later), np.asarray(earlier)
  now, then = kept[at], kept[to]
  beta = np.where(at - to == 1, added[at], 1 - now / then)
  small = (1 - then) / (1 - now) * beta
  numbers = dict(
    of_start=np.sqrt(then) * beta / (1 - now),
    of_x=np.sqrt(1 - beta) * (1 - then) / (1 - now),
    small=np.log(np.maximum(small, LEAST)),
    large=np.log(beta),
    signal=np.sqrt(now),
    noise=np.sqrt(1 - now),
  )
  return {name: value.astype(np.float32) for name, value in numbers.items()}


def add_noise(d: Diffusion, start: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
  """x at steps t int32[B], from its start and standard normal noise."""
  kept = d.alphas_cumprod()
  signal, amount = (_rows(np.sqrt(v), t, start) for v in (kept, 1 - kept))
  return signal * start + amount * noise


def _rows(table: np.ndarray, t: jax.Array, x: jax.Array) -> jax.Array:
  """Numbers of a table at t[B], as x broadcasts to."""
  return jnp.asarray(table)[t].reshape(-1, *(1,) * (x.ndim - 1))


def _split(d: Diffusion, out: jax.Array) -> tuple[jax.Array, jax.Array | None]:
  """What the network predicts, and what it says of the variance."""
  if d.variance != 'learned':
    return out, None
  found, variance = jnp.split(out, 2, axis=-1)
  return found, variance


def guide(d: Diffusion, cond: jax.Array, uncond: jax.Array, scale: float) -> jax.Array:
  """Classifier-free guidance of what is predicted (Ho and Salimans, 2021): 1 is none. The variance is that of cond."""
  found, variance = _split(d, cond)
  other, _ = _split(d, uncond)
  found = other + scale * (found - other)
  return found if variance is None else jnp.concatenate([found, variance], -1)


def guided(d: Diffusion, apply: Callable[[jax.Array, jax.Array], jax.Array], scale: float) -> Any:
  """A guided `predict` for `draw`, by a network that is given every row twice, with its condition, then without."""

  def predict(x: jax.Array, t: jax.Array) -> jax.Array:
    cond, uncond = jnp.split(apply(jnp.concatenate([x, x]), jnp.concatenate([t, t])), 2)
    return guide(d, cond, uncond, scale)

  return predict


def _start(d: Diffusion, found: jax.Array, x: jax.Array, signal: jax.Array, noise: jax.Array) -> jax.Array:
  if d.predicts == 'start':
    return found
  return (x - noise * found) / signal if d.predicts == 'noise' else signal * x - noise * found


def step_back(d: Diffusion, out: jax.Array, x: jax.Array, later: int, earlier: int, noise: jax.Array) -> jax.Array:
  """x at step `earlier` (-1: the start) from x at `later`, what the network says of it, and standard normal noise."""
  numbers = _posterior(d, [later], [earlier])
  return _step(d, out, x, {k: v[0] for k, v in numbers.items()}, noise, last=later == 0)


def _step(d: Diffusion, out: jax.Array, x: jax.Array, by: dict[str, Any], noise: jax.Array, last: Any) -> jax.Array:
  found, variance = _split(d, out)
  start = jnp.clip(_start(d, found, x, by['signal'], by['noise']), -d.clip, d.clip)
  mean = by['of_start'] * start + by['of_x'] * x
  share = 0.0 if variance is None else (variance + 1) / 2
  spread = jnp.exp(0.5 * (share * by['large'] + (1 - share) * by['small']))
  return mean + jnp.where(last, 0.0, spread) * noise


def sample(
  d: Diffusion,
  predict: Callable[[jax.Array, jax.Array], jax.Array],
  x: jax.Array,
  keys: jax.Array,
  steps: Sequence[int],
  last: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> jax.Array:
  """From noise x at the first of `steps` (of `Diffusion.timesteps`) down to the start: [B, ...], float32.

  Args:
    predict: (x, t int32[B]) -> what the network says of it, [B, ...], guided or not.
    keys: a key each row, [B], so that a row does not depend on its batch.
    last: says it of the last step; by default `predict`.
  """

  def normal(i: jax.Array) -> jax.Array:
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), x.shape[1:]))(keys)

  def body(x: jax.Array, turn: Any, predict: Any = predict) -> tuple[jax.Array, None]:
    t, i, by = turn
    out = predict(x, jnp.full(len(x), t, jnp.int32)).astype(jnp.float32)
    return _step(d, out, x, by, normal(i), t == 0), None

  by = jax.tree.map(jnp.asarray, _posterior(d, steps, [*steps[1:], -1]))
  turns = jnp.asarray(steps, jnp.int32), jnp.arange(1, len(steps) + 1), by  # 0: where x itself came from
  if last is None:
    return jax.lax.scan(body, x, turns)[0]
  x, _ = jax.lax.scan(body, x, jax.tree.map(lambda v: v[:-1], turns))
  return body(x, jax.tree.map(lambda v: v[-1], turns), last)[0]


def initial_noise(keys: jax.Array, shape: Sequence[int]) -> jax.Array:
  """What `draw` begins with: float32[B, *shape], a key each row."""
  return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), tuple(shape)))(keys)


# --- Losses


def losses(
  d: Diffusion, out: jax.Array, start: jax.Array, x: jax.Array, t: jax.Array, noise: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The squared error of what is predicted, and the variational bound of one step in bits, both per number: float32[B].

  The bound trains a 'learned' variance alone, with the mean as it is (IDDPM, section 3.1); its sum over all T is the
  whole, so a term counts T / 1000 in L_hybrid (lambda = 0.001). It is 0 where the variance is not learned.
  """
  out = out.astype(jnp.float32)
  found, variance = _split(d, out)
  axes = tuple(range(1, x.ndim))
  signal, amount = (_rows(np.sqrt(v), t, start) for v in (d.alphas_cumprod(), 1 - d.alphas_cumprod()))
  wanted = {'start': start, 'noise': noise, 'velocity': signal * noise - amount * start}[d.predicts]
  simple = jnp.square(found - wanted).mean(axes)
  if variance is None:
    return simple, jnp.zeros_like(simple)
  every = list(range(d.steps))
  numbers = _posterior(d, every, [t - 1 for t in every])
  numbers['small'] = np.append(numbers['small'][1], numbers['small'][1:])  # that of step 0 is none
  by = {k: _rows(v, t, x) for k, v in numbers.items()}
  mean_of = lambda start: by['of_start'] * start + by['of_x'] * x
  true = mean_of(start)
  mean = mean_of(_start(d, jax.lax.stop_gradient(found), x, by['signal'], by['noise']))
  share = (variance + 1) / 2
  log = share * by['large'] + (1 - share) * by['small']
  apart = 0.5 * (log - by['small'] - 1 + jnp.exp(by['small'] - log) + jnp.square(true - mean) * jnp.exp(-log))
  terms = jnp.where((t == 0).reshape(-1, *(1,) * (x.ndim - 1)), _discretized_nll(start, mean, log), apart)
  return simple, terms.mean(axes) / math.log(2)


def _discretized_nll(start: jax.Array, mean: jax.Array, log: jax.Array) -> jax.Array:
  """-log of the chance of pixels, 256 values in [-1, 1], by a normal distribution (DDPM, section 3.3)."""
  below = lambda x: jax.scipy.stats.norm.cdf((x - mean) * jnp.exp(-0.5 * log))
  low, high = below(start - 1 / 255), below(start + 1 / 255)
  chance = jnp.where(start < -0.999, high, jnp.where(start > 0.999, 1 - low, high - low))
  return -jnp.log(jnp.maximum(chance, 1e-12))
