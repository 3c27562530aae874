"""Images by a trained unCLIP (DALL-E 2; Ramesh et al., 2022), from captions or as variations of other images."""

import dataclasses
import functools
import math
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.data import ops
from dalle_jax.functional.decoding import Sampling
from dalle_jax.functional.pixels import to_float, to_uint8
from dalle_jax.models import prior, unclip, upsampler
from dalle_jax.models.clip_reader import Caption, ClipReader
from dalle_jax.models.decode_params import compute_params
from dalle_jax.models.pooling import normalize
from dalle_jax.pipelines.checks import check_prompts
from dalle_jax.pipelines.generator import Setup, request_keys
from dalle_jax.pipelines.images import Call, ImageGenerator, Sample
from dalle_jax.training import checkpoint

UPSAMPLERS = ('upsampler', *(f'upsampler_{i}' for i in range(2, 10)))


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
  """How to sample. Raises ValueError for guidance that is not finite, or counts that are not whole.

  Attributes:
    guidance, prior_guidance: s in uncond + s (cond - uncond), for the decoder and for the prior; 1.0 for none.
    steps, prior_steps, upsampler_steps: diffusion steps, a subset of those of training.
    priors: image embeddings sampled per image, of which the one nearest to the caption's embedding is used (section
      2.2).
    eta: noise of the decoder's steps by DDIM, 0.0 for none (deterministic given the initial noise); None: ancestral
      sampling.
  """

  guidance: float = 1.0
  prior_guidance: float = 1.0
  steps: int = 25
  prior_steps: int = 25
  upsampler_steps: int = 7
  priors: int = 2
  eta: float | None = None

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(field.default, int):
        if not isinstance(value, numbers.Integral):
          raise ValueError(f'{field.name} is {value!r}; expected a whole number.')
      elif field.name == 'eta' and value is None:
        continue
      elif not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f'{field.name} is {value!r}; expected a finite number.')
    if self.eta is not None and not 0 <= self.eta <= 1:
      raise ValueError(f'eta is {self.eta}; expected 0 to 1, or None for ancestral sampling.')


