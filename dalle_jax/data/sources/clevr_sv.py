"""CLEVR-SV: stories of four rendered images, each with one object more than the one before.

PATH/images/CLEVR_new_000100_1.png  story 100 .. 195, frame 1 .. 4
PATH/CLEVR_dict.npy                 name of such a file -> 75 numbers: 18 for each of 4 objects, then the direction that
                                    points to the right in the image, 3
"""

import functools

import numpy as np

from dalle_jax.data import restricted, stories

TRAIN, TEST = range(100, 172), range(172, 196)  # stories
LENGTH = 4  # frames of a story, including the source
SHAPES = ('cube', 'sphere', 'cylinder')
COLORS = ('gray', 'red', 'blue', 'green', 'brown', 'purple', 'cyan', 'yellow')
MATERIALS = ('rubber', 'metal')
SIZES = ('large', 'small')
PAIRS = tuple(f'{color} {shape}' for shape in SHAPES for color in COLORS)
OBJECT = 18  # numbers per object: one-hot shape, color, material and size, then x, y, z
# How far objects are to the right of the centre runs from -3.9 to 4.0. Their pixel columns, of 320, are 159 + 33 times
# that (fitted to the images, with a correlation of 0.995). A third of the objects are within 1 of the centre.
MIDDLE = 1.0


class ClevrSv(stories.Listed):
  """Random-access source of `Story` records, whose frames are the bytes of PNG files."""

  def read(self, name: str, rng: np.random.Generator) -> bytes:
    return stories.file_bytes(self.root / 'images', name)


def objects(numbers: np.ndarray) -> np.ndarray:
  """float[75] -> [k, 18], the objects that are present. Raises ValueError for an attribute that is not one-hot."""
  found = numbers[: LENGTH * OBJECT].reshape(LENGTH, OBJECT)
  found = found[found.any(1)]
  for part in np.split(found, (3, 11, 13, 15), axis=1)[:4]:
    if not (np.isin(part, (0, 1)).all() and (part.sum(1) == 1).all()):
      raise ValueError('an attribute of an object is not one-hot')
  return found


def describe(thing: np.ndarray, right: np.ndarray) -> str:
  """Describes an object, e.g. 'a small green rubber sphere on the left', given float[18] and the right as float[3]."""
  shape, color, material, size, place = np.split(thing, (3, 11, 13, 15))
  words = (SIZES[size.argmax()], COLORS[color.argmax()], MATERIALS[material.argmax()], SHAPES[shape.argmax()])
  x = float(place @ right)
  where = 'on the left' if x < -MIDDLE else 'on the right' if x > MIDDLE else 'in the middle'
  return f'a {" ".join(words)} {where}'


def load(split: str, *, path: str, unit: str = 'story', val_stories: int = 0) -> ClevrSv | stories.Frames:
  """The 72 stories of train or the 24 of test. Captions describe the object that a frame adds, labels all it shows.

  The data set has no val split: with `val_stories` n, the last n stories of train become val. Stories with a frame that
  is not in CLEVR_dict.npy are left out, and `report` counts them. Raises FileNotFoundError or ValueError, one line that
  names the file, for a file that is missing, damaged or holds anything but data.
  """
  root = stories.folder(path, split, 'the folder of CLEVR-SV, with CLEVR_dict.npy in it')
  if not 0 <= val_stories < len(TRAIN):
    raise ValueError(f'source_args.val_stories is {val_stories}; expected 0 to {len(TRAIN) - 1}.')
  if split == 'val' and not val_stories:
    raise ValueError(
      'CLEVR-SV has no split val; set config.data.source_args.val_stories (e.g. 6) to take it from train, or '
      'config.data.val_split="test".'
    )
  cut = len(TRAIN) - val_stories
  numbers = {'train': TRAIN[:cut], 'val': TRAIN[cut:], 'test': TEST}[split]
  frame_names = [[f'CLEVR_new_{n:06d}_{k}.png' for k in range(1, LENGTH + 1)] for n in numbers]
  file = root / 'CLEVR_dict.npy'
  table = restricted.load(file, 'a dict: name of an image -> 75 numbers', dict)
  captions, labels = {}, {}
  size = LENGTH * OBJECT + 3
  found = stories.rows(((n, table[n]) for story in frame_names for n in story if n in table), file, np.float64, size)
  for name, values in found.items():
    try:
      things = objects(values)
    except ValueError as e:
      raise ValueError(f'{file} is wrong for {name!r} ({e}); expected one-hots of 3, 8, 2 and 2 per object.') from e
    if len(things) == int(name.removesuffix('.png')[-1]):  # frame k shows k objects, the new one last
      captions[name] = describe(things[-1], values[-3:])
      shown = np.einsum('ks,kc->sc', things[:, :3], things[:, 3:11])
      labels[name] = shown.reshape(-1) > 0
  kept, lines = stories.complete(frame_names, description=captions)
  texts = [[captions[n] for n in frame_names[i]] for i in kept]
  reload = functools.partial(load, split, path=path, val_stories=val_stories)
  source = ClevrSv(root, [frame_names[i] for i in kept], texts, reload, None, labels, PAIRS, lines)
  return stories.of_unit(source, LENGTH, unit)
