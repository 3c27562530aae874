"""The Inception-v3 of published FID scores ("Rethinking the Inception Architecture", Szegedy et al., 2016).

That network, of 2015, differs from the paper in places, and the differences are reproduced, because FIDs are comparable
only for the same features: average pooling excludes the padding, and the last block pools by the maximum. Parameter
names follow the public implementation, so that its weights can be imported.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.layers.basic import BatchNorm, Conv
from dalle_jax.models import variants

VARIANTS = {'test': dict(shrink=16), 'fid': dict()}
SIDE = 299  # pixels to which images are resized


class Part(NamedTuple):
  """Parallel convolutions of one input, one for each kernel, whose outputs are concatenated."""

  features: int
  kernels: Sequence[int | tuple[int, int]]
  stride: int


def conv(features: int, *kernels: int | tuple[int, int], stride: int = 1) -> Part:
  return Part(features, kernels or (1,), stride)


Branches = Mapping[str, Sequence[Part]]  # the convolutions of each branch, in order


def _a(pool: int) -> Branches:
  return {
    'branch1x1': [conv(64)],
    'branch5x5': [conv(48), conv(64, 5)],
    'branch3x3dbl': [conv(64), conv(96, 3), conv(96, 3)],
    'branch_pool': [conv(pool)],
  }


def _c(width: int) -> Branches:
  across, down = conv(width, (1, 7)), conv(width, (7, 1))
  return {
    'branch1x1': [conv(192)],
    'branch7x7': [conv(width), across, conv(192, (7, 1))],
    'branch7x7dbl': [conv(width), down, across, down, conv(192, (1, 7))],
    'branch_pool': [conv(192)],
  }


_B = {
  'branch3x3': [conv(384, 3, stride=2)],
  'branch3x3dbl': [conv(64), conv(96, 3), conv(96, 3, stride=2)],
  'halved': [],
}
_D = {
  'branch3x3': [conv(192), conv(320, 3, stride=2)],
  'branch7x7x3': [conv(192), conv(192, (1, 7)), conv(192, (7, 1)), conv(192, 3, stride=2)],
  'halved': [],
}
_E = {
  'branch1x1': [conv(320)],
  'branch3x3': [conv(384), conv(384, (1, 3), (3, 1))],
  'branch3x3dbl': [conv(448), conv(384, 3), conv(384, (1, 3), (3, 1))],
  'branch_pool': [conv(192)],
}
BLOCKS: Mapping[str, Branches] = {
  'Mixed_5b': _a(32), 'Mixed_5c': _a(64), 'Mixed_5d': _a(64),  # 35 x 35
  'Mixed_6a': _B, 'Mixed_6b': _c(128), 'Mixed_6c': _c(160), 'Mixed_6d': _c(160), 'Mixed_6e': _c(192),  # 17 x 17
  'Mixed_7a': _D, 'Mixed_7b': _E, 'Mixed_7c': _E,  # 8 x 8
}  # fmt: skip
LARGEST = 'Mixed_7c'  # the block that pools by the maximum


class ConvNorm(nn.Module):
  """Convolution, batch normalisation by stored statistics, ReLU."""

  features: int
  kernel_size: int | tuple[int, int]
  stride: int = 1
  padding: str = 'SAME'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = Conv(self.features, self.kernel_size, self.stride, self.padding, use_bias=False, name='conv')(x)
    return jax.nn.relu(BatchNorm(1e-3, name='bn')(x))


class Mixed(nn.Module):
  """The concatenated branches of one block: `[B, h, w, C] -> [B, h', w', C']`. Pools are 3 x 3."""

  branches: Branches
  shrink: int
  largest: bool  # whether the pool takes the maximum instead of the mean

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    outputs = []
    for branch, parts in self.branches.items():
      y = x
      if branch == 'halved':
        y = nn.max_pool(x, (3, 3), (2, 2))
      elif branch == 'branch_pool':
        mean = lambda x: nn.avg_pool(x, (3, 3), padding='SAME', count_include_pad=False)
        y = nn.max_pool(x, (3, 3), padding='SAME') if self.largest else mean(x)
      for i, (features, kernels, stride) in enumerate(parts, 1):
        stem = f'{branch}_{i}' if len(parts) > 1 else branch
        names = [stem] if len(kernels) == 1 else [f'{stem}{letter}' for letter in 'ab']
        padding = 'SAME' if stride == 1 else 'VALID'
        width = features // self.shrink
        parallel = [ConvNorm(width, k, stride, padding, name=n)(y) for k, n in zip(kernels, names, strict=True)]
        y = jnp.concatenate(parallel, -1)
      outputs.append(y)
    return jnp.concatenate(outputs, -1)


class Inception(nn.Module):
  """Images float32[B, H, W, 3] in [-1, 1], of any size -> non-negative features float32[B, 2048 / shrink].

  `shrink` divides the width of every layer.
  """

  shrink: int = 1

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    # No antialiasing, even when shrinking, as in the published code.
    x = jax.image.resize(images, (len(images), SIDE, SIDE, 3), 'linear', antialias=False)
    stem = lambda name, features, *options: ConvNorm(features // self.shrink, *options, name=name)
    x = stem('Conv2d_1a_3x3', 32, 3, 2, 'VALID')(x)
    x = stem('Conv2d_2a_3x3', 32, 3, 1, 'VALID')(x)
    x = nn.max_pool(stem('Conv2d_2b_3x3', 64, 3)(x), (3, 3), (2, 2))
    x = stem('Conv2d_3b_1x1', 80, 1)(x)
    x = nn.max_pool(stem('Conv2d_4a_3x3', 192, 3, 1, 'VALID')(x), (3, 3), (2, 2))
    for name, branches in BLOCKS.items():
      x = Mixed(branches, self.shrink, name == LARGEST, name=name)(x)
    return x.mean((1, 2))


def build(variant: str, **overrides) -> Inception:
  """The network of `VARIANTS[variant]` with fields overridden. Raises ValueError for an unknown variant or field."""
  return variants.build(Inception, VARIANTS, variant, overrides)


def of_run(config: Mapping[str, Any]) -> Inception:
  """The network of a run, from its config."""
  return build(**config['model'])
