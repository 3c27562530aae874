"""Time of encoding, decoding and training with a VQGAN.

  python -m benchmarks.vqgan --peer=torch
The published f16 network encodes and decodes 256 x 256 pixels; the f8 one trains at 128 x 128, on reconstruction only,
without LPIPS and a discriminator. The batch is four images.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from absl import app, flags

from benchmarks import limits, sizes
from dalle_jax.models import vqgan
from dalle_jax.training import host

_BATCH = flags.DEFINE_integer('batch_size', 4, 'images per batch')
_PEER = flags.DEFINE_enum('peer', '', ['', 'torch'], 'compare with plain PyTorch')
SIZES = {  # name -> variant, changes, side in pixels, what is measured
  'f16': ('f16_16384', {}, 256, ('encode', 'decode')),
  'f8': ('f8_8192', dict(quantizer='nearest'), 128, ('train',)),
}


def measure(model: vqgan.VQGAN, size: int, names: tuple[str, ...]) -> dict[str, tuple[float, float]]:
  """Seconds and FLOPs of each name."""
  x = jax.random.uniform(jax.random.key(0), (_BATCH.value, size, size, 3), minval=-1)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(1), x)['params'])
  apply = lambda method: jax.jit(lambda p, x: model.apply({'params': p}, x, method=method))
  codes, optimizer = apply('encode')(params, x), optax.adam(1e-4)

  def loss(params):
    out = model.apply({'params': params}, x)
    return jnp.abs(out.recon - x).mean() + sum(out.quantized.losses.values())

  @functools.partial(jax.jit, compiler_options=host.convolution_options(x.sharding))  # as by make_step
  def train(params, state):
    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state

  calls = {
    'encode': (apply('encode'), params, x),
    'decode': (apply('decode_codes'), params, codes),
    'train': (train, params, optimizer.init(params)),
  }

  def of(call, *args):
    return limits.seconds(call, *args, repeats=2), call.lower(*args).cost_analysis()['flops']

  return {name: of(*calls[name]) for name in names}


def main(_):
  other = sizes.peer(_PEER.value)
  if jax.default_backend() == 'cpu':
    host.keep_memory()  # as train.py does; the peer benefits, too
  limit = limits.matmul()
  print(f'{jax.devices()[0].device_kind}, {limit / 1e12:.2f} TFLOP/s measured; {_BATCH.value} images')
  for size, (variant, changes, pixels, names) in SIZES.items():
    model = vqgan.build(variant, **changes, dtype=sizes.dtype())
    ours, peer = measure(model, pixels, names), {}
    if other:
      peer = other.vqgan_seconds(model, pixels, _BATCH.value, names)
    for name, (value, flops) in ours.items():
      ratio = f'; torch {peer[name]:.3f} s, {peer[name] / value:.2f} times as long' if peer else ''
      speed = f'{_BATCH.value / value:.2f} images/s, {100 * flops / value / limit:.0f}% of the measured FLOP/s'
      print(f'{size} {name} at {pixels} x {pixels}: {value:.3f} s, {speed}{ratio}', flush=True)


if __name__ == '__main__':
  app.run(main)
