"""StoryGANc: a GAN that continues stories ("StoryDALL-E", Maharana et al., ECCV 2022, section 3.5).

What the paper does not specify follows StoryGAN (Li et al., CVPR 2019): the recurrent story encoder, the widths, the
losses. Differences from StoryGAN: the code of a story is computed from the mean over its captions, so that stories may
have any length; the context unit is a plain GRU; discriminators have one more layer for the description, and the story
discriminator does not pool over space before its last layer.

Axis legend: B stories, T frames to generate, F = T + 1 with the source, S caption_dim, Z code, R = B * T rows.
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
  """Generated frames, and the conditioning for the discriminators.

  Attributes:
    frames: float32[B, T, H, W, 3] in [-1, 1].
    captions: float32[B, T, S], the caption vectors.
    mu: float32[B, Z], the mean of the story's code.
    kl: float32[], KL divergence of the code's distribution from N(0, I), mean over stories and dimensions.
  """

  frames: jax.Array
  captions: jax.Array
  mu: jax.Array
  kl: jax.Array


def leaky(x: jax.Array) -> jax.Array:
  return jax.nn.leaky_relu(x, 0.2)


class GRU(nn.Module):
  """A gated recurrent unit, [B, T, D] -> [B, T, Z] (Cho et al., 2014), unrolled over the few steps."""

  width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, state: jax.Array) -> jax.Array:
    """States after each step; `state` [B, Z] is the initial one."""
    of_inputs = Dense(3 * self.width, ('embed', None), dtype=self.dtype, kernel_init=INIT, name='inward')(x)
    of_state = Dense(3 * self.width, (None, None), dtype=self.dtype, kernel_init=INIT, name='turn')
    states = []
    for t in range(x.shape[1]):
      x_reset, x_update, x_new = jnp.split(of_inputs[:, t], 3, -1)
      h_reset, h_update, h_new = jnp.split(of_state(state), 3, -1)
      reset, update = jax.nn.sigmoid(x_reset + h_reset), jax.nn.sigmoid(x_update + h_update)
      state = update * state + (1 - update) * jnp.tanh(x_new + reset * h_new)
      states.append(state)
    return jnp.stack(states, 1)


class ConvNorm(nn.Module):
  """3 x 3 convolution, after 2x upsampling if `upsample`, and batch normalisation."""

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
    text_vocab, text_length, pad: sizes of the captions; see `models.variants.text_sizes`.
    captions: encoder of the captions: 'own', trained with the generator, or a frozen 'clip' or 'roberta'.
    caption_dim: S of a frozen encoder; 0 with 'own', where S is `width`.
    width, layers, heads: sizes of the encoder 'own'.
    frames: maximum number of frames after the source.
    code: Z, the size of a story's code and of the states of both recurrent units.
    noise: size of the noise vector of a frame.
    start: height and width of the first feature map; every further one doubles them.
    channels: channels of the feature maps.
    join: the feature map, counted from 0, into which contextual attention to the source is merged.
    map_width: channels of the queries of contextual attention and of the features of the source.
    attention: whether there is contextual attention; without it the source is not used (for ablations).
    blocks: number of residual blocks after the merge.
    disc_width: channels of the first layer of the image discriminator; that of the story discriminator has half.
    labels: number of character labels of a frame, which the image discriminator also predicts; 0: none.
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
    """Generate the frames of B stories.

    Args:
      texts: the captions int32[B, T, N], or their vectors by a frozen encoder, float32[B, T, S].
      source: the source frames, float32[B, H, W, 3] in [-1, 1].
      eps: float32[B, Z] of N(0, I), the noise of the story's code.
      noise: float32[B, T, noise] of N(0, I).
      train: whether batch normalisation uses batch statistics.

    Raises ValueError for more captions than `frames`, or for source frames of another size.
    """
    b, t = texts.shape[:2]
    if t > self.frames:
      raise ValueError(
        f'a story has {t} frames after the source, the model takes at most {self.frames}; set model.frames.'
      )
    if source.shape[1:] != (self.image_size, self.image_size, 3):
      size = self.image_size
      raise ValueError(
        f'source frames are {list(source.shape[1:])}, the model generates [{size}, {size}, 3]; resize them.'
      )
    dense = lambda features, name: Dense(features, ('embed', None), dtype=self.dtype, kernel_init=INIT, name=name)
    # The story: caption vectors, a code of the whole story, and for each frame a state that depends on earlier ones.
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
    code = mu + jnp.exp(0.5 * log_var) * eps
    motion = GRU(self.code, self.dtype, name='motion')(
      jnp.concatenate([noise.astype(vectors.dtype), vectors], -1), jnp.zeros((b, self.code), self.dtype)
    )
    gist = GRU(self.code, self.dtype, name='gist')(jnp.concatenate([motion, vectors], -1), code.astype(self.dtype))
    spread = jnp.broadcast_to(mu[:, None].astype(self.dtype), (b, t, self.code))
    z = jnp.concatenate([motion, spread, gist, dense(self.code, 'caption')(vectors)], -1).reshape(b * t, -1)

    # The frames, with contextual attention to the source at the map `join`.
    block = lambda features, name, upsample=False: ConvNorm(features, self.dtype, upsample, name=name)
    x = dense(self.start**2 * self.channels[0], 'first')(z).reshape(b * t, self.start, self.start, -1)
    x = jax.nn.relu(BatchNorm(dtype=self.dtype, name='first_norm')(x, train))
    for i, features in enumerate(self.channels):
      x = constrain(x, ('batch', None, None, None))
      if i:
        x = jax.nn.relu(block(features, f'up_{i}', upsample=True)(x, train))
      if i == self.join:
        side = self.start * 2**i
        queries = dense(side**2 * self.map_width, 'map')(z).reshape(b * t, side, side, -1)
        merged = queries
        if self.attention:
          encoder = SourceEncoder(self.map_width, len(self.channels) - 1 - i, self.dtype, name='source')
          merged = queries + contextual_attention(queries, encoder(source, train))
        x = jax.nn.relu(block(features, 'joined')(jnp.concatenate([x, merged], -1), train))
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
  """A conditional discriminator: four strided convolutions, whose features are matched with a description.

  Attributes:
    channels: channels of the first layer; every further one has twice as many.
    over_time: whether kernels also span three frames (3 x 4 x 4, strides 1 x 2 x 2), computed as 2-D convolutions of
      three frames concatenated along channels, which is equivalent and faster.
    labels: number of labels of an additional multi-label head; 0: none.
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
    """Images float32[R, H, W, 3] -> [R, h, w, C], or with `over_time` stories [B, F, H, W, 3] -> [B, h, w, C].

    Features of a story are means over its frames.
    """
    frames = x.shape[1] if self.over_time else 1
    x = x.reshape(-1, *x.shape[-3:])
    for i, conv in enumerate(self.convs):
      x = conv(with_neighbours(x, frames) if self.over_time else x)
      x = leaky(self.norms[i - 1](x, train) if i else x)
    return x.reshape(-1, frames, *x.shape[1:]).mean(1)

  def __call__(self, x: jax.Array, about: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array | None]:
    """The results of `match_logits`, float32[R], and of `label_logits`, float32[R, labels], or None without labels."""
    features = self.features(x, train)
    return self.match_logits(features, about), self.label_logits(features) if self.labels else None

  def match_logits(self, features: jax.Array, about: jax.Array) -> jax.Array:
    """Logits float32[R] of features [R, h, w, C] being real and matching the description `about`, [R, D]."""
    tiled = jnp.broadcast_to(leaky(self.condition(about))[:, None, None], features.shape)
    x = leaky(self.meet(jnp.concatenate([features, tiled], -1)))
    return self.logit(x.reshape(len(x), -1).astype(jnp.float32))[:, 0]

  def label_logits(self, features: jax.Array) -> jax.Array:
    """Logits of the labels, float32[R, labels], from features [R, h, w, C]."""
    return self.label_head(features.reshape(len(features), -1).astype(jnp.float32))


