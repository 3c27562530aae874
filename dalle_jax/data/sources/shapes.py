"""A procedural world of captioned images that needs no download: objects in a 3 x 3 grid of cells on a background.

A `Scene` lists what is shown, `render` draws it and `describe` puts it into words. These are independent, so that the
stories of `story_shapes`, with named characters and settings, are made of the same scenes. Record k is a function of
(seed, split, k).

The hash of a scene assigns it to exactly one of train, val and test, and the pairs in `UNSEEN_PAIRS` appear only in
`test_unseen`. "Held out" thus means that this scene, and in `test_unseen` also this combination, is never trained on.
"""

import dataclasses
import functools
import itertools

import numpy as np

from dalle_jax.data import sources

SHAPES = ('circle', 'square', 'triangle', 'diamond', 'cross', 'ring', 'heart', 'moon')
COLORS = {
  'red': (222, 36, 40),
  'orange': (248, 134, 22),
  'yellow': (250, 218, 40),
  'green': (36, 172, 70),
  'cyan': (48, 206, 224),
  'blue': (40, 84, 226),
  'purple': (146, 52, 204),
  'pink': (252, 142, 196),
}
SIZES = {'small': 0.7, 'large': 0.97}  # half extent of an object, in half cells
# What an object may wear, drawn in the middle third of the columns of its cell: which third of the rows, counted from
# the top, and the colours of its upper and lower half.
ACCESSORIES = {
  'hat': (0, (16, 16, 16), (255, 255, 255)),
  'badge': (1, (255, 255, 255), (16, 16, 16)),
  'boots': (2, (255, 255, 255), (96, 48, 16)),
}
POSITIONS = (
  'top left', 'top', 'top right', 'left', 'center', 'right', 'bottom left', 'bottom', 'bottom right',
)  # fmt: skip
BACKGROUNDS = {
  'night': (20, 24, 50),
  'snow': (240, 243, 247),
  'sand': (222, 202, 160),
  'forest': (34, 62, 44),
  'stone': (122, 126, 132),
  'dusk': (98, 60, 78),
}
GRID = 3  # cells per side
# No shape or colour is in two pairs, so that training shows each of them in other combinations.
UNSEEN_PAIRS = frozenset(
  {('circle', 'orange'), ('triangle', 'purple'), ('diamond', 'red'), ('cross', 'yellow'), ('heart', 'cyan'),
   ('moon', 'green')}
)  # fmt: skip
SPLITS = ('train', 'val', 'test', 'test_unseen')

WHERE = {'night': 'at night', 'snow': 'in the snow', 'sand': 'on the sand', 'forest': 'in the forest',
          'stone': 'on grey stone', 'dusk': 'at dusk'}  # fmt: skip
_SENTENCES = ('{objects} {where}', '{where}, {objects}', 'a picture of {objects} {where}', '{objects}, {where}')
_JOINS = (' and ', ' with ', ', ')


@dataclasses.dataclass(frozen=True, order=True)
class Object:
  """An object in a scene; `position` is the index of its cell in raster order; `accessory` may be ''."""

  position: int
  shape: str
  color: str
  size: str
  accessory: str = ''


@dataclasses.dataclass(frozen=True)
class Scene:
  """A background, and objects in different cells in raster order."""

  background: str
  objects: tuple[Object, ...]

  @property
  def unseen(self) -> bool:
    return any((o.shape, o.color) in UNSEEN_PAIRS for o in self.objects)

  @property
  def split(self) -> str:
    """The only split of this scene; without an unseen pair, 80% are train, 10% val and 10% test."""
    if self.unseen:
      return 'test_unseen'
    key = list(BACKGROUNDS).index(self.background)
    for o in self.objects:
      look = (list(COLORS).index(o.color) * len(SHAPES) + SHAPES.index(o.shape)) * 2 + list(SIZES).index(o.size)
      key = (key * 128 + look) * 9 + o.position + 1
    key = (key ^ (key >> 16)) * 0x45D9F3B & 0xFFFFFFFF  # a multiplicative hash, which scatters neighbouring keys
    key = (key ^ (key >> 16)) * 0x45D9F3B & 0xFFFFFFFF
    bucket = (key ^ (key >> 16)) % 10
    return 'val' if bucket == 0 else 'test' if bucket == 1 else 'train'


def draw_scene(rng: np.random.Generator, split: str, max_objects: int = 2) -> Scene:
  """Samples a scene of this split with 1 to `max_objects` objects, each number being equally likely."""
  pick = lambda table, v: tuple(table)[int(v * len(table))]
  while True:
    count = 1 + int(rng.integers(max_objects))
    u = rng.random(1 + GRID**2 + 3 * count)
    cells = sorted(np.argsort(u[1 : 1 + GRID**2])[:count].tolist())
    objects = tuple(
      Object(cell, pick(SHAPES, a), pick(COLORS, b), pick(SIZES, c))
      for cell, (a, b, c) in zip(cells, u[1 + GRID**2 :].reshape(count, 3), strict=True)
    )
    if split == 'train' and any((o.shape, o.color) in UNSEEN_PAIRS for o in objects):
      objects = tuple(_recolor(o, rng) for o in objects)
    if split == 'test_unseen':  # rejection alone would discard nine of ten samples
      k = int(rng.integers(count))
      shape, color = sorted(UNSEEN_PAIRS)[int(rng.integers(len(UNSEEN_PAIRS)))]
      objects = (*objects[:k], dataclasses.replace(objects[k], shape=shape, color=color), *objects[k + 1 :])
    scene = Scene(pick(BACKGROUNDS, u[0]), objects)
    if scene.split == split:
      return scene


