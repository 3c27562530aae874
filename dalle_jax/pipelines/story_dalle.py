"""Stories continued by a trained StoryDALL-E: `StoryDallE.load(run).continue_story('frame.png', ['Pip goes left'])`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.functional import decoding
from dalle_jax.functional.decoding import Sampling
from dalle_jax.models import clip, image_tokenizer, story_dalle
from dalle_jax.pipelines.generator import Setup, TokenGenerator, request_keys
from dalle_jax.pipelines.image_tokenizer import decode_codes
from dalle_jax.pipelines.stories import StoryGenerator
from dalle_jax.training import checkpoint


class StoryDallE(StoryGenerator, TokenGenerator):
  """A trained StoryDALL-E with its VQGAN, its tokenizer and, optionally, a CLIP that ranks the images."""

  OBJECTIVE = 'story_dalle'

  def __init__(self, run: checkpoint.Run, frozen: Mapping[str, checkpoint.Run], setup: Setup | None = None):
    super().__init__(run, frozen, setup)
    self.tower, fields = None, {**self.config['model'], **self.sizes}
    if self.config['model'].get('sentences') == 'clip':
      self.tower = clip.of_run(self._add_tower(frozen, 'clip').config)
      fields['sentence_dim'] = self.tower.embed_dim
    self.model = story_dalle.build(**fields)
    additions = ('story',) if 'story' in self.params else ()  # a model may add no parameters to its DALL-E
    self._prepare_params(self.model.dalle.dtype, *additions)
    self._draw = self._program(draw, self.model, self.tower, self.vqgan.network)

  def _inputs(
    self, sources: np.ndarray, captions: Sequence[Sequence[str]], vectors: np.ndarray | None
  ) -> dict[str, np.ndarray]:
    inputs = {'source': self.encode(sources)}
    if self.tower:
      inputs['sentences'] = self._tower_text(captions)
    if self.model.sentences == 'data':
      expected = (len(captions), len(captions[0]), self.model.sentence_dim)
      if vectors is None or vectors.shape != expected:
        given = 'none' if vectors is None else list(vectors.shape)
        raise ValueError(f'this model reads sentence vectors float32{list(expected)}; got {given}.')
      inputs['sentences'] = np.asarray(vectors, np.float32)
    return inputs


def draw(
  model: story_dalle.StoryDALLE,
  tower: clip.CLIP | None,
  vqgan: image_tokenizer.ImageTokenizer,
  params: Any,
  batch: dict[str, jax.Array],
  seed: jax.Array,
  sampling: Sampling,
) -> jax.Array:
  """The candidates uint8[B, T, n, H, W, 3] of each frame, with the numbers in `batch`; under jit."""
  text, sentences = batch['text'], batch.get('sentences')
  (b, t, length), n = text.shape, batch['number'].shape[1]
  if tower:
    sentences = story_dalle.embed_sentences(tower, params['tower'], sentences)
  networks = {name: params[name] for name in ('dalle', 'story') if name in params}
  tokens = decoding.sample(
    story_dalle.sampler(model, networks, text, batch['source'], sentences),
    text.reshape(b * t, length),
    jnp.zeros((b * t, 0), jnp.int32),
    request_keys(seed, batch['name'].ravel(), jnp.repeat(batch['number'], t, axis=0)),
    empty=model.dalle.padding,
    length=model.dalle.image_length,
    n=n,
    sampling=sampling,
  )
  images = decode_codes(vqgan, model.dalle.grid, params['vqgan'], tokens)
  return images.reshape(b, t, n, *images.shape[1:])


load = StoryDallE.load
