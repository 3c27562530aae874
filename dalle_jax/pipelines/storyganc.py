"""Stories continued by a trained StoryGANc: `StoryGANc.load(run).continue_story('frame.png', ['Pip goes left'])`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.functional.decoding import Sampling
from dalle_jax.functional.pixels import to_float, to_uint8
from dalle_jax.models import storyganc
from dalle_jax.models.caption_encoder import Tower
from dalle_jax.pipelines.generator import Setup, request_keys
from dalle_jax.pipelines.stories import StoryGenerator
from dalle_jax.training import checkpoint


class StoryGANc(StoryGenerator):
  """The generator of a trained StoryGANc with its tokenizer and, optionally, a CLIP that ranks the images.

  `temperature` is the standard deviation of its noise; top_k, top_p and guidance do not apply to a GAN.
  """

  OBJECTIVE = 'storyganc'

  def __init__(self, run: checkpoint.Run, frozen: Mapping[str, checkpoint.Run], setup: Setup | None = None):
    super().__init__(run, frozen, setup)
    if self.int8:
      raise ValueError(
        'StoryGANc generates frames in one pass, not token by token, so int8 gains nothing; leave it out.'
      )
    self.params = {'generator': run.params['generator']}
    self.model, self.tower = storyganc.of_run(self.config, {name: r.config for name, r in frozen.items()})
    if self.tower:
      self._add_tower(frozen, self.model.captions)
    self._draw = self._program(draw, self.model, self.tower)

  def _check(self, sampling: Sampling) -> None:
    changed = [k for k in ('top_k', 'top_p', 'guidance') if getattr(sampling, k) != getattr(Sampling, k)]
    if changed:
      raise ValueError(
        f'StoryGANc has no tokens, so no {", ".join(changed)}; leave it out (temperature scales its noise).'
      )

  def _inputs(
    self, sources: np.ndarray, captions: Sequence[Sequence[str]], vectors: np.ndarray | None
  ) -> dict[str, np.ndarray]:
    inputs = {'source': sources}
    if self.tower:
      inputs['tower_text'] = self._tower_text(captions)
    return inputs


def draw(
  model: storyganc.StoryGANc,
  tower: Tower | None,
  params: Any,
  batch: dict[str, jax.Array],
  seed: jax.Array,
  sampling: Sampling,
) -> jax.Array:
  """The candidates uint8[B, T, n, H, W, 3] of each frame, with the numbers in `batch`; under jit."""
  (b, t), n = batch['name'].shape, batch['number'].shape[1]
  captions = tower(params['tower'], batch['tower_text']) if tower else batch['text']
  keys = request_keys(seed, batch['name'].ravel(), jnp.repeat(batch['number'], t, axis=0))
  keys = keys.reshape(b, t, n).swapaxes(1, 2)  # (B, n, T)
  first_keys = jax.vmap(jax.random.fold_in, (0, None))(keys[..., 0].ravel(), 1)
  normal = lambda keys, width: jax.vmap(lambda key: jax.random.normal(key, (width,)))(keys.ravel())
  noise = sampling.temperature * normal(keys, model.noise).reshape(b * n, t, model.noise)
  eps = sampling.temperature * normal(first_keys, model.code)
  repeat = lambda x: jnp.repeat(x, n, axis=0)
  variables, source = {'params': params['generator']}, to_float(batch['source'])
  out = model.apply(variables, repeat(captions), repeat(source), eps, noise)
  frames = to_uint8(out.frames)
  return frames.reshape(b, n, t, *frames.shape[2:]).swapaxes(1, 2)


load = StoryGANc.load