def _recolor(o: Object, rng: np.random.Generator) -> Object:
  """Gives an object a new colour if training must not show its shape in the present one."""
  colors = [c for c in COLORS if (o.shape, c) not in UNSEEN_PAIRS]
  return o if o.color in colors else dataclasses.replace(o, color=colors[int(rng.integers(len(colors)))])


def change(scene: Scene, rng: np.random.Generator) -> Scene:
  """A scene of the same split that differs in one attribute, or in more if no such scene is found in the split."""
  new = scene
  while new == scene or new.split != scene.split:
    new = _step(new, rng)
  return new


def _step(scene: Scene, rng: np.random.Generator) -> Scene:
  """Resamples an attribute of an object, the background or the number of objects; the result may be the same."""
  pick = lambda table: tuple(table)[int(rng.integers(len(table)))]
  new = lambda position: Object(position, pick(SHAPES), pick(COLORS), pick(SIZES))
  k = int(rng.integers(len(scene.objects)))
  o, others = scene.objects[k], scene.objects[:k] + scene.objects[k + 1 :]
  free = sorted(set(range(GRID**2)) - {x.position for x in others})
  values = dict(shape=SHAPES, color=COLORS, size=SIZES, position=free, background=BACKGROUNDS, count=(1, 2))
  name = pick(values)
  value = pick(values[name])
  if name == 'background':
    return dataclasses.replace(scene, background=value)
  if name == 'count':
    more = (new(pick(sorted(set(free) - {o.position}))),) if len(others) + 1 < value else ()
    objects = others if len(others) >= value else (*scene.objects, *more)
  else:
    objects = (*others, dataclasses.replace(o, **{name: value}))
  return dataclasses.replace(scene, objects=tuple(sorted(objects)))


def describe(scene: Scene, rng: np.random.Generator) -> str:
  """Describes a scene in one of several wordings, each of which includes every attribute."""
  phrases = [f'{name(o)} at the {POSITIONS[o.position]}' for o in scene.objects]
  objects = _JOINS[int(rng.integers(len(_JOINS)))].join(phrases)
  return _SENTENCES[int(rng.integers(len(_SENTENCES)))].format(objects=objects, where=WHERE[scene.background])


def name(o: Object) -> str:
  wearing = f' with {o.accessory if o.accessory == "boots" else f"a {o.accessory}"}' if o.accessory else ''
  return f'a {o.size} {o.color} {o.shape}{wearing}'


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Signed distance to the outline of a shape in [-1, 1]^2, negative inside, y down; accurate enough for 1-pixel edges.

  The proportions maximise the smallest distance between any two shapes and sizes of one colour at 16 pixels per cell.
  """
  r = np.hypot(x, y)
  match shape:
    case 'circle':
      return r - 0.9
    case 'ring':
      return np.abs(r - 0.85) - 0.14
    case 'square':
      return np.maximum(np.abs(x), np.abs(y)) - 0.93
    case 'diamond':
      return (1.6 * np.abs(x) + np.abs(y) - 1) / np.hypot(1.6, 1)
    case 'cross':  # diagonal
      arms = np.minimum(np.abs(x + y), np.abs(x - y)) / np.sqrt(2)
      return np.maximum(arms - 0.22, np.maximum(np.abs(x), np.abs(y)) - 0.97)
    case 'triangle':
      return np.maximum(y - 0.95, (2 * np.abs(x) - y - 0.95) / np.sqrt(5))
    case 'heart':  # two discs above a wedge
      discs = np.hypot(np.abs(x) - 0.47, y + 0.4) - 0.5
      wedge = np.maximum((np.abs(x) * 0.76 + (y - 0.95) * 0.65), -0.4 - y)
      return np.minimum(discs, wedge)
    case 'moon':  # a disc minus another one
      return np.maximum(r - 0.96, 0.72 - np.hypot(x - 0.42, y))
  raise ValueError(f'unknown shape {shape!r}; known: {", ".join(SHAPES)}')


@functools.lru_cache(maxsize=4096)
def coverage(shape: str, size: str, position: int, image_size: int) -> tuple[slice, slice, np.ndarray]:
  """The rows and columns of an object's cell, and the fraction of each pixel it covers: float32[h, w, 1] in [0, 1]."""
  row, col = divmod(position, GRID)
  cell = image_size / GRID
  rows = slice(int(row * cell), int(np.ceil((row + 1) * cell)))
  cols = slice(int(col * cell), int(np.ceil((col + 1) * cell)))
  half = SIZES[size] * cell / 2  # pixels
  y = (np.arange(rows.start, rows.stop) + 0.5 - (row + 0.5) * cell) / half
  x = (np.arange(cols.start, cols.stop) + 0.5 - (col + 0.5) * cell) / half
  mask = np.clip(0.5 - _distance(shape, x[None, :], y[:, None]) * half, 0, 1)
  return rows, cols, mask.astype(np.float32)[..., None]


