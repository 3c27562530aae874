"""Time per token of sampling with and without the KV cache, for a full image of 1,024 tokens.

  python -m benchmarks.decoding --variant=small --batch_size=4
Without a cache, each token needs a forward pass over everything before it. That is timed at eight lengths and averaged,
which favours it: real code would compile for each length, or always run the whole sequence (also shown).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import limits
from dalle_jax.functional import decoding
from dalle_jax.models import dalle, decode_params

_VARIANT = flags.DEFINE_string('variant', 'small', 'variant in dalle_jax/models/dalle.py')
_BATCH = flags.DEFINE_integer('batch_size', 1, 'images at once')
_WIDTH = flags.DEFINE_integer('d_model', 0, 'width; 0: that of the variant')
_DEPTH = flags.DEFINE_integer('depth', 0, 'depth; 0: that of the variant')
_DTYPE = flags.DEFINE_string('dtype', '', 'float32 or bfloat16; default: bfloat16, or float32 on a CPU')


def main(_):
  on_cpu = jax.default_backend() == 'cpu'
  changes = dict(d_model=_WIDTH.value, depth=_DEPTH.value, heads=_WIDTH.value // 64)
  changes = {k: v for k, v in changes.items() if v}
  model = dalle.build(_VARIANT.value, dtype=_DTYPE.value or ('float32' if on_cpu else 'bfloat16'), **changes)
  batch, count = _BATCH.value, model.image_length
  rng = np.random.default_rng(0)
  text = jnp.asarray(rng.integers(0, model.text_vocab, (batch, model.text_length)), jnp.int32)
  image = jnp.asarray(rng.integers(0, model.image_vocab, (batch, count)), jnp.int32)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), text, image)['params'])
  keys = jax.random.split(jax.random.key(1), batch)

  # As the pipelines prepare them for sampling.
  ready = decode_params.by_layer(decode_params.compute_params(params, model.dtype, few_rows=on_cpu))

  @jax.jit
  def cached(params):
    apply = functools.partial(model.apply, {'params': params})
    greedy = decoding.Sampling(temperature=0.0)
    return decoding.sample(apply, text, image[:, :0], keys, empty=model.padding, length=count, n=1, sampling=greedy)

  prefix = jax.jit(lambda params, part: model.apply({'params': params}, text, part, method='prefill')[0])
  whole = jax.jit(lambda params, image: model.apply({'params': params}, text, image)[1])

  print(f'{jax.devices()[0].device_kind}, {_VARIANT.value} {changes}, {model.dtype}, {batch} x {count} tokens')
  one = limits.seconds(cached, ready, repeats=2) / count
  lengths = [count * (2 * i + 1) // 16 for i in range(8)]
  each = [limits.seconds(prefix, params, image[:, :n], repeats=3) for n in lengths]
  full = limits.seconds(whole, params, image, repeats=3)
  print(f'{"":<28}{"ms per token":>12}{"ratio":>8}')
  for name, value in (
    ('cached', one),
    ('uncached, growing prefix', float(np.mean(each))),
    ('uncached, whole sequence', full),
  ):
    print(f'{name:<28}{1e3 * value:>12.2f}{value / one:>8.1f}')
  codes = cached(ready)
  logits = whole(params, codes)
  print(
    f'greedy tokens equal to those of a whole forward pass: {100 * float((codes == logits.argmax(-1)).mean()):.2f}%'
  )


if __name__ == '__main__':
  app.run(main)
