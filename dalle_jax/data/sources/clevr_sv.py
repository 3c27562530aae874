"""CLEVR-SV: stories of four rendered pictures, each with one object more than the last.

PATH/images/CLEVR_new_000100_1.png  story 100 .. 195, frame 1 .. 4
PATH/CLEVR_dict.npy                 name of such a file -> 75 numbers: 4 objects of 18, then the direction to the right
"""

import functools

import numpy as np

from dalle_jax.data import restricted, stories

TRAIN, TEST = range(100, 172), range(172, 196)  # stories
LENGTH = 4  # frames of a story, the source included
SHAPES = ('cube', 'sphere', 'cylinder')
COLORS = ('gray', 'red', 'blue', 'green', 'brown', 'purple', 'cyan', 'yellow')
MATERIALS = ('rubber', 'metal')
SIZES = ('large', 'small')
PAIRS = tuple(f'{color} {shape}' for shape in SHAPES for color in COLORS)
OBJECT = 18  # numbers of an object: the one-hots above in this order, and x, y, z
# An object's way to the right of the middle runs from -3.9 to 4.0, and its pixel, of 320, is 159 + 33 times that (a fit
# to the pictures: correlation 0.995). Within 1 of the middle are a third of the objects, left and right the others.
MIDDLE = 1.0


class ClevrSv(stories.Listed):
  """Random-access source of `Story` records, whose frames are the bytes of PNG files."""

  def read(self, name: str, rng: np.random.Generator) -> bytes:
    return stories.file_bytes(self.root / 'images', name)


def objects(numbers: np.ndarray) -> np.ndarray:
  """float[75] -> [k, 18], those that are there. Raises ValueError for one-hots that are none."""
  found = numbers[: LENGTH * OBJECT].reshape(LENGTH, OBJECT)
  found = found[found.any(1)]
  for part in np.split(found, (3, 11, 13, 15), axis=1)[:4]:
    if not (np.isin(part, (0, 1)).all() and (part.sum(1) == 1).all()):
      raise ValueError('an attribute of an object is not one of its values')
  return found


def describe(thing: np.ndarray, right: np.ndarray) -> str:
  """'a small green rubber sphere on the left', from float[18] of an object and float[3], the direction to the right."""
  shape, color, material, size, place = np.split(thing, (3, 11, 13, 15))
  words = (SIZES[size.argmax()], COLORS[color.argmax()], MATERIALS[material.argmax()], SHAPES[shape.argmax()])
  way = float(place @ right)
  where = 'on the left' if way < -MIDDLE else 'on the right' if way > MIDDLE else 'in the middle'
  return f'a {" ".join(words)} {where}'


def load(split: str, *, path: str, unit: str = 'story', val_stories: int = 0) -> ClevrSv | stories.Frames:
  """The 72 stories of train or 24 of test; captions tell the object that a frame adds, labels what it shows.

  There is no val in the data set: with `val_stories` n the last n stories of train are val, and not in train. Stories
  with a frame that CLEVR_dict.npy lacks are left out, and `report` counts them. Raises FileNotFoundError or ValueError,
  one line with the file, for what is missing, damaged or not data alone.
  """
  root = stories.folder(path, split, 'the folder of CLEVR-SV, with CLEVR_dict.npy in it')
  if not 0 <= val_stories < len(TRAIN):
    raise ValueError(f'source_args.val_stories is {val_stories}; expected 0 to {len(TRAIN) - 1}.')
  if split == 'val' and not val_stories:
    raise ValueError(
      'CLEVR-SV has no split val; set config.data.source_args.val_stories (6, say) to take it from train, or '
      'config.data.val_split="test".'
    )
  cut = len(TRAIN) - val_stories
  numbers = {'train': TRAIN[:cut], 'val': TRAIN[cut:], 'test': TEST}[split]
  shows = [[f'CLEVR_new_{n:06d}_{k}.png' for k in range(1, LENGTH + 1)] for n in numbers]
  file = root / 'CLEVR_dict.npy'
  table = restricted.load(file, 'a dict: name of a picture -> 75 numbers', dict)
  captions, labels = {}, {}
  size = LENGTH * OBJECT + 3
  found = stories.rows(((n, table[n]) for show in shows for n in show if n in table), file, np.float64, size)
  for name, values in found.items():
    try:
      things = objects(values)
    except ValueError as e:
      raise ValueError(f'{file} is wrong for {name!r} ({e}); expected one-hots of 3, 8, 2 and 2 an object.') from e
    if len(things) == int(name.removesuffix('.png')[-1]):  # frame k shows k objects, the new one last
      captions[name] = describe(things[-1], values[-3:])
      shown = np.einsum('ks,kc->sc', things[:, :3], things[:, 3:11])
      labels[name] = shown.reshape(-1) > 0
  kept, lines = stories.whole(shows, description=captions)
  texts = [[captions[n] for n in shows[i]] for i in kept]
  again = functools.partial(load, split, path=path, val_stories=val_stories)
  source = ClevrSv(root, [shows[i] for i in kept], texts, again, None, labels, PAIRS, lines)
  return stories.of_unit(source, LENGTH, unit)
