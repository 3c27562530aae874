"""Trains a StoryGANc: a generator against a discriminator of pictures and one of stories.

Maharana et al., 2022, section 3.5; losses as of StoryGAN (Li et al., 2019). All players learn in one step: what is a
constant for whom is said by `stop_gradient`, how often each is updated by `config.optim.groups.PLAYER.every`.
"""

from collections.abc import Mapping, Sequence
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
  label_weight=1.0,  # of the characters in a frame, where the data has labels
  image_weight=1.0,  # of the generator's loss by the image discriminator
  story_weight=1.0,  # of that by the story discriminator
  other_source=True,  # true frames after the source of another story are wrong for the story discriminator, too
  l2_weight=0.0,  # of the squared distance to the true frames, which the paper does not have
  norm_decay=0.9,  # of the running statistics of batch normalisation
)
stop = jax.lax.stop_gradient


class StoryGANcObjective:
  """The players are 'generator', 'image_discriminator' and 'story_discriminator'.

  Batches of B stories of T frames after the source, F = T + 1: text int32[B, T, N] (clip_text or roberta_text with
  these captions), image uint8[B, F, H, W, 3] and, where the data has them, labels bool[B, F, C].

  The image discriminator is told the caption of a frame and the code of its story; the story discriminator is shown the
  source before the frames and told the mean caption and the code. Described wrongly is the next story of the batch.
  """

  def __init__(
    self, model: storyganc.StoryGANc, tower: caption_encoder.Tower | None, c: ConfigDict, frozen: Sequence[str] = ()
  ):
    self.model, self.tower, self.c, self.frozen_players = model, tower, c, frozen
    self.image_discriminator, self.story_discriminator = storyganc.discriminators(model)

  def init(self, rng: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[Any, Any]:
    """Raises ValueError for what are no stories of pictures, and for a mesh on which gradients would be wrong."""
    if all(jax.sharding.get_abstract_mesh().shape.get(axis, 1) > 1 for axis in ('data', 'fsdp', 'tensor')):
      raise ValueError(
        'split by data, fsdp and tensor at once, StoryGANc gets wrong gradients from XLA (seen with jax 0.10); set one '
        'of config.mesh.data, fsdp and tensor to 1.'
      )
    if 'image' not in batch or batch['image'].ndim != 5:
      raise ValueError('the objective storyganc needs stories of pictures; use a story source, and no config.encode.')
    m, t, n = self.model, self.model.frames, batch['text'].shape[-1]
    keys = jax.random.split(rng, 3)
    captions = jnp.zeros((1, t, n), jnp.int32) if self.tower is None else jnp.zeros((1, t, m.caption_dim))
    frame, noise = jnp.zeros((1, *batch['image'].shape[-3:])), jnp.zeros((1, t, m.noise))
    eps = jnp.zeros((1, m.code))
    generator = m.init(keys[0], captions, frame, eps, noise)['params']
    about = jnp.zeros((1, m.code + (m.caption_dim if self.tower else m.width)))
    params = {
      'generator': generator,
      'image_discriminator': self.image_discriminator.init(keys[1], frame, about)['params'],
      'story_discriminator': self.story_discriminator.init(keys[2], jnp.zeros((1, t + 1, *frame.shape[1:])), about)[
        'params'
      ],
    }
    return params, jax.tree.map(jnp.copy, statistics_of(params))  # the step may not be given one buffer twice

  def loss(self, params: Any, ctx: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, tuple[Metrics, Any]]:
    c, real = self.c, to_float(batch['image'])
    source, true = real[:, 0], real[:, 1:]
    labels = self._labels(batch)
    drawn, seen = self._draw(params, ctx, batch, source)
    fake = drawn.frames

    # What discriminators are told, and shown; nothing of it leads back into the generator but the frames.
    captions, code = stop(drawn.captions), stop(drawn.mu)
    of_frames = jnp.concatenate([captions, jnp.repeat(code[:, None], captions.shape[1], 1)], -1)
    of_story = jnp.concatenate([captions.mean(1), code], -1)
    rows = lambda x: x.reshape(-1, *x.shape[2:])
    other = lambda x: jnp.roll(x, 1, axis=0)
    story = lambda frames, first=source: jnp.concatenate([first[:, None], frames], 1)
    judged = (
      ('image', self.image_discriminator, rows(true), rows(fake), rows(of_frames), rows(other(of_frames))),
      ('story', self.story_discriminator, story(true), story(fake), of_story, other(of_story)),
    )
    total, metrics = c.kl_weight * drawn.kl, {'kl': drawn.kl}
    if c.l2_weight:
      metrics['l2'] = jnp.square(fake - true).mean()
      total += c.l2_weight * metrics['l2']
    for name, judge, true_ones, fake_ones, about, about_other in judged:
      player, weight = f'{name}_discriminator', c[f'{name}_weight']
      look = lambda p, x, judge=judge: self._features(judge, p, x, ctx.train)
      ask = lambda p, *args, judge=judge, method='match_logits': judge.apply({'params': p}, *args, method=method)

      # The generator, with the discriminator held fixed
      features, _ = look(stop(params[player]), fake_ones)
      fool = gan.bce(ask(stop(params[player]), features, about), 1.0)
      total += weight * fool
      metrics[f'{name}_generator_loss'] = fool
      if labels is not None and name == 'image':
        said = ask(stop(params[player]), features, method='label_logits')
        metrics['generator_label_loss'] = gan.bce(said, labels)
        total += c.label_weight * metrics['generator_label_loss']

      # The discriminator, with the frames held fixed
      of_true, real_statistics = look(params[player], true_ones)
      of_fake, fake_statistics = look(params[player], stop(fake_ones))
      logits = [ask(params[player], of_true, about), ask(params[player], of_fake, about)]
      wrong = [ask(params[player], of_true, about_other)] if len(source) > 1 else [logits[1]]  # no other story there
      if len(source) > 1 and name == 'story' and c.other_source:
        of_mixed, _ = look(params[player], story(true, other(source)))
        wrong.append(ask(params[player], of_mixed, about))
      logits.append(jnp.concatenate(wrong))
      found = gan.bce_discriminator(*logits)
      total += found
      metrics[f'{name}_discriminator_loss'] = found
      for kind, values, right in zip(('real', 'fake', 'wrong'), logits, (1, -1, -1), strict=True):
        metrics[f'{name}_accuracy_{kind}'] = (values * right > 0).mean()
      if labels is not None and name == 'image':
        said = ask(params[player], of_true, method='label_logits')
        metrics['label_loss'] = gan.bce(said, labels)
        total += c.label_weight * metrics['label_loss']
      seen[player] = jax.tree.map(lambda a, b: (a + b) / 2, real_statistics, fake_statistics)
    return total, (metrics, stop(seen) if ctx.train else ctx.mutable)

  def after_update(self, params: Any, mutable: Any) -> Any:
    """Running statistics of batch normalisation: of the last micro batch, of the players that learn."""
    moving = {player: seen for player, seen in mutable.items() if player not in self.frozen_players}
    return update_statistics(params, moving, self.c.norm_decay)

  def sample(self, params: Any, ctx: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The true frames of each story above those drawn, the source first: uint8[B, 2 H, F W, 3]."""
    drawn, _ = self._draw(params, ctx, batch, to_float(batch['image'][:, 0]))
    images = jnp.concatenate([batch['image'][:, :1], to_uint8(drawn.frames)], 1)
    return boards(batch['image'], images)

  def _draw(self, params: Any, ctx: Any, batch: Mapping[str, jax.Array], source: jax.Array):
    """What the generator draws, and the statistics of its batch as {'generator': ...}."""
    m, (b, t) = self.model, (batch['image'].shape[0], batch['image'].shape[1] - 1)
    eps, noise = jax.random.split(ctx.rng)
    eps, noise = jax.random.normal(eps, (b, m.code)), jax.random.normal(noise, (b, t, m.noise))
    captions = batch['text']
    if self.tower:
      if f'{m.captions}_text' not in batch:
        raise ValueError(f'config.frozen.{m.captions} has no tokenizer; import it again with one.')
      captions = self.tower(ctx.frozen[m.captions], batch[f'{m.captions}_text'])
    drawn, extra = m.apply(
      {'params': params['generator']}, captions, source, eps, noise, ctx.train, mutable=['statistics']
    )
    return drawn, {'generator': extra.get('statistics', {})}

  def _features(self, judge: storyganc.Discriminator, params: Any, x: jax.Array, train: bool) -> tuple[jax.Array, Any]:
    features, extra = judge.apply({'params': params}, x, train, method='features', mutable=['statistics'])
    return features, extra.get('statistics', {})

  def _labels(self, batch: Mapping[str, jax.Array]) -> jax.Array | None:
    """Those of the frames after the source, float32[B * T, C]."""
    if not self.model.labels:
      return None
    found = batch['labels'].shape[-1] if 'labels' in batch else 0
    if found != self.model.labels:
      raise ValueError(
        f'the data has {found} labels a frame and model.labels is {self.model.labels}; set it to {found}.'
      )
    return batch['labels'][:, 1:].reshape(-1, self.model.labels).astype(jnp.float32)


def from_config(config: ConfigDict, frozen_configs: Mapping[str, Any]) -> StoryGANcObjective:
  """The objective of `config.model` and `config.loss` (`DEFAULTS` are its fields).

  Raises ValueError for an unknown field, without captions or the encoder of captions, or for pictures of another size.
  """
  c = ConfigDict({**DEFAULTS, **variants.fields('config.loss', DEFAULTS, config.loss)})
  if not config.tokenizer.vocab_size:
    raise ValueError('the objective storyganc needs captions; set config.tokenizer.vocab_size.')
  model, tower = storyganc.of_run(config, frozen_configs)
  if model.image_size != config.data.image_size:
    raise ValueError(
      f'config.data.image_size is {config.data.image_size}, and the model draws {model.image_size} pixels; change '
      'either, or model.start and model.channels.'
    )
  each = config.data.batch_size // max(1, config.train.accum)
  if each < 2:
    raise ValueError(f'storyganc compares stories of a batch with each other, and there are {each}; use 2 or more.')
  frozen = [player for player, fields in config.optim.groups.items() if fields.get('frozen')]
  return StoryGANcObjective(model, tower, c, frozen)
