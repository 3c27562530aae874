"""Pictures by a trained unCLIP (DALL-E 2), from captions or as variations of pictures: `UnCLIP.load('runs/mine')`."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.data import ops
from dalle_jax.functional.decoding import Sampling
from dalle_jax.functional.pixels import to_float, to_uint8
from dalle_jax.models import prior, unclip, upsampler
from dalle_jax.models.clip import normalize
from dalle_jax.models.clip_reader import Caption
from dalle_jax.models.decode_params import compute_params
from dalle_jax.pipelines.generator import request_keys
from dalle_jax.pipelines.images import ImageGenerator, Sample, check_prompts
from dalle_jax.training import checkpoint

UPSAMPLERS = ('upsampler', *(f'upsampler_{i}' for i in range(2, 10)))


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
  """How to draw.

  Attributes:
    guidance, prior_guidance: s of uncond + s (cond - uncond), of the decoder and of the prior; 1.0 for none.
    steps, prior_steps, upsampler_steps: of diffusion, of those that training has.
    priors: embeddings that are drawn for a picture, of which that nearest to the caption's is taken (section 2.2).
  """

  guidance: float = 1.0
  prior_guidance: float = 1.0
  steps: int = 25
  prior_steps: int = 25
  upsampler_steps: int = 7
  priors: int = 2


class UnCLIP(ImageGenerator):
  """A trained decoder with its CLIP, its prior, its upsamplers, and, if wanted, another CLIP that ranks what it draws.

  Frozen runs are 'clip', 'prior' (not needed for variations), and of UPSAMPLERS any, each of which takes up where the
  one before ends.
  """

  OBJECTIVE = 'unclip'
  NEEDS, WORDS = ('clip',), 'clip'
  BATCH = 16

  def __init__(self, run: checkpoint.Run, frozen: dict[str, checkpoint.Run], *layout: Any):
    super().__init__(run, frozen, *layout)
    if self.int8:
      raise ValueError('unCLIP draws all of a picture at once, so weights in int8 gain nothing; leave it out.')
    clip = frozen['clip']
    self.model, self.reader = unclip.of_run(self.config, clip.config)
    self.params = {'clip': clip.network('clip'), 'unclip': compute_params(run.network('unclip'), self.model.dtype)}
    self.guess = None
    if 'prior' in frozen:
      check_clip(of_kind(frozen, 'prior', 'prior'), run, self.model)
      self.guess, _ = prior.of_run(frozen['prior'].config, clip.config)
      self.params['prior'] = compute_params(frozen['prior'].network('prior'), self.guess.dtype)
    self.upsamplers: dict[str, upsampler.Upsampler] = {}
    self.image_size = self.model.image_size
    for name in (name for name in UPSAMPLERS if name in frozen):
      self.upsamplers[name] = upsampler.of_run(of_kind(frozen, name, 'upsampler').config)
      self.params[name] = compute_params(frozen[name].params, self.upsamplers[name].dtype)
      if (low := self.upsamplers[name].low_size) != self.image_size:
        raise ValueError(f'the {name} takes pictures of {low} pixels a side, and gets {self.image_size}.')
      self.image_size = self.upsamplers[name].image_size
    self._guess = self._jit(self._guess_embeds, static_argnames=('steps', 'guidance', 'priors'))
    self._draw = self._jit(self._draw_pictures, static_argnames=('steps', 'guidance'))
    self._widen = self._jit(self._widen_pictures, static_argnames=('name', 'steps'))
    self._look = self._jit(lambda params, images: self.reader.encode_image(params['clip'], to_float(images)))

  @classmethod
  def load(
    cls, path: str | Path, *, prior: str | Path = '', upsampler: Sequence[str | Path] | None = None, **options: Any
  ):
    """As `Generator.load`; with `prior` and `upsampler`, runs in place of those in the directory of the decoder.

    `upsampler` are several, each of which takes up where the one before ends; [] for none. Raises ValueError when a run
    is of another kind, or does not go with the others.
    """
    parts = {'prior': prior} if prior else {}
    if upsampler is not None:
      given = [upsampler] if isinstance(upsampler, (str, Path)) else list(upsampler)
      if len(given) > len(UPSAMPLERS):
        raise ValueError(f'there are {len(given)} upsamplers; {len(UPSAMPLERS)} are the most there can be.')
      parts |= dict(zip(UPSAMPLERS, [*given, *[''] * (len(UPSAMPLERS) - len(given))], strict=True))
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
    first: int | Sequence[int] = 0,
    batch_size: int = 16,
  ) -> list[Sample]:
    """Draws `n` pictures for each prompt.

    A picture is a function of (prompt, seed, its number), whatever else is asked for beside it.

    Args:
      temperature, top_k, top_p: of models of tokens; they must be left as they are.
      guidance: of the decoder, and of the prior where `prior_guidance` is None; the others see `SamplingPlan`.
      first: the number of the first picture, of all prompts or of each; the others follow it.
      batch_size: pictures at once.

    Raises ValueError for arguments out of range, or without a prior.
    """
    check_prompts(prompts)
    of_tokens = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    if changed := [k for k, v in of_tokens.items() if v != getattr(Sampling, k)]:
      raise ValueError(f'unCLIP has no tokens, so no {", ".join(changed)}; leave it out.')
    if self.guess is None:
      raise ValueError('this unCLIP has no prior, so it draws nothing from captions; give one, or a picture to vary.')
    how = SamplingPlan(
      guidance, guidance if prior_guidance is None else prior_guidance, steps, prior_steps, upsampler_steps, priors
    )
    rows = {'text': np.stack([self._text(p) for p in prompts])}
    asked = dict(n=n, seed=seed, first=first, batch_size=batch_size)
    return self._ranked(prompts, self._generate([p.encode() for p in prompts], rows, self._call(how), **asked))

  def variations(
    self,
    images: Sequence[Any],
    n: int = 1,
    seed: int = 0,
    *,
    guidance: float = 1.0,
    steps: int = 25,
    upsampler_steps: int = 7,
    first: int | Sequence[int] = 0,
    batch_size: int = 16,
  ) -> list[Sample]:
    """Draws `n` pictures that CLIP sees as each of `images`: paths, bytes, PIL images or uint8[H, W, 3], cropped.

    No caption is read (section 3.1). Arguments and errors are as of `sample`; ValueError for a CLIP that sees none.
    """
    size, several = self.reader.model.side, isinstance(images, (list, tuple)) or np.ndim(images) == 4
    if not several or not len(images):
      raise ValueError('images must be a list of pictures, one or more.')
    given = np.stack([ops.open_image(x, size, f'picture {i}') for i, x in enumerate(images)])
    embeds = np.asarray(self._look(self.params, given))
    how = SamplingPlan(guidance, steps=steps, upsampler_steps=upsampler_steps)
    rows = {'text': np.tile(self.reader.empty_ids, (len(given), 1)), 'embed': embeds}
    asked = dict(n=n, seed=seed, first=first, batch_size=batch_size)
    drawn = self._generate([x.tobytes() for x in given], rows, self._call(how), **asked)
    return [Sample('', pictures, numbers) for pictures, _, numbers in drawn]

  def _call(self, how: SamplingPlan) -> Any:
    """Raises ValueError for numbers of steps that training does not have."""
    self.model.diffusion.timesteps(how.steps, 'steps')
    for module in self.upsamplers.values():
      module.diffusion.timesteps(how.upsampler_steps, 'upsampler_steps')
    if self.guess is not None:
      self.guess.diffusion.timesteps(how.prior_steps, 'prior_steps')
    if how.priors < 1:
      raise ValueError(f'priors is {how.priors}; expected one embedding a picture or more.')

    # Each network is a program of its own: who asks for other steps of one compiles that one anew.
    def call(batch: dict[str, Any], seed: np.uint32) -> tuple[jax.Array, None]:
      own = lambda *names: {name: self.params[name] for name in names}
      embeds = batch.pop('embed', None)
      if embeds is None:
        of_prior = dict(steps=how.prior_steps, guidance=how.prior_guidance, priors=how.priors)
        embeds = self._guess(own('clip', 'prior'), batch, seed, **of_prior)
      else:
        embeds = jnp.repeat(embeds, batch['number'].shape[1], axis=0)
      images = self._draw(own('clip', 'unclip'), batch, seed, embeds, steps=how.steps, guidance=how.guidance)
      for name in self.upsamplers:
        images = self._widen(self.params[name], batch, seed, images, name=name, steps=how.upsampler_steps)
      return to_uint8(images).reshape(*batch['number'].shape, *images.shape[1:]), None

    return call

  # --- Under jit: `batch` has text int32[B, N], name uint32[B] and number int32[B, n]

  def _guess_embeds(
    self, params: Any, batch: dict[str, jax.Array], seed: jax.Array, *, steps: int, guidance: float, priors: int
  ) -> jax.Array:
    """Of `priors` guesses for each caption that whose direction is nearest to the caption's embedding: [B * n, E]."""
    caption, empty = self._captions(params['clip'], batch)
    several = lambda x: jnp.tile(x, (priors, *(1,) * (x.ndim - 1)))  # (P B n, ...)
    keys = jnp.concatenate([stage_keys(batch, seed, 1 + i) for i in range(priors)])
    captions, empties = (jax.tree.map(several, c) for c in (caption, empty))
    apply = functools.partial(self.guess.apply, {'params': params['prior']})
    among = self.guess.diffusion.timesteps(steps)
    embeds = self.reader.scaled(prior.sample(self.guess, apply, captions, empties, keys, among, guidance))
    embeds = embeds.reshape(priors, len(caption.embed), -1)
    best = jnp.einsum('pbe,be->pb', normalize(embeds), caption.embed).argmax(0)
    return jnp.take_along_axis(embeds, best[None, :, None], 0)[0]

  def _draw_pictures(
    self, params: Any, batch: dict[str, jax.Array], seed: jax.Array, embeds: jax.Array, *, steps: int, guidance: float
  ) -> jax.Array:
    """Those of embeddings [B * n, E]: float32[B * n, H, W, 3]."""
    caption, empty = self._captions(params['clip'], batch)
    apply = functools.partial(self.model.apply, {'params': params['unclip']})
    keys, among = stage_keys(batch, seed, 0), self.model.diffusion.timesteps(steps)
    return unclip.sample(self.model, apply, embeds, caption, empty, keys, among, guidance)

  def _widen_pictures(
    self, params: Any, batch: dict[str, jax.Array], seed: jax.Array, images: jax.Array, *, name: str, steps: int
  ) -> jax.Array:
    """By the upsampler of that name: float32[B * n, H, W, 3] -> [B * n, 2 H or more, ...]."""
    module, place = self.upsamplers[name], list(self.upsamplers).index(name)
    of = {player: functools.partial(module.apply, {'params': own}) for player, own in params.items()}
    keys, among = stage_keys(batch, seed, 2**20 + place), module.diffusion.timesteps(steps)
    return upsampler.sample(module, of['upsampler'], images, keys, among, of.get('last'))

  def _captions(self, params: Any, batch: dict[str, jax.Array]) -> tuple[Caption, Caption]:
    """What CLIP reads in the captions, and in ''; a row for each picture."""
    count, n = batch['number'].shape
    rows = lambda caption, times: jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), caption)
    empty = self.reader.encode_text(params, jnp.asarray(self.reader.empty_ids)[None])
    return rows(self.reader.encode_text(params, batch['text']), n), rows(empty, count * n)


