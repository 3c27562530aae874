"""StoryGANc: a GAN continues a story ("StoryDALL-E", Maharana et al., ECCV 2022, section 3.5).

What is not said there follows StoryGAN (Li et al., CVPR 2019): the recurrent story encoder, the widths, the losses.
Different from there: the code of a story is made of the mean over its captions, so that stories may have any length;
the context unit is a plain GRU; discriminators read descriptions through one more layer, and that of stories keeps
places apart up to its last layer.

Axis legend: B stories, T frames to be generated, F = T + 1 with the source, S caption_dim, Z code, R = B * T rows.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from dalle_jax.layers.basic import BatchNorm, Conv, Dense, constrain, normal_init
from dalle_jax.layers.contextual import contextual_attention
from dalle_jax.models import variants
from dalle_jax.models.caption_encoder import CaptionEncoder, Tower

VARIANTS = {
  'test': dict(
    width=16, layers=1, heads=2, code=8, noise=4, start=4, channels=(16, 8, 8), join=1, map_width=8, blocks=1,
    disc_width=8,
  ),
  'quickstart': dict(
    width=96, layers=1, heads=4, code=64, noise=16, start=9, channels=(96, 48, 24), join=0, map_width=48, blocks=1,
    disc_width=16,
  ),
  'small': dict(
    width=128, layers=2, heads=4, code=124, noise=100, channels=(256, 192, 128, 64, 32), disc_width=32,
  ),
  'paper': dict(),
  'paper_128': dict(start=8, join=1),
}  # fmt: skip
INIT = normal_init(0.02)


class Generated(struct.PyTreeNode):
  """What the generator draws, and what the discriminators are told of it.

  Attributes:
    frames: float32[B, T, H, W, 3] in [-1, 1].
    captions: float32[B, T, S], the vectors of the captions.
    mu: float32[B, Z], the code of the story.
    kl: float32[], of the distribution of codes to N(0, I), mean over stories and dimensions.
  """

  frames: jax.Array
  captions: jax.Array
  mu: jax.Array
  kl: jax.Array


def leaky(x: jax.Array) -> jax.Array:
  return jax.nn.leaky_relu(x, 0.2)


class GRU(nn.Module):
  """A gated recurrent unit over [B, T, D]: [B, T, Z] (Cho et al., 2014); the few steps are compiled one by one."""

  width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, state: jax.Array) -> jax.Array:
    """`state` [B, Z] comes before the first row."""
    inward = Dense(3 * self.width, ('embed', None), dtype=self.dtype, kernel_init=INIT, name='inward')(x)
    turn = Dense(3 * self.width, (None, None), dtype=self.dtype, kernel_init=INIT, name='turn')
    states = []
    for t in range(x.shape[1]):
      (reset, update, new), (a, b, c) = jnp.split(inward[:, t], 3, -1), jnp.split(turn(state), 3, -1)
      update = jax.nn.sigmoid(update + b)
      state = update * state + (1 - update) * jnp.tanh(new + jax.nn.sigmoid(reset + a) * c)
      states.append(state)
    return jnp.stack(states, 1)


class ConvNorm(nn.Module):
  """3 x 3 convolution, of a map doubled in height and width or as it is, and batch normalisation."""

  features: int
  dtype: jnp.dtype
  upsample: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = Conv(self.features, upsample=self.upsample, use_bias=False, dtype=self.dtype, kernel_init=INIT, name='conv')(x)
    return BatchNorm(dtype=self.dtype, name='norm')(x, train)


class StoryGANc(nn.Module):
  """The generator.

  Attributes:
    text_vocab, text_length, pad: of the captions; see `models.variants.text_sizes`.
    captions: where their vectors come from: 'own', an encoder that learns with the generator, or a frozen 'clip' or
      'roberta'.
    caption_dim: S of frozen encoders; 0 with 'own', where it is `width`.
    width, layers, heads: of the own encoder.
    frames: the most frames after the source.
    code: Z, of the code of a story and of the states of both recurrent units.
    noise: numbers of noise a frame.
    start: height and width of the first map, whose channels are the first of `channels`; each further one doubles it.
    join: the map, counted from 0, that what was found in the source is put to.
    map_width: channels of the map that looks, and of the features of the source.
    attention: contextual attention to the source; without it nothing is known of the source (for ablations).
    blocks: residual blocks after it.
    disc_width: channels of the first layer of the image discriminator; the story discriminator's has half of them.
    labels: of the characters in a frame, which the image discriminator also tells; 0: none.
  """

  text_vocab: int = 16_384 + 64
  text_length: int = 64
  pad: int = -1
  captions: str = 'own'
  caption_dim: int = 0
  width: int = 256
  layers: int = 2
  heads: int = 4
  frames: int = 4
  code: int = 124
  noise: int = 100
  start: int = 4
  channels: tuple[int, ...] = (2048, 1024, 512, 128, 64)
  join: int = 2
  map_width: int = 64
  attention: bool = True
  blocks: int = 2
  disc_width: int = 124
  labels: int = 0
  dtype: jnp.dtype = jnp.float32

  @property
  def image_size(self) -> int:
    return self.start * 2 ** (len(self.channels) - 1)

  @nn.compact
  def __call__(
    self, texts: jax.Array, source: jax.Array, eps: jax.Array, noise: jax.Array, train: bool = False
  ) -> Generated:
    """Draws the frames of B stories.

    Args:
      texts: int32[B, T, N], the captions, or float32[B, T, S], their vectors by a frozen encoder.
      source: float32[B, H, W, 3] in [-1, 1].
      eps: float32[B, Z] of N(0, I), of the code of the story.
      noise: float32[B, T, noise] of N(0, I).
      train: whether batch normalisation goes by the batch.

    Raises ValueError for more captions than `frames` and for pictures of another size.
    """
    b, t = texts.shape[:2]
    if t > self.frames:
      raise ValueError(f'a story has {t} frames after the source, the model takes {self.frames}; set model.frames.')
    if source.shape[1:] != (self.image_size, self.image_size, 3):
      size = self.image_size
      raise ValueError(f'pictures are {list(source.shape[1:])}, the model draws [{size}, {size}, 3]; resize.')
    dense = lambda features, name: Dense(features, ('embed', None), dtype=self.dtype, kernel_init=INIT, name=name)
    # The story: vectors of captions, a code of all of it, and a state a frame that knows what came before.
    vectors = texts
    if self.captions == 'own':
      vectors = CaptionEncoder(
        self.text_vocab, self.pad, self.text_length, self.frames, self.width, self.layers, self.heads, self.dtype,
        name='captions_encoder',
      )(texts)  # fmt: skip
    x = jax.nn.relu(dense(2 * self.code, 'story_in')(vectors)).mean(1)
    mu, log_var = jnp.split(dense(2 * self.code, 'story_out')(x).astype(jnp.float32), 2, -1)
    log_var = jnp.clip(log_var, -10.0, 10.0)
    kl = 0.5 * (jnp.square(mu) + jnp.exp(log_var) - 1 - log_var).mean()
    first = mu + jnp.exp(0.5 * log_var) * eps
    motion = GRU(self.code, self.dtype, name='motion')(
      jnp.concatenate([noise.astype(vectors.dtype), vectors], -1), jnp.zeros((b, self.code), self.dtype)
    )
    gist = GRU(self.code, self.dtype, name='gist')(jnp.concatenate([motion, vectors], -1), first.astype(self.dtype))
    spread = jnp.broadcast_to(mu[:, None].astype(self.dtype), (b, t, self.code))
    z = jnp.concatenate([motion, spread, gist, dense(self.code, 'caption')(vectors)], -1).reshape(b * t, -1)

    # The picture, and on the way what the source has for it.
    block = lambda features, name, upsample=False: ConvNorm(features, self.dtype, upsample, name=name)
    x = dense(self.start**2 * self.channels[0], 'first')(z).reshape(b * t, self.start, self.start, -1)
    x = jax.nn.relu(BatchNorm(dtype=self.dtype, name='first_norm')(x, train))
    for i, features in enumerate(self.channels):
      x = constrain(x, ('batch', None, None, None))
      if i:
        x = jax.nn.relu(block(features, f'up_{i}', upsample=True)(x, train))
      if i == self.join:
        side = self.start * 2**i
        found = dense(side**2 * self.map_width, 'map')(z).reshape(b * t, side, side, -1)
        if self.attention:
          features_of = SourceEncoder(self.map_width, len(self.channels) - 1 - i, self.dtype, name='source')
          found = found + contextual_attention(found, features_of(source, train))
        x = jax.nn.relu(block(features, 'joined')(jnp.concatenate([x, found], -1), train))
        for k in range(self.blocks):
          y = jax.nn.relu(block(features, f'block_{k}_in')(x, train))
          x = x + block(features, f'block_{k}_out')(y, train)
    x = jnp.tanh(Conv(3, dtype=self.dtype, kernel_init=INIT, name='pixels')(x).astype(jnp.float32))
    return Generated(x.reshape(b, t, *x.shape[1:]), vectors.astype(jnp.float32), mu, kl)


class SourceEncoder(nn.Module):
  """Features of the source, [B, H, W, 3] -> [B, H / 2 ** halvings, W / 2 ** halvings, width]."""

  width: int
  halvings: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    for i in range(self.halvings):
      x = Conv(self.width, 4, 2, dtype=self.dtype, kernel_init=INIT, use_bias=False, name=f'conv_{i}')(x)
      x = leaky(BatchNorm(dtype=self.dtype, name=f'norm_{i}')(x, train))
    return Conv(self.width, dtype=self.dtype, kernel_init=INIT, name='out')(x)


class Discriminator(nn.Module):
  """Four strided convolutions, then what they saw is compared with a description.

  Attributes:
    channels: of the first layer; each further one has twice as many.
    over_time: kernels also span three frames: 3 x 4 x 4, strides 1 x 2 x 2; as 2-D convolutions of three frames side by
      side, which is the same and faster.
    labels: of a multi-label head beside; 0: none.
  """

  channels: int
  over_time: bool = False
  labels: int = 0
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    wide = [self.channels * 2**i for i in range(4)]
    plain = dict(dtype=self.dtype, kernel_init=INIT)
    self.convs = [Conv(n, 4, 2, use_bias=not i, **plain) for i, n in enumerate(wide)]
    self.norms = [BatchNorm(dtype=self.dtype) for _ in wide[1:]]
    self.condition = Dense(wide[-1], ('embed', None), **plain)
    self.meet = Conv(wide[-1], **plain)
    self.logit = Dense(1, ('embed', None), kernel_init=INIT)
    if self.labels:
      self.label_head = Dense(self.labels, ('embed', None), kernel_init=INIT)

  def features(self, x: jax.Array, train: bool = False) -> jax.Array:
    """float32[R, H, W, 3], or with `over_time` [B, F, H, W, 3], -> [R or B, h, w, C], the mean over frames."""
    frames = x.shape[1] if self.over_time else 1
    x = x.reshape(-1, *x.shape[-3:])
    for i, conv in enumerate(self.convs):
      x = conv(with_neighbours(x, frames) if self.over_time else x)
      x = leaky(self.norms[i - 1](x, train) if i else x)
    return x.reshape(-1, frames, *x.shape[1:]).mean(1)

  def __call__(self, x: jax.Array, about: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array | None]:
    """Logits float32[R] as of `fits` and, if there are labels, float32[R, labels] as of `label_logits`."""
    features = self.features(x, train)
    return self.match_logits(features, about), self.label_logits(features) if self.labels else None

  def match_logits(self, features: jax.Array, about: jax.Array) -> jax.Array:
    """Whether features [R, h, w, C] are of something real that fits the description [R, D]: logits float32[R]."""
    tiled = jnp.broadcast_to(leaky(self.condition(about))[:, None, None], features.shape)
    x = leaky(self.meet(jnp.concatenate([features, tiled], -1)))
    return self.logit(x.reshape(len(x), -1).astype(jnp.float32))[:, 0]

  def label_logits(self, features: jax.Array) -> jax.Array:
    """A logit for each label, float32[R, labels]."""
    return self.label_head(features.reshape(len(features), -1).astype(jnp.float32))


def with_neighbours(x: jax.Array, frames: int) -> jax.Array:
  """Rows [B * F, H, W, C] with the frames before and after them, zeros at the ends: [B * F, H, W, 3 C]."""
  y = jnp.pad(x.reshape(-1, frames, *x.shape[1:]), ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
  return jnp.concatenate([y[:, i : i + frames] for i in range(3)], -1).reshape(*x.shape[:-1], -1)


def discriminators(model: StoryGANc) -> tuple[Discriminator, Discriminator]:
  """The discriminators of pictures and of stories that go with a generator."""
  image = Discriminator(model.disc_width, labels=model.labels, dtype=model.dtype)
  return image, Discriminator(max(1, model.disc_width // 2), over_time=True, dtype=model.dtype)


def build(variant: str, **overrides) -> StoryGANc:
  """The generator of `VARIANTS[variant]` with some fields changed.

  Raises ValueError for an unknown variant or field, for captions that are none of the known and a `join` that is no
  map.
  """
  model = variants.build(StoryGANc, VARIANTS, variant, overrides)
  if model.captions not in ('own', 'clip', 'roberta'):
    raise ValueError(f'model.captions {model.captions!r} is unknown; there are own, clip and roberta.')
  if not 0 <= model.join < len(model.channels):
    raise ValueError(f'model.join is {model.join}; there are the maps 0 to {len(model.channels) - 1}.')
  return model


def of_run(config: Mapping[str, Any], frozen: Mapping[str, Any]) -> tuple[StoryGANc, Tower | None]:
  """The generator of a run, and the tower that reads its captions if that is frozen, from their configs."""
  model = build(**{**config['model'], **variants.text_sizes(config['tokenizer'])})
  if model.captions == 'own':
    return model, None
  if model.captions not in frozen:
    kind = model.captions
    raise ValueError(f'model.captions {kind!r} needs its network; set config.frozen.{kind} to the run of a {kind}.')
  tower = Tower.of_run(model.captions, frozen[model.captions], model.text_length)
  return model.clone(caption_dim=tower.width), tower