class UnCLIP(ImageGenerator):
  """A trained decoder with its CLIP, its prior, its upsamplers and, optionally, another CLIP that ranks the images.

  Its frozen runs are 'clip', 'prior' (not needed for variations) and any of UPSAMPLERS, each of which enlarges the
  images of the one before it.
  """

  OBJECTIVE = 'unclip'
  REQUIRED = ('clip',)
  OPTIONAL = ('prior', *UPSAMPLERS)
  TEXT_FROM = 'clip'
  BATCH = 16

  def __init__(self, run: checkpoint.Run, frozen: Mapping[str, checkpoint.Run], setup: Setup | None = None):
    super().__init__(run, frozen, setup)
    if self.int8:
      raise ValueError('unCLIP generates all pixels at once, not token by token, so int8 gains nothing; leave it out.')
    clip = frozen['clip']
    self.model, self.reader = unclip.of_run(self.config, clip.config)
    self.params = {'clip': clip.network('clip'), 'unclip': compute_params(run.network('unclip'), self.model.dtype)}
    self.prior = None
    if 'prior' in frozen:
      check_clip(of_kind(frozen, 'prior', 'prior'), run, self.model)
      self.prior, _ = prior.of_run(frozen['prior'].config, clip.config)
      self.params['prior'] = compute_params(frozen['prior'].network('prior'), self.prior.dtype)
    self.upsamplers: dict[str, upsampler.Upsampler] = {}
    self.image_size = self.model.image_size
    for name in (name for name in UPSAMPLERS if name in frozen):
      self.upsamplers[name] = upsampler.of_run(of_kind(frozen, name, 'upsampler').config)
      self.params[name] = compute_params(frozen[name].params, self.upsamplers[name].dtype)
      low = self.upsamplers[name].low_size
      if low != self.image_size:
        raise ValueError(
          f'the {name} takes images of {low} pixels a side, but gets images of {self.image_size}; choose another one.'
        )
      self.image_size = self.upsamplers[name].image_size
    self._encode = self._program(encode_images, self.reader)
    self._sample_embeds = self._program(sample_embeds, self.reader, self.prior, static=('steps', 'priors'))
    self._decode = self._program(decode_embeds, self.reader, self.model, static=('steps',))
    self._upsample = {
      name: self._program(upsample, module, place, static=('steps',))
      for place, (name, module) in enumerate(self.upsamplers.items())
    }

  @classmethod
  def load(
    cls, path: str | Path, *, prior: str | Path = '', upsampler: Sequence[str | Path] | None = None, **options: Any
  ):
    """Loads a run as `Generator.load` does; `prior` and `upsampler` are runs to use in place of those inside it.

    `upsampler` may be several runs, each of which enlarges the images of the one before it; [] for none. Raises
    ValueError when a run is of another kind, or does not fit the others.
    """
    parts = {'prior': prior} if prior else {}
    if upsampler is not None:
      given = [upsampler] if isinstance(upsampler, (str, Path)) else list(upsampler)
      if len(given) > len(UPSAMPLERS):
        raise ValueError(f'there are {len(given)} upsamplers; expected at most {len(UPSAMPLERS)}.')
      parts |= dict.fromkeys(UPSAMPLERS, '') | dict(zip(UPSAMPLERS, given, strict=False))
    return super().load(path, **options, parts=parts)

  def sample(
    self,
    prompts: Sequence[str],
    n: int = 1,
    seed: int = 0,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance: float = 1.0,
    prior_guidance: float | None = None,
    steps: int = 25,
    prior_steps: int = 25,
    upsampler_steps: int = 7,
    priors: int = 2,
    eta: float | None = None,
    first: int | Sequence[int] = 0,
    batch_size: int = 16,
  ) -> list[Sample]:
    """Generates `n` images for each prompt.

    An image is a function of (prompt, seed, its number), whatever else is requested in the same call.

    Args:
      temperature, top_k, top_p: options of token models; they must keep their defaults.
      guidance: for the decoder, and for the prior where `prior_guidance` is None.
      prior_guidance, steps, prior_steps, upsampler_steps, priors, eta: see `SamplingPlan`.
      first: the number of the first image, for all prompts or for each; the others follow it.
      batch_size: images per call.

    Raises ValueError for arguments out of range, or without a prior.
    """
    check_prompts(prompts)
    token_options = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    changed = [k for k, v in token_options.items() if v != getattr(Sampling, k)]
    if changed:
      raise ValueError(f'unCLIP has no tokens, so no {", ".join(changed)}; leave it out.')
    if self.prior is None:
      raise ValueError('this unCLIP has no prior, so it cannot read captions; give one, or an image to vary.')
    if prior_guidance is None:
      prior_guidance = guidance
    plan = SamplingPlan(guidance, prior_guidance, steps, prior_steps, upsampler_steps, priors, eta)
    rows = {'text': np.stack([self._text(p) for p in prompts])}
    request = dict(n=n, seed=seed, first=first, batch_size=batch_size)
    return self._ranked(prompts, self._generate([p.encode() for p in prompts], rows, self._call(plan), **request))

  def variations(
    self,
    images: Sequence[Any],
    n: int = 1,
    seed: int = 0,
    *,
    guidance: float = 1.0,
    steps: int = 25,
    upsampler_steps: int = 7,
    eta: float | None = None,
    first: int | Sequence[int] = 0,
    batch_size: int = 16,
  ) -> list[Sample]:
    """Generates `n` variations of each image, from its CLIP embedding and without a caption (section 3.1).

    `images` are paths, bytes, PIL images or uint8[H, W, 3], which are cropped. The other arguments are those of
    `sample`. Raises ValueError as `sample` does, and when the CLIP has no image tower.
    """
    size, is_batch = self.reader.model.side, isinstance(images, (list, tuple)) or np.ndim(images) == 4
    if not is_batch or not len(images):
      raise ValueError('images must be a list of one or more images.')
    given = np.stack([ops.open_image(x, size, f'image {i}') for i, x in enumerate(images)])
    embeds = np.asarray(self._encode(self.params, given))
    plan = SamplingPlan(guidance, steps=steps, upsampler_steps=upsampler_steps, eta=eta)
    rows = {'text': np.tile(self.reader.empty_ids, (len(given), 1)), 'embed': embeds}
    request = dict(n=n, seed=seed, first=first, batch_size=batch_size)
    results = self._generate([x.tobytes() for x in given], rows, self._call(plan), **request)
    return [Sample('', images, numbers) for images, _, numbers in results]

  def _call(self, plan: SamplingPlan) -> Call:
    """The function that `_generate` calls. Raises ValueError for numbers of steps that training does not have."""
    self.model.diffusion.timesteps(plan.steps, 'steps')
    for module in self.upsamplers.values():
      module.diffusion.timesteps(plan.upsampler_steps, 'upsampler_steps')
    if self.prior is not None:
      self.prior.diffusion.timesteps(plan.prior_steps, 'prior_steps')
    if plan.priors < 1:
      raise ValueError(f'priors is {plan.priors}; expected one embedding per image or more.')

    # Each network is a program of its own, so another number of steps for one of them recompiles only that one. Whether
    # there is guidance is part of a program, its scale is not.
    scale = lambda guidance: None if guidance == 1 else float(guidance)
    eta = None if plan.eta is None else float(plan.eta)

    def call(batch: dict[str, Any], seed: np.uint32) -> tuple[jax.Array, None]:
      params = lambda *names: {name: self.params[name] for name in names}
      embeds = batch.pop('embed', None)
      if embeds is None:
        options = dict(steps=plan.prior_steps, guidance=scale(plan.prior_guidance), priors=plan.priors)
        embeds = self._sample_embeds(params('clip', 'prior'), batch, seed, **options)
      else:
        embeds = jnp.repeat(embeds, batch['number'].shape[1], axis=0)
      images = self._decode(
        params('clip', 'unclip'), batch, seed, embeds, steps=plan.steps, guidance=scale(plan.guidance), eta=eta
      )
      for name, enlarge in self._upsample.items():
        images = enlarge(self.params[name], batch, seed, images, steps=plan.upsampler_steps)
      return to_uint8(images).reshape(*batch['number'].shape, *images.shape[1:]), None

    return call


