"""The oracle of the procedural world: reads an image back into a scene and checks which attributes are right.

Each cell is compared with the rendering of every possible content (the nearest in mean squared error counts); a cell
that is near none of them is unreadable. So the oracle accepts what `render` draws and tolerates the blur of a
tokenizer, but not a ring in place of a circle or an empty image.
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
COLUMNS = ('caption', 'hero', 'setting', 'size')  # what is checked in frames of stories
_READABLE = 0.16  # RMS error, of 1, up to which a cell counts as its nearest content; uniform noise has 0.3
_MAX_SIZE = 96  # larger images are averaged down first: the templates of 9 x 774 cells must fit in memory
_MIN_SIZE = 32  # but not below the size at which contents are told apart reliably


class Oracle:
  """Reads square images of one size.

  Args:
    image_size: side of the images in pixels; above 96 they are averaged down by an integer that divides it.
    accessories: whether objects may wear accessories; this makes four times as many templates.
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
    """For each cell: rows, columns, templates float32[backgrounds * contents, pixels], their squared norms."""
    side, table = self.image_size // self._reduce, []
    inside = lambda k: slice(-(-k * side // shapes.GRID), (k + 1) * side // shapes.GRID)
    for position in range(shapes.GRID**2):
      rows, cols = map(inside, divmod(position, shapes.GRID))  # without pixels that belong to two cells
      cells = []
      for background, content in itertools.product(shapes.BACKGROUNDS, self._contents):
        objects = () if content is None else (Object(position, *content),)
        full = self._shrink(shapes.render(Scene(background, objects), self.image_size)[None])
        cells.append(full[0, rows, cols].ravel())
      stack = np.stack(cells)
      table.append((rows, cols, stack, np.square(stack).sum(1)))
    return table

  def _shrink(self, images: np.ndarray) -> np.ndarray:
    n, f, side = len(images), self._reduce, self.image_size // self._reduce
    return images.astype(np.float32).reshape(n, side, f, side, f, 3).mean((2, 4)) / 255

  def read(self, images: np.ndarray) -> list[Scene | None]:
    """The scenes in uint8[N, S, S, 3]; None for an image with an unreadable cell."""
    expected = (self.image_size, self.image_size, 3)
    if images.ndim != 4 or images.shape[1:] != expected or images.dtype != np.uint8:
      raise ValueError(f'oracle: expected uint8 images [N, {expected}], got {images.dtype}{list(images.shape)}')
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
    """Which attributes are right in each image: `{attribute or 'all': bool[N]}`.

    Objects are paired with the true ones so that as many attributes as possible agree; in scenes of more than three
    objects, those in the same cell are paired. An attribute is right when it is right for every object.
    """
    if len(images) != len(scenes):
      raise ValueError(f'oracle: there are {len(images)} images and {len(scenes)} scenes; expected one scene per image')
    rows = [_compare(read, true) for read, true in zip(self.read(images), scenes, strict=True)]
    result = {name: np.array([row[name] for row in rows], bool) for name in ATTRIBUTES}
    return result | {'all': np.logical_and.reduce([result[name] for name in ATTRIBUTES])}


def _compare(read: Scene | None, true: Scene) -> dict[str, bool]:
  if read is None or not read.objects:  # an empty image has nothing right
    return dict.fromkeys(ATTRIBUTES, False)
  same_count = len(read.objects) == len(true.objects)
  if len(read.objects) < len(true.objects):
    pairings: list[tuple[Object, ...]] = []
  elif len(true.objects) > 3 and same_count:  # a crowded scene, as image tokenizers are trained on
    pairings = [_by_cell(read.objects, true.objects)]
  elif len(read.objects) > 3:  # too many to pair: this is not a scene of this world
    pairings = []
  else:
    pairings = list(itertools.permutations(read.objects, len(true.objects)))
  names = ('position', 'shape', 'color', 'size')
  options = [
    {n: all(getattr(a, n) == getattr(b, n) for a, b in zip(p, true.objects, strict=True)) for n in names}
    for p in pairings
  ]
  best = max(options, key=lambda o: sum(o.values()), default=dict.fromkeys(names, False))
  return {'background': read.background == true.background, 'count': same_count, **best}


def _by_cell(read: Sequence[Object], true: Sequence[Object]) -> tuple[Object, ...]:
  """For each true object the one read in its cell; if that is empty, the next unpaired one in raster order."""
  at = {o.position: o for o in read}
  left = iter([o for o in read if o.position not in {t.position for t in true}])
  return tuple(at[t.position] if t.position in at else next(left) for t in true)


def reader(source: Any, image_size: int) -> Callable[[int, np.ndarray], list[dict[str, bool]]] | None:
  """A function (k, uint8[P, S, S, 3]) -> what `Oracle.score` finds in each image, for record k of a procedural source.

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

  'caption': everything that the caption states: the hero's position, the other object and no third one, and the size
  and the setting if it mentions them. 'hero': shape, colour and accessory of the object at the hero's position (if that
  is empty, of any object that the caption does not describe). 'setting': the setting of the source or of the last
  change, whether there is a hero or not. 'size': the hero's size, as the story has left it.
  """
  rows = [_score_moment(read, moment) for read, moment in zip(oracle.read(images), moments, strict=True)]
  return {name: np.array([row[name] for row in rows], bool) for name in COLUMNS}


def _score_moment(read: Scene | None, true: Moment) -> dict[str, bool]:
  if read is None:
    return dict.fromkeys(COLUMNS, False)
  others = [o for o in read.objects if true.met is None or o.position != true.met.position]
  here = [o for o in others if o.position == true.hero.position]
  heroes = here or others  # objects that may be the hero
  look = lambda o: (o.shape, o.color, o.accessory)
  size = any(o.size == true.hero.size for o in heroes)
  objects = bool(here) and len(read.objects) == len(true.scene.objects) and (not true.met or true.met in read.objects)
  setting = read.background == true.scene.background
  return {
    'caption': objects and (size or not true.tells_size) and (setting or not true.tells_setting),
    'hero': any(look(o) == look(true.hero) for o in heroes),
    'setting': setting,
    'size': size,
  }
