"""Trains a StoryGANc: a generator against an image discriminator and a story discriminator.

Maharana et al., 2022, section 3.5; losses as in StoryGAN (Li et al., 2019). All players are trained in one step:
`stop_gradient` separates their losses, and `config.optim.groups.PLAYER.every` sets how often each is updated.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dalle_jax.functional import gan
from dalle_jax.functional.pixels import boards, to_float, to_uint8
from dalle_jax.layers.basic import statistics_of, update_statistics
from dalle_jax.models import caption_encoder, storyganc, variants

Metrics = dict[str, jax.Array]
DEFAULTS = dict(
  kl_weight=1.0,
  label_weight=1.0,  # of the classification of characters, if the data has labels
  image_weight=1.0,  # of the generator's loss from the image discriminator
  story_weight=1.0,  # of the generator's loss from the story discriminator
  other_source=True,  # true frames after the source of another story are negatives of the story discriminator, too
  l2_weight=0.0,  # of the squared error to the true frames, which is not in the paper
  norm_decay=0.9,  # decay of the running statistics of batch normalisation
)
FROZEN = ('clip', 'roberta')  # the frozen networks that it can use
stop = jax.lax.stop_gradient


class StoryGANcObjective:
  """The players are 'generator', 'image_discriminator' and 'story_discriminator'.

  Batches of B stories of T frames after the source, F = T + 1: text int32[B, T, N] (clip_text or roberta_text with
  those caption encoders), image uint8[B, F, H, W, 3] and, if the data has them, labels bool[B, F, C].

  The image discriminator is conditioned on the caption vector of a frame and the code of its story; the story
  discriminator on the mean caption vector and the code, and its input is the source followed by the frames. Mismatched
  descriptions are those of another story of the batch.
  """

  convolutional = True  # see training.state.Objective

  def __init__(self, model: storyganc.StoryGANc, tower: caption_encoder.Tower | None, c: ConfigDict):
    self.model, self.tower, self.c = model, tower, c
    self.image_discriminator, self.story_discriminator = storyganc.discriminators(model)

  def init(self, rng: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[Any, Any]:
    """Raises ValueError if batches are not stories of images, or for a mesh on which gradients would be wrong."""
    if all(jax.sharding.get_abstract_mesh().shape.get(axis, 1) > 1 for axis in ('data', 'fsdp', 'tensor')):
      raise ValueError(
        'split by data, fsdp and tensor at once, StoryGANc gets wrong gradients from XLA (observed with jax 0.10); set '
        'one of config.mesh.data, fsdp and tensor to 1.'
      )
    if 'image' not in batch or batch['image'].ndim != 5:
      raise ValueError('the objective storyganc needs stories of images; use a story source, and no config.encode.')
    m, t, n = self.model, self.model.frames, batch['text'].shape[-1]
    keys = jax.random.split(rng, 3)
    captions = jnp.zeros((1, t, n), jnp.int32) if self.tower is None else jnp.zeros((1, t, m.caption_dim))
    frame, noise = jnp.zeros((1, *batch['image'].shape[-3:])), jnp.zeros((1, t, m.noise))
    eps = jnp.zeros((1, m.code))
    generator = m.init(keys[0], captions, frame, eps, noise)['params']
    about = jnp.zeros((1, m.code + (m.caption_dim if self.tower else m.width)))
    frames = jnp.zeros((1, t + 1, *frame.shape[1:]))
    params = {
      'generator': generator,
      'image_discriminator': self.image_discriminator.init(keys[1], frame, about)['params'],
      'story_discriminator': self.story_discriminator.init(keys[2], frames, about)['params'],
    }
    return params, jax.tree.map(jnp.copy, statistics_of(params))  # copies, as the step cannot donate one buffer twice

  def loss(self, params: Any, ctx: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, tuple[Metrics, Any]]:
    c, real = self.c, to_float(batch['image'])
    source, true = real[:, 0], real[:, 1:]
    labels = self._labels(batch)
    generated, statistics = self._generate(params, ctx, batch, source)
    fake = generated.frames

    # Inputs of the discriminators; their losses have gradients for the generator only through its frames.
    captions, code = stop(generated.captions), stop(generated.mu)
    of_frames = jnp.concatenate([captions, jnp.repeat(code[:, None], captions.shape[1], 1)], -1)
    of_story = jnp.concatenate([captions.mean(1), code], -1)
    rows = lambda x: x.reshape(-1, *x.shape[2:])
    other_story = lambda x: jnp.roll(x, 1, axis=0)
    story = lambda frames, first=source: jnp.concatenate([first[:, None], frames], 1)
    games = (
      ('image', self.image_discriminator, rows(true), rows(fake), rows(of_frames), rows(other_story(of_frames))),
      ('story', self.story_discriminator, story(true), story(fake), of_story, other_story(of_story)),
    )
    total, metrics = c.kl_weight * generated.kl, {'kl': generated.kl}
    if c.l2_weight:
      metrics['l2'] = jnp.square(fake - true).mean()
      total += c.l2_weight * metrics['l2']
    for name, discriminator, true_inputs, fake_inputs, about, about_other in games:
      player, weight = f'{name}_discriminator', c[f'{name}_weight']
      features_of = lambda p, x, d=discriminator: self._features(d, p, x, ctx.train)
      logits_of = lambda p, *args, d=discriminator, method='match_logits': d.apply({'params': p}, *args, method=method)

      # The generator, with the discriminator held fixed
      fixed = stop(params[player])
      features, _ = features_of(fixed, fake_inputs)
      generator_loss = gan.bce(logits_of(fixed, features, about), 1.0)
      total += weight * generator_loss
      metrics[f'{name}_generator_loss'] = generator_loss
      if labels is not None and name == 'image':
        label_logits = logits_of(fixed, features, method='label_logits')
        metrics['generator_label_loss'] = gan.bce(label_logits, labels)
        total += c.label_weight * metrics['generator_label_loss']

      # The discriminator, with the frames held fixed
      of_true, true_statistics = features_of(params[player], true_inputs)
      of_fake, fake_statistics = features_of(params[player], stop(fake_inputs))
      real_logits, fake_logits = logits_of(params[player], of_true, about), logits_of(params[player], of_fake, about)
      if len(source) > 1:
        wrong = [logits_of(params[player], of_true, about_other)]
        if name == 'story' and c.other_source:
          of_mixed, _ = features_of(params[player], story(true, other_story(source)))
          wrong.append(logits_of(params[player], of_mixed, about))
      else:
        wrong = [fake_logits]  # there is no other story whose description would be wrong
      wrong_logits = jnp.concatenate(wrong)
      discriminator_loss = gan.bce_discriminator(real_logits, fake_logits, wrong_logits)
      total += discriminator_loss
      metrics[f'{name}_discriminator_loss'] = discriminator_loss
      metrics[f'{name}_accuracy_real'] = (real_logits > 0).mean()
      metrics[f'{name}_accuracy_fake'] = (fake_logits < 0).mean()
      metrics[f'{name}_accuracy_wrong'] = (wrong_logits < 0).mean()
      if labels is not None and name == 'image':
        label_logits = logits_of(params[player], of_true, method='label_logits')
        metrics['label_loss'] = gan.bce(label_logits, labels)
        total += c.label_weight * metrics['label_loss']
      statistics[player] = jax.tree.map(lambda a, b: (a + b) / 2, true_statistics, fake_statistics)
    return total, (metrics, stop(statistics) if ctx.train else ctx.mutable)

  def after_update(self, params: Any, mutable: Any) -> Any:
    """Update the running statistics of batch normalisation by those of the last micro batch."""
    return update_statistics(params, mutable, self.c.norm_decay)

  def sample(self, params: Any, ctx: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The true frames of each story above generated ones, with the source first: uint8[B, 2 H, F W, 3]."""
    generated, _ = self._generate(params, ctx, batch, to_float(batch['image'][:, 0]))
    images = jnp.concatenate([batch['image'][:, :1], to_uint8(generated.frames)], 1)
    return boards(batch['image'], images)

  def _generate(self, params: Any, ctx: Any, batch: Mapping[str, jax.Array], source: jax.Array):
    """Generated stories, and the batch statistics as {'generator': ...}."""
    m, (b, t) = self.model, (batch['image'].shape[0], batch['image'].shape[1] - 1)
    eps, noise = jax.random.split(ctx.rng)
    eps, noise = jax.random.normal(eps, (b, m.code)), jax.random.normal(noise, (b, t, m.noise))
    captions = batch['text']
    if self.tower:
      if f'{m.captions}_text' not in batch:
        raise ValueError(f'config.frozen.{m.captions} has no tokenizer; import it again, with its tokenizer.')
      captions = self.tower(ctx.frozen[m.captions], batch[f'{m.captions}_text'])
    generated, extra = m.apply(
      {'params': params['generator']}, captions, source, eps, noise, ctx.train, mutable=['statistics']
    )
    return generated, {'generator': extra.get('statistics', {})}

  def _features(
    self, discriminator: storyganc.Discriminator, params: Any, x: jax.Array, train: bool
  ) -> tuple[jax.Array, Any]:
    """Features of a discriminator, and its batch statistics."""
    features, extra = discriminator.apply({'params': params}, x, train, method='features', mutable=['statistics'])
    return features, extra.get('statistics', {})

  def _labels(self, batch: Mapping[str, jax.Array]) -> jax.Array | None:
    """Labels of the frames after the source, float32[B * T, C]; None for a model without labels."""
    if not self.model.labels:
      return None
    count = batch['labels'].shape[-1] if 'labels' in batch else 0
    if count != self.model.labels:
      raise ValueError(
        f'the data has {count} labels per frame, but model.labels is {self.model.labels}; set it to {count}.'
      )
    return batch['labels'][:, 1:].reshape(-1, self.model.labels).astype(jnp.float32)


def from_config(config: ConfigDict, frozen_configs: Mapping[str, Any]) -> StoryGANcObjective:
  """The objective of `config.model` and `config.loss` (`DEFAULTS` are its fields).

  Raises ValueError for an unknown field, without captions or their encoder, or for images of another size.
  """
  c = ConfigDict({**DEFAULTS, **variants.fields('config.loss', DEFAULTS, config.loss)})
  variants.check_ranges('config.loss', c, ['norm_decay'], [name for name in c if name.endswith('_weight')])
  if not config.tokenizer.vocab_size:
    raise ValueError('the objective storyganc needs captions; set config.tokenizer.vocab_size.')
  model, tower = storyganc.of_run(config, frozen_configs)
  if model.image_size != config.data.image_size:
    raise ValueError(
      f'config.data.image_size is {config.data.image_size}, but the model generates {model.image_size} pixels; set it '
      f'to {model.image_size}, or change model.start and model.channels.'
    )
  stories = config.data.batch_size // max(1, config.train.accum)
  if stories < 2:
    raise ValueError(
      f'storyganc compares the stories of a micro batch with each other, and each has {stories}; use 2 or more.'
    )
  return StoryGANcObjective(model, tower, c)
