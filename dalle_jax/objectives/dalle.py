"""Trains a DALL-E: cross-entropies of the next token of text and of image, weighted (Ramesh et al., 2021, 2.2)."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dalle_jax.functional import corruption, decoding, losses
from dalle_jax.functional.pixels import to_float, to_uint8
from dalle_jax.models import dalle, decode_params, image_tokenizer, variants

DEFAULTS = dict(
  text_weight=0.125,  # of the text loss
  image_weight=0.875,  # of the image loss
  caption_dropout=0.0,  # fraction of captions replaced by padding, for classifier-free guidance in sampling
  token_noise=0.0,  # fraction of input image tokens replaced by random ones; see `DALLEObjective`
  noise_spread=0.0,  # the fraction differs by up to this from image to image
  guidance=1.0,  # guidance scale of the logged samples
)
FROZEN = ('vqgan',)  # the frozen networks that it can use


class DALLEObjective:
  """The player is 'dalle'. Batches: text int32[B, T], and tokens int32[B, I] or image uint8[B, H, W, 3].

  The frozen network 'vqgan' encodes images to tokens inside the step; encoding ahead of training (config.encode) saves
  that. With `token_noise` the model cannot rely on earlier image tokens and has to explain every token by the caption,
  which makes it generate combinations that it was never trained on (as the word dropout of Bowman et al., 2016,
  "Generating Sentences from a Continuous Space", makes a decoder use its latent). Targets are always the true tokens.
  """

  rows_apart = True  # see training.state.Objective

  def __init__(self, model: Any, tokenizer: image_tokenizer.ImageTokenizer, c: ConfigDict):
    self.model, self.tokenizer, self.c = model, tokenizer, c

  def init(self, rng: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[Any, Any]:
    image = jnp.zeros((1, self.model.image_length), jnp.int32)
    return {'dalle': self.model.init(rng, jnp.zeros((1, batch['text'].shape[1]), jnp.int32), image)['params']}, {}

  def adopt(self, params: Any, config: Mapping[str, Any], rng: jax.Array) -> Any:
    """Parameters of another run, with the vocabulary of this one (see `models.dalle.grow_vocabulary`)."""
    return dalle.adopt(self.model, params, config, rng)

  def loss(
    self, params: Any, ctx: Any, batch: Mapping[str, jax.Array]
  ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
    image = self._tokens(ctx, batch)
    text, kept, inputs = self._inputs(ctx, batch['text'], image)
    text_logits, image_logits = self.model.apply({'params': params['dalle']}, text, inputs)
    text_loss = caption_loss(text_logits, text, kept, self.c.caption_dropout)
    image_loss, accuracy = losses.token_loss(image_logits, image)
    loss = self.c.text_weight * text_loss + self.c.image_weight * image_loss
    return loss, ({'text_loss': text_loss, 'image_loss': image_loss, 'accuracy': accuracy}, ctx.mutable)

  def sample(self, params: Any, ctx: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Each image as reconstructed by the VQGAN next to one sampled from its caption: uint8[B, H, 2 * W, 3]."""
    true = self._tokens(ctx, batch)
    keys = jax.random.split(ctx.rng, len(true))
    sampling = decoding.Sampling(guidance=self.c.guidance)
    apply = functools.partial(self.model.apply, {'params': decode_params.by_layer(params['dalle'])})
    samples = decoding.sample(
      apply, batch['text'], true[:, :0], keys, empty=self.model.padding, length=true.shape[1], n=1, sampling=sampling
    )
    both = jnp.stack([true, samples]).reshape(2, len(true), *self.model.grid)
    decode = lambda codes: self.tokenizer.apply({'params': ctx.frozen['vqgan']}, codes, method='decode_codes')
    return jnp.concatenate([to_uint8(decode(codes)) for codes in both], 2)

  def tokens(self, batch: Mapping[str, Any]) -> int:
    return batch['text'].shape[0] * self.model.length

  def flops(self, batch: Mapping[str, Any]) -> float:
    return dalle.flops(self.model, batch['text'].shape[0])

  def _inputs(self, ctx: Any, text: jax.Array, image: jax.Array) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """What the model reads: text int32[B, T] and image int32[B, I], in training with dropped captions and token noise.

    Between them float32[B], 0 for dropped captions, or None if none are: they are left out of the loss of text, as a
    model of text learns nothing from padding.
    """
    kept = None
    if ctx.train and self.c.caption_dropout:
      text, kept = corruption.drop_captions(ctx.rng, text, self.c.caption_dropout, self.model.padding)
    if ctx.train and self.c.token_noise:
      rng = jax.random.fold_in(ctx.rng, 1)
      image = corruption.replace_tokens(rng, image, self.c.token_noise, self.model.image_vocab, self.c.noise_spread)
    return text, kept, image

  def _tokens(self, ctx: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    if 'tokens' in batch:
      return batch['tokens']
    images = to_float(batch['image'])
    codes = self.tokenizer.apply({'params': ctx.frozen['vqgan']}, images, method='encode')
    return codes.reshape(len(images), -1)


def caption_loss(logits: jax.Array, text: jax.Array, kept: jax.Array | None, rate: float) -> jax.Array:
  """Mean cross-entropy in nats of captions int32[R, T], float32[]; dropped ones, where `kept` float32[R] is 0, add 0.

  It is divided by the number of captions that a dropout of `rate` keeps on average, not by the number kept in this
  batch. The loss of a batch is then the mean of the losses of its micro batches, even if one of them keeps no caption.
  Captions of which no token is predicted, as those of one token without a start in front, have a loss of 0.
  """
  if not logits.shape[1]:
    return jnp.zeros(())
  loss, _ = losses.token_loss(logits, text[:, -logits.shape[1] :], kept)
  if kept is None:
    return loss
  return loss * kept.mean() / max(1 - rate, 1e-6)  # at a rate of 1 no caption is kept, and the loss is 0


def from_config(config: ConfigDict, frozen_configs: Mapping[str, Any]) -> DALLEObjective:
  """The objective of `config.model` and `config.loss` (`DEFAULTS` are its fields).

  The sizes of the text come from the tokenizer, those of the image from the frozen run 'vqgan'. Raises ValueError for
  an unknown field, without captions, or without a VQGAN.
  """
  c = ConfigDict({**DEFAULTS, **variants.fields('config.loss', DEFAULTS, config.loss)})
  variants.check_ranges(
    'config.loss', c, ['caption_dropout', 'token_noise', 'noise_spread'], ['text_weight', 'image_weight']
  )
  tokenizer, sizes = text_and_image(config, frozen_configs, 'dalle')
  return DALLEObjective(dalle.build(**{**config.model, **sizes}), tokenizer, c)


def text_and_image(
  config: ConfigDict, frozen_configs: Mapping[str, Any], name: str
) -> tuple[image_tokenizer.ImageTokenizer, dict[str, Any]]:
  """The frozen image tokenizer, and the fields of a DALL-E that follow from it and from the tokenizer of captions.

  Raises ValueError, which names the objective `name`, if either is missing, and if `config.model` has other sizes.
  """
  if 'vqgan' not in frozen_configs:
    raise ValueError(f'the objective {name} needs an image tokenizer; set config.frozen.vqgan to the run of a VQGAN.')
  if not config.tokenizer.vocab_size:
    raise ValueError(f'the objective {name} needs captions; set config.tokenizer.vocab_size.')
  tokenizer = image_tokenizer.of_run(frozen_configs['vqgan'])
  return tokenizer, dalle.sizes(config, tokenizer)
