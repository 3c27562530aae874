"""The diffusion upsamplers of unCLIP: a large image from a small one (Ramesh et al., 2022, section 2.1)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.functional import diffusion
from dalle_jax.functional.diffusion import Diffusion
from dalle_jax.models import variants
from dalle_jax.models.unet import UNet

VARIANTS = {
  'test': dict(image_size=32, low_size=16, channels=(8, 16), num_res_blocks=1, norm_groups=4),
  'quickstart': dict(image_size=72, low_size=36, channels=(32, 64), num_res_blocks=1, norm_groups=8,
                     predicts='velocity'),
  'karlo': dict(image_size=256, low_size=64, channels=(320, 640, 960, 1280), num_res_blocks=3),
  'paper': dict(image_size=256, low_size=64, channels=(320, 640, 960, 1280), num_res_blocks=3, shift='scale',
                remat='full', dtype='bfloat16'),
  'paper_1024': dict(image_size=1024, low_size=256, channels=(192, 192, 384, 384, 768, 768), num_res_blocks=2,
                     shift='scale', schedule='linear', remat='full', dtype='bfloat16'),
}  # fmt: skip


class Upsampler(nn.Module):
  """A U-Net without attention, conditioned on the small image only, not on the caption.

  The small image is resized and concatenated to the noisy one.

  Attributes:
    image_size, low_size: sides of the large and the small images in pixels.
    channels, num_res_blocks, patch, shift, norm_groups, remat: see `models.unet.UNet`.
    steps, schedule, predicts: see `functional.diffusion.Diffusion`.
  """

  image_size: int
  low_size: int
  channels: tuple[int, ...]
  num_res_blocks: int
  patch: int = 1
  shift: str = 'add'
  norm_groups: int = 32
  steps: int = 1000
  schedule: str = 'cosine'
  predicts: str = 'noise'
  remat: str = 'none'
  dtype: jnp.dtype = jnp.float32

  @property
  def diffusion(self) -> Diffusion:
    return Diffusion(self.steps, self.schedule, self.predicts, 'small', 1.0)

  @nn.compact
  def __call__(self, noisy: jax.Array, t: jax.Array, low: jax.Array) -> jax.Array:
    """The U-Net's prediction, float32[B, H, W, 3], for noisy large images at timesteps t int32[B].

    Args:
      noisy: float32[B, H, W, 3]; may be crops of any size that the levels of the U-Net can halve, else ValueError.
      t: the timesteps.
      low: the small images float32[B, h, w, 3] in [-1, 1], or the same crops of them.
    """
    wide = jax.image.resize(low, noisy.shape, 'cubic')
    unet = UNet(
      3 * self.diffusion.outputs, self.channels, self.num_res_blocks, patch=self.patch, shift=self.shift,
      norm_groups=self.norm_groups, remat=self.remat, dtype=self.dtype, name='unet',
    )  # fmt: skip
    return unet(jnp.concatenate([noisy, wide], -1), t)


def sample(
  model: Upsampler,
  apply: Callable[..., jax.Array],
  low: jax.Array,
  keys: jax.Array,
  steps: Sequence[int],
  last: Callable[..., jax.Array] | None = None,
) -> jax.Array:
  """Sample large images float32[B, H, W, 3] in [-1, 1] from small ones `low`, starting at noise by keys[B].

  `apply` is the model's `apply` bound to its parameters; `last` is bound to those of the last step, if it has its own
  (Karlo). `steps` are those of `Diffusion.timesteps`.
  """
  d, size = model.diffusion, model.image_size
  predict = lambda x, t: apply(x, t, low)
  predict_last = None if last is None else lambda x, t: last(x, t, low)
  x = diffusion.initial_noise(keys, (size, size, 3))
  return jnp.clip(diffusion.sample(d, predict, x, keys, steps, predict_last), -1, 1)


def build(variant: str, **overrides) -> Upsampler:
  """The network of `VARIANTS[variant]` with fields overridden. Raises ValueError for an unknown variant or field."""
  return variants.build(Upsampler, VARIANTS, variant, overrides)


def of_run(config: Mapping[str, Any]) -> Upsampler:
  """The network of a run, from its config."""
  return build(**config['model'])