def stage_keys(batch: dict[str, jax.Array], seed: jax.Array, stage: int) -> jax.Array:
  """A key for each picture of a batch, others for each stage: [B * n]."""
  return jax.vmap(jax.random.fold_in, (0, None))(request_keys(seed, batch['name'], batch['number']), stage)


def check_clip(guess: checkpoint.Run, run: checkpoint.Run, model: unclip.UnCLIP) -> None:
  """Raises ValueError when a prior was trained with another CLIP than a decoder."""
  origins = [checkpoint.origin(path) for path in (guess.frozen.get('clip'), run.frozen.get('clip')) if path]
  sizes = {len(guess.network('prior')['mean']), model.embed_dim}
  if len(set(origins)) > 1 or len(sizes) > 1 or guess.config['model'].get('raw', False) != model.raw:
    raise ValueError(f'the prior {guess.path} was trained with another CLIP than {run.path}; train it with the same.')


def of_kind(frozen: dict[str, checkpoint.Run], name: str, kind: str) -> checkpoint.Run:
  """Raises ValueError for a run of another objective."""
  if (found := frozen[name].config.get('objective')) != kind:
    raise ValueError(f'{frozen[name].path} is a run of {found!r}; expected one of the objective {kind}.')
  return frozen[name]


load = UnCLIP.load
