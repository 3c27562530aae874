"""The oracle of the procedural world: reads a picture back into a scene and says which attributes are right.

Each cell is compared with the rendering of every possible content (nearest in mean squared error); a cell that is near
none of them is unreadable. So the oracle accepts what `render` draws and forgives what a tokenizer blurs, but not a
ring for a circle or a picture of nothing.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dalle_jax.data.sources import shapes
from dalle_jax.data.sources.shapes import Object, Scene
from dalle_jax.data.sources.story_shapes import Moment
from dalle_jax.data.stories import Frames

ATTRIBUTES = ('background', 'count', 'position', 'shape', 'color', 'size')
COLUMNS = ('caption', 'hero', 'setting', 'size')  # of the frames of stories
_READABLE = 0.16  # RMS error, of 1, up to which a cell is read as its nearest content; uniform noise is at 0.3
_MAX_SIZE = 96  # larger pictures are averaged down first: the templates of 9 x 774 cells must fit in memory
_MIN_SIZE = 32  # but not below what is told apart surely


class Oracle:
  """Reads square pictures of one size.

  Args:
    image_size: side of the pictures in pixels; above 96 they are averaged down by an integer that divides it.
    accessories: whether objects may wear any; templates are four times as many.
  """

  def __init__(self, image_size: int, accessories: bool = False):
    self.image_size = image_size
    least, most = max(1, -(-image_size // _MAX_SIZE)), max(1, image_size // _MIN_SIZE)
    self._reduce = next((f for f in range(least, most + 1) if image_size % f == 0), 0)
    if not self._reduce:
      raise ValueError(
        f'oracle: image_size {image_size} has no divisor from {least} to {most}; use a multiple of {least}'
      )
    worn = ('', *shapes.ACCESSORIES) if accessories else ('',)
    self._contents = [None, *((*look, accessory) for look in shapes.all_looks() for accessory in worn)]

  @functools.cached_property
  def _templates(self) -> list[tuple[slice, slice, np.ndarray, np.ndarray]]:
    """A row a cell: rows, columns, templates float32[backgrounds * contents, pixels], their squared norms."""
    side, table = self.image_size // self._reduce, []
    for position in range(shapes.GRID**2):
      rows, cols, _ = shapes.coverage('circle', 'large', position, side)
      pictures = []
      for background, content in itertools.product(shapes.BACKGROUNDS, self._contents):
        objects = () if content is None else (Object(position, *content),)
        full = self._shrink(shapes.render(Scene(background, objects), self.image_size)[None])
        pictures.append(full[0, rows, cols].ravel())
      stack = np.stack(pictures)
      table.append((rows, cols, stack, np.square(stack).sum(1)))
    return table

  def _shrink(self, images: np.ndarray) -> np.ndarray:
    n, f, side = len(images), self._reduce, self.image_size // self._reduce
    return images.astype(np.float32).reshape(n, side, f, side, f, 3).mean((2, 4)) / 255

  def read(self, images: np.ndarray) -> list[Scene | None]:
    """Reads uint8[N, S, S, 3]; None where a cell is unreadable."""
    expected = (self.image_size, self.image_size, 3)
    if images.ndim != 4 or images.shape[1:] != expected or images.dtype != np.uint8:
      raise ValueError(f'oracle: expected uint8 pictures [N, {expected}], got {images.dtype}{list(images.shape)}')
    x = self._shrink(images)
    backgrounds, kinds = list(shapes.BACKGROUNDS), len(self._contents)
    best, error = [], []
    for rows, cols, templates, norms in self._templates:
      cell = x[:, rows, cols].reshape(len(x), -1)
      distance = np.square(cell).sum(1)[:, None] - 2 * cell @ templates.T + norms
      distance = distance.reshape(len(x), len(backgrounds), kinds) / cell.shape[1]  # mean squared error
      best.append(distance.argmin(2))
      error.append(distance.min(2))
    scenes: list[Scene | None] = []
    # (N, backgrounds, cells)
    for contents, errors in zip(np.stack(best, 2), np.stack(error, 2), strict=True):
      b = int(errors.sum(1).argmin())
      objects = tuple(Object(p, *self._contents[c]) for p, c in enumerate(contents[b]) if c)
      readable = bool((errors[b] < _READABLE**2).all())
      scenes.append(Scene(backgrounds[b], objects) if readable else None)
    return scenes

  def score(self, images: np.ndarray, scenes: Sequence[Scene]) -> dict[str, np.ndarray]:
    """What is right in each picture, attribute by attribute: `{attribute or 'all': bool[N]}`.

    Objects are paired so that most attributes agree, in scenes of more than three those of the same cell; an attribute
    is right when every object has it.
    """
    if len(images) != len(scenes):
      raise ValueError(f'oracle: {len(images)} pictures but {len(scenes)} scenes; expected one scene a picture')
    rows = [_compare(seen, true) for seen, true in zip(self.read(images), scenes, strict=True)]
    result = {name: np.array([row[name] for row in rows], bool) for name in ATTRIBUTES}
    return result | {'all': np.logical_and.reduce([result[name] for name in ATTRIBUTES])}


def _compare(seen: Scene | None, true: Scene) -> dict[str, bool]:
  if seen is None or not seen.objects:  # a picture of nothing
    return dict.fromkeys(ATTRIBUTES, False)
  same_count = len(seen.objects) == len(true.objects)
  if len(seen.objects) < len(true.objects):
    pairings: list[tuple[Object, ...]] = []
  elif len(true.objects) > 3 and same_count:  # a crowded scene, from which image tokenizers learn
    pairings = [_by_cell(seen.objects, true.objects)]
  elif len(seen.objects) > 3:  # too many to pair: the picture is no scene of this world
    pairings = []
  else:
    pairings = list(itertools.permutations(seen.objects, len(true.objects)))
  names = ('position', 'shape', 'color', 'size')
  options = [
    {n: all(getattr(a, n) == getattr(b, n) for a, b in zip(p, true.objects, strict=True)) for n in names}
    for p in pairings
  ]
  best = max(options, key=lambda o: sum(o.values()), default=dict.fromkeys(names, False))
  return {'background': seen.background == true.background, 'count': same_count, **best}


def _by_cell(seen: Sequence[Object], true: Sequence[Object]) -> tuple[Object, ...]:
  """For each true object the one seen in its cell, for those of empty cells, in raster order, what is left."""
  at = {o.position: o for o in seen}
  left = iter([o for o in seen if o.position not in {t.position for t in true}])
  return tuple(at[t.position] if t.position in at else next(left) for t in true)


def reader(source: Any, image_size: int) -> Callable[[int, np.ndarray], list[dict[str, bool]]] | None:
  """Judges pictures that should show record k of a procedural source: (k, uint8[P, S, S, 3]) -> what is right in each.

  None for a source that is not procedural.
  """
  if hasattr(source, 'scene'):
    oracle = Oracle(image_size, accessories=source.accessories > 0)
    scene = source.scene
  elif isinstance(source, Frames) and hasattr(source.stories, 'moments'):
    oracle = Oracle(image_size, accessories=True)
    scene = lambda k: source.stories.moments(k // source.length)[k % source.length].scene
  else:
    return None

  def read(k: int, images: np.ndarray) -> list[dict[str, bool]]:
    right = oracle.score(images, [scene(k)] * len(images))
    return [{name: bool(values[i]) for name, values in right.items()} for i in range(len(images))]

  return read


def score_moments(oracle: Oracle, images: np.ndarray, moments: Sequence[Moment]) -> dict[str, np.ndarray]:
  """What is right in each frame of a story, uint8[N, S, S, 3]: `{column: bool[N]}`. `oracle` must read accessories.

  'caption': all that the caption tells, the hero's place, the other object and no third one, size and setting if told.
  'hero': shape, colour and accessory of the object at the hero's place (if that is empty, of any that was not told).
  'setting': that of the source or of the last change, be there a hero or not. 'size': the hero's, as the story has
  left it.
  """
  rows = [_judge(seen, moment) for seen, moment in zip(oracle.read(images), moments, strict=True)]
  return {name: np.array([row[name] for row in rows], bool) for name in COLUMNS}


def _judge(seen: Scene | None, true: Moment) -> dict[str, bool]:
  if seen is None:
    return dict.fromkeys(COLUMNS, False)
  others = [o for o in seen.objects if true.met is None or o.position != true.met.position]
  here = [o for o in others if o.position == true.hero.position]
  look = lambda o: (o.shape, o.color, o.accessory)
  size = any(o.size == true.hero.size for o in here or others)
  told = bool(here) and len(seen.objects) == len(true.scene.objects) and (true.met is None or true.met in seen.objects)
  setting = seen.background == true.scene.background
  return {
    'caption': told and (size or not true.tells_size) and (setting or not true.tells_setting),
    'hero': any(look(o) == look(true.hero) for o in here or others),
    'setting': setting,
    'size': size,
  }
