"""Milliseconds per token of sampling, against the time of only reading the weights at the measured bandwidth.

  python -m benchmarks.sampler --size=t_base --batch_size=4 --peer=torch
  python -m benchmarks.sampler --size=mindalle --batch_size=1                      # 1.3B, on a GPU
The weights are those of the blocks and the image head, which every step reads in full, in the compute dtype. --story
samples the four frames of stories with cross-attention to their source.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import limits, sizes
from dalle_jax.functional import decoding
from dalle_jax.models import decode_params, story_dalle
from dalle_jax.training import sharding

_SIZE = flags.DEFINE_string('size', 't_base', 'name in benchmarks/sizes.py or variant in dalle_jax/models/dalle.py')
_BATCH = flags.DEFINE_integer('batch_size', 4, 'images or stories at once')
_STORY = flags.DEFINE_bool('story', False, 'stories of four frames, with cross-attention in every block')
_INT8 = flags.DEFINE_bool('int8', False, '8-bit weights of blocks and heads')
_TOKENS = flags.DEFINE_integer('tokens', 0, 'number of tokens; 0: a whole image')
_PEER = flags.DEFINE_enum('peer', '', ['', 'torch'], 'compare with plain PyTorch')
_PEER_TOKENS = flags.DEFINE_integer('peer_tokens', 0, 'number of tokens for the peer; 0: as many as ours')
FRAMES = 4
READ = ('blocks/', 'image_head', '/cross/')  # parts of the names of parameters that every token reads


def draw(model, count, params, text, keys):
  """Samples one image for each text; text is int32[B, T]."""
  apply, plain = functools.partial(model.apply, {'params': params}), decoding.Sampling()
  none = jnp.zeros((len(text), 0), jnp.int32)
  return decoding.sample(apply, text, none, keys, empty=model.padding, length=count, n=1, sampling=plain)


def draw_story(model, count, params, text, keys):
  """Samples one frame for each text; text is int32[B, FRAMES, T]."""
  source = jnp.zeros((len(text), model.dalle.image_length), jnp.int32)
  apply, plain = story_dalle.sampler(model, params, text, source, None), decoding.Sampling()
  text = text.reshape(-1, text.shape[-1])
  none = jnp.zeros((len(text), 0), jnp.int32)
  return decoding.sample(apply, text, none, keys, empty=model.dalle.padding, length=count, n=1, sampling=plain)


def setup():
  """Returns (sampler, parameters, DALL-E, text, tokens, bytes and count of the weights that every token reads)."""
  rng, batch = np.random.default_rng(0), _BATCH.value
  model = (sizes.story if _STORY.value else sizes.model)(_SIZE.value)
  m = model.dalle if _STORY.value else model
  shape = (batch, FRAMES) if _STORY.value else (batch,)
  text = jnp.asarray(rng.integers(0, m.text_vocab, (*shape, m.text_length)), jnp.int32)
  image = jnp.zeros((*shape, m.image_length), jnp.int32)
  inputs = (text, image, image[:, 0]) if _STORY.value else (text, image)
  shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs)['params'])
  params = jax.tree.map(lambda x: 0.02 * jax.random.normal(jax.random.key(1), x.shape), shapes)
  params = decode_params.compute_params(params, m.dtype, _INT8.value, few_rows=jax.default_backend() == 'cpu')
  once = ('/cross/key', '/cross/value')  # read once for the source, not for every token
  every = lambda tree: {
    k: v
    for k, v in sharding.flatten(tree).items()
    if any(name in k for name in READ) and not any(name in k for name in once)
  }
  read, weights = sum(v.nbytes for v in every(params).values()), sum(v.size for v in every(shapes).values())
  params = (
    {**params, 'dalle': decode_params.by_layer(params['dalle'])} if _STORY.value else decode_params.by_layer(params)
  )
  count = _TOKENS.value or m.image_length
  return functools.partial(draw_story if _STORY.value else draw, model, count), params, m, text, count, read, weights


def main(_):
  other, rate, product = sizes.peer(_PEER.value), limits.bandwidth(), limits.matmul()
  run, params, model, text, count, read, weights = setup()
  rows = text[..., 0].size
  keys = jax.random.split(jax.random.key(1), rows)
  step = limits.seconds(jax.jit(run), params, text, keys, repeats=2) / count
  floor = read / rate
  print(f'{jax.devices()[0].device_kind}, {_SIZE.value}, {rows} x {count} tokens, {model.dtype}')
  print(f'{1e3 * step:.3f} ms per token, {rows / step:,.0f} tokens/s; {step / floor:.2f} times the limit ', end='')
  print(f'({read / 1e9:.2f} GB at {rate / 1e9:.1f} GB/s: {1e3 * floor:.3f} ms)', flush=True)
  print(f'{100 * 2 * weights * rows / step / product:.1f}% of the {product / 1e12:.2f} TFLOP/s of a large product')
  if model.attention == 'full':  # other kinds read only a part of the cache
    before = model.text_length + count / 2  # cached positions, on average over an image
    cached = rows * 2 * model.depth * model.d_model * before * jnp.dtype(model.dtype).itemsize
    both = (read + cached) / rate
    print(f'{step / both:.2f} times the limit with keys and values ({cached / 1e9:.2f} GB: {1e3 * both:.3f} ms)')
  if other:
    peers = other.token_seconds(model, rows, (_PEER_TOKENS.value or count) - 1, _STORY.value)
    for keep, peer in peers.items():
      print(f'torch, cache by {keep}: {1e3 * peer:.3f} ms per token, {peer / step:.2f} times as long', flush=True)


if __name__ == '__main__':
  app.run(main)
