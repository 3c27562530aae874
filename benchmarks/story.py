"""Four frames of a story in one call against one call a frame, the same tokens: `python benchmarks/story.py [VARIANT]`.

Both know all captions and the source; a call of one frame computes the story token and the source's keys and values
anew, as sampling frame after frame does.
"""

import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.functional import decoding
from dalle_jax.models import story_dalle

FRAMES, ROUNDS = 4, 7


def main(variant: str) -> None:
  model = story_dalle.build(variant)
  n, i = model.dalle.text_length, model.dalle.image_length
  text = jax.random.randint(jax.random.key(0), (1, FRAMES, n), 0, model.dalle.text_vocab - n)
  source = jax.random.randint(jax.random.key(1), (1, i), 0, model.dalle.image_vocab)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(2), text, jnp.tile(source, (1, FRAMES, 1)), source)['params'])
  keys = jax.random.split(jax.random.key(3), FRAMES)

  def draw(params, first, count):
    extra, context = model.apply({'params': params}, text, source, method='look')
    extra = jax.lax.dynamic_slice_in_dim(extra, first, count)
    context = context.repeat(count)

    def apply(*args, method):
      more = (extra, context) if method == 'prefill' else ()
      return model.apply({'params': params}, *args, *more, method=method)

    rows = jax.lax.dynamic_slice_in_dim(text[0], first, count)
    return decoding.sample(
      apply,
      rows,
      jnp.zeros((count, 0), jnp.int32),
      jax.lax.dynamic_slice_in_dim(keys, first, count),
      empty=model.dalle.padding,
      length=i,
      n=1,
      sampling=decoding.Sampling(temperature=0.9),
    )

  draw = jax.jit(draw, static_argnums=2)
  together = lambda: np.asarray(draw(params, 0, FRAMES))
  apart = lambda: np.concatenate([np.asarray(draw(params, t, 1)) for t in range(FRAMES)])
  same = (together() == apart()).mean()
  times = {'together': [], 'apart': []}
  for _ in range(ROUNDS):
    for name, call in (('together', together), ('apart', apart)):
      start = time.perf_counter()
      call()
      times[name].append(time.perf_counter() - start)
  one, four = (float(np.median(t)) for t in times.values())
  print(f'{variant}, {FRAMES} frames of {i} tokens on {jax.devices()[0].device_kind}')
  print(f'in one call {1e3 * one:.1f} ms, a call a frame {1e3 * four:.1f} ms: {four / one:.2f} times as fast')
  print(f'{100 * same:.1f}% of the tokens are the same')


if __name__ == '__main__':
  main(*(sys.argv[1:] or ['test']))