# --- Under jit: `batch` has text int32[B, N], name uint32[B] and number int32[B, n]


def encode_images(reader: ClipReader, params: Any, images: jax.Array) -> jax.Array:
  """CLIP's embeddings float32[B, E] of images uint8[B, H, W, 3]."""
  return reader.encode_image(params['clip'], to_float(images))


def sample_embeds(
  reader: ClipReader,
  model: prior.Prior,
  params: Any,
  batch: dict[str, jax.Array],
  seed: jax.Array,
  *,
  steps: int,
  guidance: jax.Array | None,
  priors: int,
) -> jax.Array:
  """Image embeddings [B * n, E]: of `priors` samples, the one nearest in direction to the caption's embedding."""
  caption, empty = encode_captions(reader, params['clip'], batch)
  tile = lambda x: jnp.tile(x, (priors, *(1,) * (x.ndim - 1)))  # (P B n, ...)
  keys = jnp.concatenate([stage_keys(batch, seed, 1 + i) for i in range(priors)])
  captions, empties = (jax.tree.map(tile, c) for c in (caption, empty))
  apply = functools.partial(model.apply, {'params': params['prior']})
  timesteps = model.diffusion.timesteps(steps)
  embeds = reader.scaled(prior.sample(model, apply, captions, empties, keys, timesteps, guidance))
  embeds = embeds.reshape(priors, len(caption.embed), -1)
  best = jnp.einsum('pbe,be->pb', normalize(embeds), caption.embed).argmax(0)
  return jnp.take_along_axis(embeds, best[None, :, None], 0)[0]


def decode_embeds(
  reader: ClipReader,
  model: unclip.UnCLIP,
  params: Any,
  batch: dict[str, jax.Array],
  seed: jax.Array,
  embeds: jax.Array,
  *,
  steps: int,
  guidance: jax.Array | None,
  eta: jax.Array | None,
) -> jax.Array:
  """Image embeddings [B * n, E] -> images float32[B * n, H, W, 3]."""
  caption, empty = encode_captions(reader, params['clip'], batch)
  apply = functools.partial(model.apply, {'params': params['unclip']})
  keys, timesteps = stage_keys(batch, seed, 0), model.diffusion.timesteps(steps)
  return unclip.sample(model, apply, embeds, caption, empty, keys, timesteps, guidance, eta)


def upsample(
  model: upsampler.Upsampler,
  place: int,
  params: Any,
  batch: dict[str, jax.Array],
  seed: jax.Array,
  images: jax.Array,
  *,
  steps: int,
) -> jax.Array:
  """Images float32[B * n, h, w, 3] -> [B * n, H, W, 3], larger ones, by the upsampler at that place in the chain."""
  apply = {player: functools.partial(model.apply, {'params': p}) for player, p in params.items()}
  keys, timesteps = stage_keys(batch, seed, 2**20 + place), model.diffusion.timesteps(steps)
  return upsampler.sample(model, apply['upsampler'], images, keys, timesteps, apply.get('last'))


def encode_captions(reader: ClipReader, params: Any, batch: dict[str, jax.Array]) -> tuple[Caption, Caption]:
  """The captions, and as many empty ones, as CLIP encodes them; one row per image."""
  count, n = batch['number'].shape
  rows = lambda caption, times: jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), caption)
  empty = reader.encode_text(params, jnp.asarray(reader.empty_ids)[None])
  return rows(reader.encode_text(params, batch['text']), n), rows(empty, count * n)


def stage_keys(batch: dict[str, jax.Array], seed: jax.Array, stage: int) -> jax.Array:
  """A key for each image of a batch, different for each stage: [B * n]."""
  return jax.vmap(jax.random.fold_in, (0, None))(request_keys(seed, batch['name'], batch['number']), stage)


def check_clip(prior_run: checkpoint.Run, run: checkpoint.Run, model: unclip.UnCLIP) -> None:
  """Raises ValueError when a prior was trained with another CLIP than a decoder."""
  origins = {checkpoint.origin(path) for path in (prior_run.frozen.get('clip'), run.frozen.get('clip')) if path}
  same_size = len(prior_run.network('prior')['mean']) == model.embed_dim
  same_scale = prior_run.config['model'].get('raw', False) == model.raw
  if len(origins) > 1 or not same_size or not same_scale:
    raise ValueError(
      f'the prior {prior_run.path} was trained with another CLIP than {run.path}; train both with the same one.'
    )


def of_kind(frozen: Mapping[str, checkpoint.Run], name: str, kind: str) -> checkpoint.Run:
  """The frozen run of that name. Raises ValueError when it is of another objective than `kind`."""
  found = frozen[name].config.get('objective')
  if found != kind:
    raise ValueError(f'{frozen[name].path} is a run of {found!r}; expected one of the objective {kind}.')
  return frozen[name]


load = UnCLIP.load
