"""Gaussian diffusion over plain callables: the noise schedule, losses, and ancestral or DDIM sampling.

"Denoising Diffusion Probabilistic Models", Ho et al., 2020 (DDPM); "Improved Denoising Diffusion Probabilistic Models",
Nichol and Dhariwal, 2021 (IDDPM); "Denoising Diffusion Implicit Models", Song et al., 2021 (DDIM).
Axis legend: B rows, T training timesteps; x0, x_t and eps are float32[B, ...].
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
MIN_VARIANCE = 1e-20  # keeps the logarithm of the posterior variance finite at t = 0

Predict = Callable[[jax.Array, jax.Array], jax.Array]  # (x_t, t int32[B]) -> the network's output


@dataclasses.dataclass(frozen=True)
class Diffusion:
  """The forward process and what the network predicts of it; hashable.

  Timesteps run from 0 (almost clean) to steps - 1 (almost pure noise).

  Attributes:
    steps: T.
    schedule: 'cosine' (IDDPM, section 3.2) or 'linear' (DDPM, section 4, scaled to T).
    predicts: 'noise' (eps), 'start' (x0) or 'velocity', v = alpha * eps - sigma * x0, which is learnt equally well at
      both ends of the schedule ("Progressive Distillation", Salimans and Ho, 2022, section 4).
    variance: of the reverse step: 'small', the posterior variance given x0, or 'learned', where as many output channels
      again, -1 to 1, interpolate its logarithm between the smallest and the largest variance (IDDPM, equation 15).
    clip: while sampling, x0 is clipped to [-clip, clip].
    shift: scales the signal-to-noise amplitude of the cosine schedule. Values below 1 add noise, for images whose
      pixels repeat each other, so that much noise still shows their content: large ones, flat ones ("Simple Diffusion",
      Hoogeboom et al., 2023, section 3.1, takes 64 / side).

  Raises ValueError for unknown names and values out of range.
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
    """Output channels of the network for each channel of x."""
    return 2 if self.variance == 'learned' else 1

  def betas(self) -> np.ndarray:
    """Variance of the noise that each step adds, float32[T]."""
    if self.schedule == 'linear':
      return np.linspace(1e-4, 0.02, self.steps, dtype=np.float32) * np.float32(1000 / self.steps)
    cosine = np.square(np.cos((np.arange(self.steps + 1) / self.steps + 0.008) / 1.008 * np.pi / 2))
    signal, noise = self.shift**2 * cosine, cosine[0] - cosine
    alphas_cumprod = signal / (signal + noise)
    return np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999).astype(np.float32)

  def alphas_cumprod(self) -> np.ndarray:
    """Share of x0 in the variance of x_t, decreasing in t: float32[T]."""
    return np.cumprod(1 - self.betas(), dtype=np.float64).astype(np.float32)

  def timesteps(self, count: int, name: str = 'steps') -> tuple[int, ...]:
    """`count` evenly spaced timesteps from T - 1 down to 0.

    Raises ValueError, which calls the number `name`, unless it is 2 to T.
    """
    if not 2 <= count <= self.steps:
      raise ValueError(f'{name} is {count}; expected 2 to {self.steps}, the steps of diffusion in training.')
    return tuple(int(t) for t in np.round(np.arange(count) * (self.steps - 1) / (count - 1))[::-1])


