"""Stories continued by a trained StoryGANc: `StoryGANc.load(run).continue_story('frame.png', ['Pip goes left'])`."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.functional.decoding import Sampling
from dalle_jax.functional.pixels import to_float, to_uint8
from dalle_jax.models import storyganc
from dalle_jax.pipelines.generator import request_keys
from dalle_jax.pipelines.stories import StoryGenerator
from dalle_jax.training import checkpoint


class StoryGANc(StoryGenerator):
  """The generator of a trained StoryGANc with its tokenizer and, if wanted, a CLIP that ranks what it draws.

  `temperature` is the standard deviation of its noise; there is nothing for top_k, top_p and guidance to act on.
  """

  OBJECTIVE = 'storyganc'

  def __init__(self, run: checkpoint.Run, frozen: dict[str, checkpoint.Run], *layout: Any):
    super().__init__(run, frozen, *layout)
    if self.int8:
      raise ValueError(
        'StoryGANc draws a frame at once, not token by token, so weights in int8 gain nothing; leave it out.'
      )
    self.params = {'generator': run.params['generator']}
    self.model, self.tower = storyganc.of_run(self.config, {name: r.config for name, r in frozen.items()})
    if self.tower:
      self._tower(frozen, self.model.captions)

  def _check(self, sampling: Sampling) -> None:
    changed = [k for k in ('top_k', 'top_p', 'guidance') if getattr(sampling, k) != getattr(Sampling, k)]
    if changed:
      raise ValueError(
        f'StoryGANc has no tokens, so no {", ".join(changed)}; leave it out (temperature acts on noise).'
      )

  def _inputs(
    self, sources: np.ndarray, captions: Sequence[Sequence[str]], vectors: np.ndarray | None
  ) -> dict[str, np.ndarray]:
    found = {'source': sources}
    if self.tower_words:
      found['told'] = self._tower_text(captions)
    return found

  def _draw_frames(
    self, params: Any, batch: dict[str, jax.Array], seed: jax.Array, numbers: jax.Array, *, sampling: Sampling
  ) -> jax.Array:
    m, (b, t), n = self.model, batch['name'].shape, len(numbers)
    told = self.tower(params['tower'], batch['told']) if self.tower else batch['text']
    keys = request_keys(seed, batch['name'].ravel(), numbers).reshape(b, t, n).swapaxes(1, 2)  # (B, n, T)
    draw = lambda keys, width: jax.vmap(lambda key: jax.random.normal(key, (width,)))(keys.ravel())
    noise = sampling.temperature * draw(keys, m.noise).reshape(b * n, t, m.noise)
    eps = sampling.temperature * draw(jax.vmap(jax.random.fold_in, (0, None))(keys[..., 0].ravel(), 1), m.code)
    rows = lambda x: jnp.repeat(x, n, axis=0)
    drawn = m.apply({'params': params['generator']}, rows(told), rows(to_float(batch['source'])), eps, noise)
    frames = to_uint8(drawn.frames)
    return frames.reshape(b, n, t, *frames.shape[2:]).swapaxes(1, 2)


load = StoryGANc.load
