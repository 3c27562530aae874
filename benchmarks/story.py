"""Four frames of a story in one call of `continue_story` against one call per frame.

  python benchmarks/story.py quickstart
The argument is the variant, by default 'test'. Networks have random parameters; the time is from the source image to
uint8 frames. Each call encodes the source, computes its keys and values, and decodes its frames.
"""

import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.data import bpe
from dalle_jax.data.sources import story_shapes
from dalle_jax.models import story_dalle, vqgan
from dalle_jax.pipelines.story_dalle import StoryDallE
from dalle_jax.training.checkpoint import Run

ROUNDS = 15
VQGANS = {'test': dict(variant='test', image_size=24, patch=3), 'quickstart': dict(variant='quickstart')}


def random_run(kind: str, model: nn.Module, config: dict, tokenizer: bpe.BPE, *inputs: jax.Array) -> Run:
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), *inputs)['params'])
  config = {'objective': kind, **config}
  return Run(config, params if kind == 'story_dalle' else {kind: params}, tokenizer.to_json(), 0, '')


def main(variant: str) -> None:
  if variant not in VQGANS:
    sys.exit(f'error: variant {variant!r} is unknown; there are {", ".join(VQGANS)}')
  size = VQGANS[variant].get('image_size', 36)
  stories = story_shapes.load('train', image_size=size, count=100)
  tokenizer = bpe.train((c for k in range(100) for c in stories.captions(k)), 400)
  image_tokenizer = vqgan.build(**VQGANS[variant])
  length = 24
  sizes = dict(text_vocab=tokenizer.vocab_size + length, text_length=length, image_vocab=image_tokenizer.num_codes)
  model = story_dalle.build(variant, **sizes, grid=image_tokenizer.grid(size))
  config = {'tokenizer': {'length': length, 'vocab_size': tokenizer.vocab_size}, 'data': {'image_size': size}}
  image, codes = jnp.zeros((1, size, size, 3)), jnp.zeros((1, 1, model.dalle.image_length), jnp.int32)
  captions = jnp.zeros((1, 1, length), jnp.int32)
  run = random_run(
    'story_dalle', model, {**config, 'model': {'variant': variant}}, tokenizer, captions, codes, codes[0]
  )
  frozen = random_run('vqgan', image_tokenizer, {**config, 'model': VQGANS[variant]}, tokenizer, image)
  pipeline = StoryDallE(run, {'vqgan': frozen})
  source, text = stories[0].frames[0], stories[0].captions[1:]
  together = lambda: pipeline.continue_story(source, text, n=1)
  apart = lambda: [pipeline.continue_story(source, [caption], n=1) for caption in text]
  times: dict[str, list[float]] = {'together': [], 'apart': []}
  together(), apart()
  for _ in range(ROUNDS):
    for name, call in (('together', together), ('apart', apart)):
      start = time.perf_counter()
      call()
      times[name].append(time.perf_counter() - start)
  one, four = (float(np.median(t)) for t in times.values())
  print(f'{variant}, {len(text)} frames of {model.dalle.image_length} tokens on {jax.devices()[0].device_kind}')
  print(f'one call {1e3 * one:.1f} ms, one call per frame {1e3 * four:.1f} ms: {four / one:.2f} times as long')


if __name__ == '__main__':
  main(*(sys.argv[1:] or ['test']))