def render(scene: Scene, image_size: int) -> np.ndarray:
  """Draws a scene with anti-aliased edges: uint8[image_size, image_size, 3]."""
  image = np.empty((image_size, image_size, 3), np.float32)
  image[:] = BACKGROUNDS[scene.background]
  for o in scene.objects:
    rows, cols, mask = coverage(o.shape, o.size, o.position, image_size)
    image[rows, cols] += mask * (np.asarray(COLORS[o.color], np.float32) - image[rows, cols])
    if o.accessory:
      third, upper, lower = ACCESSORIES[o.accessory]
      cell = image_size / GRID
      top, left = (o.position // GRID + third / 3) * cell, (o.position % GRID + 1 / 3) * cell
      for half, color in enumerate((upper, lower)):
        a, b = round(top + half * cell / 6), round(top + (half + 1) * cell / 6)
        image[a:b, round(left) : round(left + cell / 3)] = color
  return (image + 0.5).astype(np.uint8)


def all_looks() -> list[tuple[str, str, str]]:
  """Every (shape, color, size)."""
  return list(itertools.product(SHAPES, COLORS, SIZES))


@dataclasses.dataclass(frozen=True)
class Shapes:
  """Random-access source: `source[k] -> {'image': uint8[S, S, 3], 'caption': str}`."""

  split: str
  image_size: int
  seed: int
  count: int
  max_objects: int
  siblings: int
  accessories: float

  def __len__(self) -> int:
    return self.count

  def _scene_and_rng(self, k: int) -> tuple[Scene, np.random.Generator]:
    if not 0 <= k < self.count:
      raise IndexError(f'image {k} is out of range for a source of {self.count}')
    family, sibling = divmod(k, self.siblings)
    key = [self.seed, SPLITS.index(self.split), family]
    rng = np.random.default_rng(key)
    scene = draw_scene(rng, self.split, self.max_objects)
    if sibling:
      rng = np.random.default_rng([*key, sibling])
      scene = change(scene, rng)
    if self.accessories:
      scene = dataclasses.replace(scene, objects=tuple(dress(o, rng, self.accessories) for o in scene.objects))
    return scene, rng

  def scene(self, k: int) -> Scene:
    return self._scene_and_rng(k)[0]

  def captions(self, k: int) -> list[str]:
    return [describe(*self._scene_and_rng(k))]

  def __getitem__(self, k: int) -> dict:
    scene, rng = self._scene_and_rng(k)
    return {'image': render(scene, self.image_size), 'caption': describe(scene, rng)}


def dress(o: Object, rng: np.random.Generator, share: float) -> Object:
  """Gives an object an accessory, all being equally likely, with probability `share`; else it wears none."""
  worn = tuple(ACCESSORIES)[int(rng.integers(len(ACCESSORIES)))] if rng.random() < share else ''
  return dataclasses.replace(o, accessory=worn)


def load(
  split: str,
  *,
  image_size: int = 48,
  seed: int = 0,
  count: int = 0,
  max_objects: int = 2,
  siblings: int = 1,
  accessories: float = 0.0,
) -> Shapes:
  """The images of a split; `count` 0 means the maximum, 1,000,000 for train and 2,000 for the others.

  `max_objects` above 2 gives crowded images, from which an image tokenizer learns faster: each shows more objects.
  Records come in families of `siblings`: a scene, and others that differ from it in one attribute (see `change`). In
  one batch (`data.group`) they are hard negatives for a contrastive loss. Every object wears an accessory, like the
  heroes of stories, with probability `accessories`.
  """
  if split not in SPLITS:
    raise ValueError(f'shapes: unknown split {split!r}; expected one of {", ".join(SPLITS)}')
  sources.check_whole(image_size=image_size, seed=seed, count=count, max_objects=max_objects, siblings=siblings)
  if image_size < 8 * GRID:
    raise ValueError(f'shapes: image_size {image_size} is too small to tell shapes apart; use {8 * GRID} or more')
  if not 1 <= max_objects <= GRID**2:
    raise ValueError(f'shapes: max_objects {max_objects} does not fit the {GRID**2} cells; use 1 to {GRID**2}')
  most = 1_000_000 if split == 'train' else 2_000
  if siblings < 1:
    raise ValueError(f'shapes: siblings is {siblings}; expected 1 (unrelated scenes) or more')
  if siblings > 1 and max_objects < 2:
    raise ValueError(f'shapes: siblings have one or two objects; max_objects {max_objects} must be 2 or more')
  if not 0 <= accessories <= 1:
    raise ValueError(f'shapes: accessories is {accessories}; expected a probability')
  return Shapes(split, image_size, seed, min(count or most, most), max_objects, siblings, accessories)
