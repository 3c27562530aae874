"""Sources small enough to reason about."""

import numpy as np
from ml_collections import ConfigDict


class Numbered:
  """`count` pictures whose every pixel is their index; `broken` ones are no pictures, `silent` ones have no caption."""

  def __init__(self, count, broken=(), silent=(), size=8):
    self.count, self.broken, self.silent, self.size = count, set(broken), set(silent), size

  def __len__(self):
    return self.count

  def name(self, index):
    return f'picture-{index}'

  def __getitem__(self, index):
    image = b'no picture' if index in self.broken else np.full((self.size, self.size, 3), index, np.uint8)
    return {'image': image, 'caption': '' if index in self.silent else f'number {index}'}


def encode_text(caption, seed):
  """int32[2]: the number in the caption and whether a seed came with it."""
  return np.array([int(caption.split()[-1]), seed is not None], np.int32)


def data_config(**overrides):
  return ConfigDict(dict(source='', path='', source_args={}, image_size=8, augment='', group=1, workers=0) | overrides)
