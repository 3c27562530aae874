"""Milliseconds a token of sampling, against what reading the weights alone takes at the measured bandwidth.

python -m benchmarks.sampler --variant=mindalle --batch_size=1
Weights are those of blocks and head, which every step reads whole, in the type of computation.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import limits
from dalle_jax.functional import decoding
from dalle_jax.models import dalle
from dalle_jax.training import sharding

_VARIANT = flags.DEFINE_string('variant', 'mindalle', 'of dalle_jax/models/dalle.py')
_BATCH = flags.DEFINE_integer('batch_size', 1, 'pictures at once')
_UNROLL = flags.DEFINE_list('unroll', ['1'], 'turns of the scan over layers compiled one after the other')
_TOKENS = flags.DEFINE_integer('tokens', 0, 'only so many; 0: a whole picture')


def draw(model, count, params, text, none, keys):
  apply, plain = functools.partial(model.apply, {'params': params}), decoding.Sampling()
  return decoding.sample(apply, text, none, keys, empty=model.padding, length=count, n=1, sampling=plain)


def main(_):
  cpu = jax.default_backend() == 'cpu'
  rate, batch = limits.bandwidth(), _BATCH.value
  for unroll in map(int, _UNROLL.value):
    model = dalle.build(_VARIANT.value, unroll=unroll, dtype='float32' if cpu else 'bfloat16')
    count, rng = _TOKENS.value or model.image_length, np.random.default_rng(0)
    text = jnp.asarray(rng.integers(0, model.text_vocab, (batch, model.text_length)), jnp.int32)
    none, whole = jnp.zeros((batch, 0), jnp.int32), jnp.zeros((batch, model.image_length), jnp.int32)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), text, whole)['params'])
    params = jax.tree.map(lambda x: 0.02 * jax.random.normal(jax.random.key(1), x.shape), shapes)
    params = decoding.compute_params(params, model.dtype)
    read = sum(v.nbytes for k, v in sharding.flatten(params).items() if k.startswith('blocks/') or 'image_head' in k)
    keys = jax.random.split(jax.random.key(1), batch)

    sample = jax.jit(functools.partial(draw, model, count))
    step = limits.seconds(sample, params, text, none, keys, repeats=2) / count
    floor = read / rate
    print(f'{jax.devices()[0].device_kind}, {_VARIANT.value}, {batch} x {count} tokens, unroll {unroll}, {model.dtype}')
    print(
      f'{1e3 * step:.3f} ms a token; {read / 1e9:.2f} GB at {rate / 1e9:.0f} GB/s are {1e3 * floor:.3f} ms: ', end=''
    )
    print(f'{step / floor:.2f} times the limit; {batch * count / (step * count):,.0f} tokens/s', flush=True)


if __name__ == '__main__':
  app.run(main)