def with_neighbours(x: jax.Array, frames: int) -> jax.Array:
  """Concatenate each frame with those before and after it, zeros at the ends: [B * F, H, W, C] -> [..., 3 C]."""
  y = jnp.pad(x.reshape(-1, frames, *x.shape[1:]), ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
  return jnp.concatenate([y[:, i : i + frames] for i in range(3)], -1).reshape(*x.shape[:-1], -1)


def discriminators(model: StoryGANc) -> tuple[Discriminator, Discriminator]:
  """The image discriminator and the story discriminator of a generator."""
  image = Discriminator(model.disc_width, labels=model.labels, dtype=model.dtype)
  story = Discriminator(max(1, model.disc_width // 2), over_time=True, dtype=model.dtype)
  return image, story


def build(variant: str, **overrides) -> StoryGANc:
  """The generator of `VARIANTS[variant]` with fields overridden.

  Raises ValueError for an unknown variant or field, unknown `captions`, or a `join` that is not a feature map.
  """
  model = variants.build(StoryGANc, VARIANTS, variant, overrides)
  if model.captions not in ('own', 'clip', 'roberta'):
    raise ValueError(f'model.captions {model.captions!r} is unknown; expected own, clip or roberta.')
  if not 0 <= model.join < len(model.channels):
    raise ValueError(f'model.join is {model.join}; expected a feature map, 0 to {len(model.channels) - 1}.')
  return model


def of_run(config: Mapping[str, Any], frozen: Mapping[str, Any]) -> tuple[StoryGANc, Tower | None]:
  """The generator of a run, and its frozen caption encoder if it has one, from their configs.

  Raises ValueError if a frozen caption encoder is needed and not in `frozen`.
  """
  model = build(**{**config['model'], **variants.text_sizes(config['tokenizer'])})
  if model.captions == 'own':
    return model, None
  if model.captions not in frozen:
    kind = model.captions
    raise ValueError(
      f'model.captions {kind!r} needs a frozen network; set config.frozen.{kind} to the run of a {kind}.'
    )
  tower = Tower.of_run(model.captions, frozen[model.captions], model.text_length)
  return model.clone(caption_dim=tower.width), tower
