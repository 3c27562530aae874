"""Trains a StoryDALL-E to predict the tokens of each frame, given its caption, the other captions and the source frame.

Maharana et al., 2022, section 3. Full fine-tuning trains both players; prompt tuning keeps the player 'dalle' frozen
(`config.optim.groups.dalle.frozen=True`).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dalle_jax.functional import corruption, decoding, losses
from dalle_jax.functional.pixels import boards, to_float, to_uint8
from dalle_jax.models import clip, dalle, decode_params, image_tokenizer, story_dalle, variants
from dalle_jax.objectives.dalle import caption_loss, text_and_image

DEFAULTS = dict(
  text_weight=0.5,  # of the text loss
  image_weight=0.5,  # of the image loss
  caption_dropout=0.0,  # this and the next two as in the objective dalle
  token_noise=0.0,
  noise_spread=0.0,
  first=1.0,  # weight of the first image token, relative to the others, which only have to continue what it decides
  guidance=1.0,  # guidance scale of the logged samples
)
FROZEN = ('vqgan', 'clip')  # the frozen networks that it can use


class StoryDALLEObjective:
  """The players are 'dalle' and 'story'. Batches of B stories of T frames after the source, F = T + 1:

  text int32[B, T, N]; tokens int32[B, F, I] or image uint8[B, F, H, W, 3]; with sentences='clip' clip_text
  int32[B, T, M], with 'data' vectors float32[B, T, S].
  """

  rows_apart = True  # see training.state.Objective

  def __init__(
    self,
    model: story_dalle.StoryDALLE,
    tokenizer: image_tokenizer.ImageTokenizer,
    tower: clip.CLIP | None,
    c: ConfigDict,
  ):
    self.model, self.tokenizer, self.tower, self.c = model, tokenizer, tower, c

  def init(self, rng: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[Any, Any]:
    frame = jnp.zeros((1, 1, self.model.dalle.image_length), jnp.int32)
    text = jnp.zeros((1, 1, batch['text'].shape[-1]), jnp.int32)
    sentences = jnp.zeros((1, 1, self.model.sentence_dim)) if self.model.sentence_dim else None
    return self.model.init(rng, text, frame, frame[:, 0], sentences)['params'], {}

  def adopt(self, params: Any, config: Mapping[str, Any], rng: jax.Array) -> Any:
    """Parameters of another run, with the vocabulary of this one (see `models.dalle.grow_vocabulary`)."""
    return dalle.adopt(self.model.dalle, params, config, rng)

  def loss(
    self, params: Any, ctx: Any, batch: Mapping[str, jax.Array]
  ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
    text, tokens, model = batch['text'], self._tokens(ctx, batch), self.model
    source, image = tokens[:, 0], tokens[:, 1:]
    input_text, input_image, kept, rng = text, image, None, None
    if ctx.train:
      drop, noise, rng = jax.random.split(ctx.rng, 3)
      if self.c.caption_dropout:
        input_text, kept = corruption.drop_captions(drop, text, self.c.caption_dropout, model.dalle.padding)
        kept = kept.ravel()
      if self.c.token_noise:
        rate, spread = self.c.token_noise, self.c.noise_spread
        input_image = corruption.replace_tokens(noise, image, rate, model.dalle.image_vocab, spread)
    sentences = self._sentences(ctx, batch)
    text_logits, image_logits = model.apply({'params': params}, text, input_image, source, sentences, input_text, rng)
    rows = lambda x: x.reshape(-1, x.shape[-1])
    text_loss = caption_loss(text_logits, rows(text), kept, self.c.caption_dropout)
    first = self.c.first if ctx.train else 1.0
    image_loss, accuracy = losses.token_loss(image_logits, rows(image), first=first)
    loss = self.c.text_weight * text_loss + self.c.image_weight * image_loss
    return loss, ({'text_loss': text_loss, 'image_loss': image_loss, 'accuracy': accuracy}, ctx.mutable)

  def sample(self, params: Any, ctx: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Reconstructed frames of each story above sampled ones, with the source first: uint8[B, 2 H, F W, 3]."""
    tokens, text = self._tokens(ctx, batch), batch['text']
    b, t, n = text.shape
    params = {**params, 'dalle': decode_params.by_layer(params['dalle'])}
    apply = story_dalle.sampler(self.model, params, text, tokens[:, 0], self._sentences(ctx, batch))
    samples = decoding.sample(
      apply,
      text.reshape(b * t, n),
      jnp.zeros((b * t, 0), jnp.int32),
      jax.random.split(ctx.rng, b * t),
      empty=self.model.dalle.padding,
      length=self.model.dalle.image_length,
      n=1,
      sampling=decoding.Sampling(guidance=self.c.guidance),
    )
    samples = jnp.concatenate([tokens[:, :1], samples.reshape(b, t, -1)], 1)
    both = jnp.stack([tokens, samples], 1).reshape(-1, *self.model.dalle.grid)
    images = to_uint8(self.tokenizer.apply({'params': ctx.frozen['vqgan']}, both, method='decode_codes'))
    images = images.reshape(b, 2, t + 1, *images.shape[1:])
    return boards(images[:, 0], images[:, 1])

  def tokens(self, batch: Mapping[str, Any]) -> int:
    b, t, _ = batch['text'].shape
    return b * t * self.model.dalle.length

  def flops(self, batch: Mapping[str, Any]) -> float:
    """Model FLOPs of an update, not counting the cross-attention."""
    b, t, _ = batch['text'].shape
    return dalle.flops(self.model.dalle, b * t)

  def _sentences(self, ctx: Any, batch: Mapping[str, jax.Array]) -> jax.Array | None:
    if self.model.sentences == 'own':
      return None
    if self.model.sentences == 'data':
      return batch['vectors']
    return story_dalle.embed_sentences(self.tower, ctx.frozen['clip'], batch['clip_text'])

  def _tokens(self, ctx: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    if 'tokens' in batch:
      return batch['tokens']
    images = batch['image']
    flat = to_float(images.reshape(-1, *images.shape[2:]))
    codes = self.tokenizer.apply({'params': ctx.frozen['vqgan']}, flat, method='encode')
    return codes.reshape(*images.shape[:2], -1)


def from_config(config: ConfigDict, frozen_configs: Mapping[str, Any]) -> StoryDALLEObjective:
  """The objective of `config.model` and `config.loss` (`DEFAULTS` are its fields); sizes as in the objective dalle.

  Raises ValueError for an unknown field, without captions or a VQGAN, or without the source of sentence embeddings.
  """
  c = ConfigDict({**DEFAULTS, **variants.fields('config.loss', DEFAULTS, config.loss)})
  variants.check_ranges(
    'config.loss', c, ['caption_dropout', 'token_noise', 'noise_spread'], ['text_weight', 'image_weight', 'first']
  )
  tokenizer, sizes = text_and_image(config, frozen_configs, 'story_dalle')
  tower, source = None, config.model.get('sentences', 'own')
  if source == 'clip':
    if 'clip' not in frozen_configs:
      raise ValueError('model.sentences "clip" needs a text tower; set config.frozen.clip to the run of a CLIP.')
    tower = clip.of_run(frozen_configs['clip'])
    sizes['sentence_dim'] = tower.embed_dim
  elif source == 'data' and not config.model.get('sentence_dim', 0):
    raise ValueError('model.sentences "data" needs config.model.sentence_dim, the length of the vectors in the data.')
  return StoryDALLEObjective(story_dalle.build(**{**config.model, **sizes}), tokenizer, tower, c)