def add_noise(d: Diffusion, x0: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
  """x_t for t int32[B] and standard normal eps."""
  alpha, sigma = _signal_and_noise(d, t, x0)
  return alpha * x0 + sigma * eps


def _signal_and_noise(d: Diffusion, t: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """alpha and sigma of x_t = alpha * x0 + sigma * eps, broadcastable to x."""
  alphas_cumprod = d.alphas_cumprod()
  return _gather(np.sqrt(alphas_cumprod), t, x), _gather(np.sqrt(1 - alphas_cumprod), t, x)


def _gather(table: np.ndarray, t: jax.Array, x: jax.Array) -> jax.Array:
  """table[t] for t[B], broadcastable to x[B, ...]."""
  return jnp.asarray(table)[t].reshape(-1, *(1,) * (x.ndim - 1))


def _split(d: Diffusion, out: jax.Array) -> tuple[jax.Array, jax.Array | None]:
  """The network's prediction and its interpolation of the variance; None where that is not learned."""
  if d.variance != 'learned':
    return out, None
  prediction, variance = jnp.split(out, 2, axis=-1)
  return prediction, variance


def _to_x0(d: Diffusion, prediction: jax.Array, x_t: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
  if d.predicts == 'start':
    return prediction
  return (x_t - sigma * prediction) / alpha if d.predicts == 'noise' else alpha * x_t - sigma * prediction


# --- Classifier-free guidance


def guide(d: Diffusion, cond: jax.Array, uncond: jax.Array, scale: float | jax.Array) -> jax.Array:
  """uncond + scale * (cond - uncond) of the predictions (Ho and Salimans, 2021); the variance is that of `cond`."""
  prediction, variance = _split(d, cond)
  other, _ = _split(d, uncond)
  prediction = other + scale * (prediction - other)
  return prediction if variance is None else jnp.concatenate([prediction, variance], -1)


def guided(d: Diffusion, apply: Predict, scale: float | jax.Array) -> Predict:
  """A guided `predict` for `sample`, from a network that is given every row with, then without its condition."""

  def predict(x: jax.Array, t: jax.Array) -> jax.Array:
    cond, uncond = jnp.split(apply(jnp.concatenate([x, x]), jnp.concatenate([t, t])), 2)
    return guide(d, cond, uncond, scale)

  return predict


# --- Sampling


def _posterior(d: Diffusion, now: Sequence[int], then: Sequence[int]) -> dict[str, np.ndarray]:
  """Coefficients of the reverse steps from timesteps `now` to earlier ones `then`, float32 each (DDPM, equations 6, 7).

  Timestep -1 is x0 itself. The mean is coef_x0 * x0 + coef_xt * x_t; log_var_min and log_var_max are the logarithms of
  the smallest and the largest variance; x_t = alpha * x0 + sigma * eps; alpha_then and sigma_then are those of `then`.

  Computed in float64 from tables rounded to float32, as in public code, whose weights expect the mean at t = 0 to be
  0.9995 x0: 1 - alphas_cumprod is off by that much there.
  """
  alphas_cumprod = np.append(d.alphas_cumprod(), 1.0).astype(np.float64)
  a_now, a_then = alphas_cumprod[np.asarray(now)], alphas_cumprod[np.asarray(then)]
  adjacent = np.asarray(now) - np.asarray(then) == 1
  beta = np.where(adjacent, d.betas().astype(np.float64)[np.asarray(now)], 1 - a_now / a_then)
  coefficients = dict(
    coef_x0=np.sqrt(a_then) * beta / (1 - a_now),
    coef_xt=np.sqrt(1 - beta) * (1 - a_then) / (1 - a_now),
    log_var_min=np.log(np.maximum((1 - a_then) / (1 - a_now) * beta, MIN_VARIANCE)),
    log_var_max=np.log(beta),
    alpha=np.sqrt(a_now),
    sigma=np.sqrt(1 - a_now),
    alpha_then=np.sqrt(a_then),
    sigma_then=np.sqrt(1 - a_then),
  )
  return {name: value.astype(np.float32) for name, value in coefficients.items()}


def _ancestral_step(d: Diffusion, out: jax.Array, x_t: jax.Array, c: dict[str, Any], eps: jax.Array) -> jax.Array:
  """x at the earlier timestep from a draw of the posterior, with the coefficients `c` of `_posterior`."""
  prediction, variance = _split(d, out)
  x0 = jnp.clip(_to_x0(d, prediction, x_t, c['alpha'], c['sigma']), -d.clip, d.clip)
  frac = 0.0 if variance is None else (variance + 1) / 2
  log_var = frac * c['log_var_max'] + (1 - frac) * c['log_var_min']
  std = jnp.where(c['sigma_then'] == 0, 0.0, jnp.exp(0.5 * log_var))  # no noise is added in the last step
  return c['coef_x0'] * x0 + c['coef_xt'] * x_t + std * eps


def _ddim_step(
  d: Diffusion, out: jax.Array, x_t: jax.Array, c: dict[str, Any], eps: jax.Array, eta: float | jax.Array
) -> jax.Array:
  """x at the earlier timestep by DDIM, equations 12 and 16; a learned variance is not used."""
  prediction, _ = _split(d, out)
  x0 = jnp.clip(_to_x0(d, prediction, x_t, c['alpha'], c['sigma']), -d.clip, d.clip)
  direction = (x_t - c['alpha'] * x0) / c['sigma']  # eps of the clipped x0
  ratio = jnp.square(c['alpha'] / c['alpha_then'])
  std = eta * c['sigma_then'] / c['sigma'] * jnp.sqrt(jnp.maximum(1 - ratio, 0.0))
  towards = jnp.sqrt(jnp.maximum(jnp.square(c['sigma_then']) - jnp.square(std), 0.0))
  return c['alpha_then'] * x0 + towards * direction + std * eps


def reverse_step(d: Diffusion, out: jax.Array, x_t: jax.Array, now: int, then: int, eps: jax.Array) -> jax.Array:
  """x at timestep `then` (-1: x0) from x_t at `now`, the network's output for it, and standard normal eps."""
  coefficients = _posterior(d, [now], [then])
  return _ancestral_step(d, out, x_t, {name: value[0] for name, value in coefficients.items()}, eps)


def sample(
  d: Diffusion,
  predict: Predict,
  x: jax.Array,
  keys: jax.Array,
  steps: Sequence[int],
  last: Predict | None = None,
  eta: float | jax.Array | None = None,
) -> jax.Array:
  """x0, float32[B, ...], from noise x at the first of `steps` (see `Diffusion.timesteps`).

  Args:
    predict: the network, guided or not.
    keys: a key for each row, [B], so that a row does not depend on its batch.
    last: the network of the last step; by default `predict`.
    eta: None for ancestral sampling (DDPM), a number for DDIM: 0.0 is deterministic given x.
  """

  def body(x: jax.Array, step: Any, predict: Predict = predict) -> tuple[jax.Array, None]:
    t, i, coefficients = step
    out = predict(x, jnp.full(len(x), t, jnp.int32)).astype(jnp.float32)
    eps = _normal(keys, i, x.shape[1:])
    if eta is None:
      return _ancestral_step(d, out, x, coefficients, eps), None
    return _ddim_step(d, out, x, coefficients, eps, eta), None

  coefficients = jax.tree.map(jnp.asarray, _posterior(d, steps, [*steps[1:], -1]))
  inputs = jnp.asarray(steps, jnp.int32), jnp.arange(1, len(steps) + 1), coefficients
  if last is None:
    return jax.lax.scan(body, x, inputs)[0]
  x, _ = jax.lax.scan(body, x, jax.tree.map(lambda v: v[:-1], inputs))
  return body(x, jax.tree.map(lambda v: v[-1], inputs), last)[0]


def initial_noise(keys: jax.Array, shape: Sequence[int]) -> jax.Array:
  """The noise that `sample` starts from: float32[B, *shape], a key for each row."""
  return _normal(keys, 0, tuple(shape))


def _normal(keys: jax.Array, i: jax.Array | int, shape: Sequence[int]) -> jax.Array:
  """Standard normal noise number i of each row; number 0 is the initial noise."""
  return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape))(keys)


# --- Losses


def losses(
  d: Diffusion, out: jax.Array, x0: jax.Array, x_t: jax.Array, t: jax.Array, eps: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(L_simple, L_vlb): the squared error of the prediction, and the term t of the variational bound in bits.

  Both are means over a row's numbers, float32[B]. The bound only trains a 'learned' variance, with the mean held fixed
  (IDDPM, section 3.1), and is 0 where the variance is not learned; the whole bound is the sum over T, so a term counts
  T / 1000 in L_hybrid (lambda = 0.001).
  """
  out = out.astype(jnp.float32)
  prediction, variance = _split(d, out)
  axes = tuple(range(1, x_t.ndim))
  alpha, sigma = _signal_and_noise(d, t, x0)
  target = {'start': x0, 'noise': eps, 'velocity': alpha * eps - sigma * x0}[d.predicts]
  simple = jnp.square(prediction - target).mean(axes)
  if variance is None:
    return simple, jnp.zeros_like(simple)
  every = list(range(d.steps))
  tables = _posterior(d, every, [t - 1 for t in every])
  tables['log_var_min'][0] = tables['log_var_min'][1]  # at t = 0 the posterior has no variance
  c = {name: _gather(table, t, x_t) for name, table in tables.items()}
  mean = lambda x0: c['coef_x0'] * x0 + c['coef_xt'] * x_t
  true_mean = mean(x0)
  model_mean = mean(_to_x0(d, jax.lax.stop_gradient(prediction), x_t, c['alpha'], c['sigma']))
  frac = (variance + 1) / 2
  log_var = frac * c['log_var_max'] + (1 - frac) * c['log_var_min']
  kl = 0.5 * (
    log_var
    - c['log_var_min']
    - 1
    + jnp.exp(c['log_var_min'] - log_var)
    + jnp.square(true_mean - model_mean) * jnp.exp(-log_var)
  )
  first = (t == 0).reshape(-1, *(1,) * (x_t.ndim - 1))
  terms = jnp.where(first, _discretized_nll(x0, model_mean, log_var), kl)
  return simple, terms.mean(axes) / math.log(2)


def _discretized_nll(x0: jax.Array, mean: jax.Array, log_var: jax.Array) -> jax.Array:
  """-log p of pixels, 256 values in [-1, 1], under a discretised normal distribution (DDPM, section 3.3)."""
  cdf = lambda x: jax.scipy.stats.norm.cdf((x - mean) * jnp.exp(-0.5 * log_var))
  low, high = cdf(x0 - 1 / 255), cdf(x0 + 1 / 255)
  probability = jnp.where(x0 < -0.999, high, jnp.where(x0 > 0.999, 1 - low, high - low))
  return -jnp.log(jnp.maximum(probability, 1e-12))
