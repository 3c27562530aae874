"""The diffusion decoder of unCLIP: images from CLIP image embeddings and captions (Ramesh et al., 2022, section 2.1).

Axis legend: B rows, N text tokens, E embed_dim of the CLIP.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.functional import diffusion
from dalle_jax.functional.diffusion import Diffusion
from dalle_jax.layers.basic import Dense, LayerNorm, param
from dalle_jax.models import clip_reader, variants
from dalle_jax.models.clip_reader import Caption, ClipReader
from dalle_jax.models.unet import UNet

VARIANTS = {
  'test': dict(image_size=16, channels=(8, 16), num_res_blocks=1, attention=(1,), head_dim=8, norm_groups=4,
               context_dim=16),
  'quickstart': dict(image_size=36, patch=3, channels=(64, 128), num_res_blocks=1, attention=(0, 1), head_dim=32,
                     norm_groups=8, context_dim=96, predicts='velocity', shift=0.4, positions=True),
  'karlo': dict(channels=(320, 640, 960, 1280), num_res_blocks=3, attention=(1, 2, 3), context_dim=1536),
  'paper': dict(channels=(512, 1024, 1536, 2048), num_res_blocks=3, attention=(1, 2, 3), context_dim=2048,
                remat='full', dtype='bfloat16'),
}  # fmt: skip


class UnCLIP(nn.Module):
  """A U-Net conditioned on CLIP's image embedding and on the caption.

  Projections of the image and the text embedding are added to the timestep embedding. The attention blocks also attend
  to a few tokens projected from the image embedding, and to the hidden states of the caption.

  Attributes:
    image_size: side of the images in pixels.
    extra_tokens: number of tokens projected from the image embedding.
    context_dim: width of the tokens that the attention blocks attend to.
    channels, num_res_blocks, attention, head_dim, patch, positions, norm_groups, remat: see `models.unet.UNet`.
    embed_dim, text_width, text_length, raw, steps, schedule: as in `models.prior.Prior`.
    predicts, shift: see `functional.diffusion.Diffusion`.
  """

  channels: tuple[int, ...]
  num_res_blocks: int
  attention: tuple[int, ...]
  context_dim: int
  image_size: int = 64
  extra_tokens: int = 4
  head_dim: int = 64
  patch: int = 1
  positions: bool = False
  norm_groups: int = 32
  embed_dim: int = 512
  text_width: int = 512
  text_length: int = 77
  raw: bool = False
  steps: int = 1000
  schedule: str = 'cosine'
  predicts: str = 'noise'
  shift: float = 1.0
  remat: str = 'none'
  dtype: jnp.dtype = jnp.float32

  @property
  def diffusion(self) -> Diffusion:
    return Diffusion(self.steps, self.schedule, self.predicts, 'learned', 1.0, self.shift)

  def setup(self):
    linear = lambda features, axes=(None, 'embed'): Dense(features, axes, dtype=self.dtype)
    self.image_time, self.caption_time = linear(4 * self.channels[0]), linear(4 * self.channels[0])
    self.image_tokens, self.text_in = linear(self.extra_tokens * self.context_dim), linear(self.context_dim)
    self.text_norm = LayerNorm(dtype=self.dtype)
    self.no_image = param(self, 'no_image', nn.initializers.zeros, (None,), (self.embed_dim,))
    self.unet = UNet(
      3 * self.diffusion.outputs, self.channels, self.num_res_blocks, self.attention, self.head_dim,
      self.patch, self.positions, 'scale', self.norm_groups, remat=self.remat, dtype=self.dtype,
    )  # fmt: skip

  def __call__(
    self, noisy: jax.Array, t: jax.Array, embed: jax.Array, caption: Caption, known: jax.Array | None = None
  ) -> jax.Array:
    """The U-Net's prediction for noisy images at timesteps t, float32[B, H, W, 6]: eps or v, and the variance.

    Args:
      noisy: float32[B, H, W, 3].
      t: int32[B].
      embed: CLIP image embeddings, float32[B, E].
      caption: the encoded captions.
      known: bool[B], the rows whose `embed` is used; others get a learnt null embedding (for classifier-free guidance).
        By default all.

    Raises ValueError for images of another size, or for fields of the U-Net that do not fit together.
    """
    size = self.image_size
    if noisy.shape[1:] != (size, size, 3):
      raise ValueError(f'unCLIP takes images [B, {size}, {size}, 3], not {list(noisy.shape)}; resize them.')
    context, extra, mask = self.conditions(embed, caption, known)
    return self.unet(noisy, t, extra, context, mask)

  def conditions(
    self, embed: jax.Array, caption: Caption, known: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The conditioning of the U-Net.

    Returns:
      The tokens to attend to, [B, extra_tokens + N, context_dim]; the vector that is added to the timestep embedding,
      [B, 4 * channels[0]]; and the mask of the tokens, bool[B, extra_tokens + N].
    """
    embed = embed if known is None else jnp.where(known[:, None], embed, self.no_image)
    added = self.image_tokens(embed).reshape(len(embed), self.extra_tokens, self.context_dim)
    tokens = jnp.concatenate([added, self.text_norm(self.text_in(caption.hidden))], 1)
    mask = jnp.pad(caption.mask, ((0, 0), (self.extra_tokens, 0)), constant_values=True)
    return tokens, self.image_time(embed) + self.caption_time(caption.embed), mask


def sample(
  model: UnCLIP,
  apply: Callable[..., jax.Array],
  embed: jax.Array,
  caption: Caption,
  empty: Caption,
  keys: jax.Array,
  steps: Sequence[int],
  guidance: float | jax.Array | None = None,
  eta: float | jax.Array | None = None,
) -> jax.Array:
  """Sample images float32[B, H, W, 3] in [-1, 1] for image embeddings [B, E] and captions, from noise by keys[B].

  `apply` is the model's `apply` bound to its parameters; `steps` are those of `Diffusion.timesteps`. With
  `guidance`, the scale s of classifier-free guidance, the prediction is uncond + s (cond - uncond), where uncond has
  the null embedding and `empty`, the caption '', in place of the caption. For `eta` see `functional.diffusion.sample`.
  """
  d, b = model.diffusion, len(embed)
  predict = lambda x, t: apply(x, t, embed, caption)
  if guidance is not None:
    twice, known = jnp.concatenate([embed, embed]), jnp.arange(2 * b) < b
    both = jax.tree.map(lambda *rows: jnp.concatenate(rows), caption, empty)
    predict = diffusion.guided(d, lambda x, t: apply(x, t, twice, both, known), guidance)
  noise = diffusion.initial_noise(keys, (model.image_size, model.image_size, 3))
  return jnp.clip(diffusion.sample(d, predict, noise, keys, steps, eta=eta), -1, 1)


def build(variant: str, **overrides) -> UnCLIP:
  """The network of `VARIANTS[variant]` with fields overridden. Raises ValueError for an unknown variant or field."""
  return variants.build(UnCLIP, VARIANTS, variant, overrides)


def of_run(config: Mapping[str, Any], clip_config: Mapping[str, Any]) -> tuple[UnCLIP, ClipReader]:
  """The network of a run, from its config, and the reader of its CLIP, from that of the CLIP."""
  return clip_reader.of_run(build, config, clip_config)
