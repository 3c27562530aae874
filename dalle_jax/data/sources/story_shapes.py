"""Procedural stories of a hero in the world of `shapes`, which need no download and which an oracle can read.

A story is a source frame and four frames that continue it. The look of the hero (shape, colour, accessory) is shown by
the source frame but described by no caption: captions call the hero by a name, which is unrelated to the look. The
setting is that of the source until a caption changes it, and a change lasts for all later frames, even if their
captions do not mention it. The same is true of the size of a hero who has grown or shrunk. Heroes of `test_unseen` have
a pair of shape and colour that no training image shows.
"""

import dataclasses
import zlib

import numpy as np

from dalle_jax.data import sources
from dalle_jax.data.sources import shapes
from dalle_jax.data.sources.shapes import Object, Scene
from dalle_jax.data.stories import Frames, Story, of_unit

NAMES = ('pip', 'momo', 'lulu', 'bobo', 'kiki', 'zuzu', 'nana', 'titi', 'fifi', 'gogo', 'rara', 'vivi')
SPLITS = ('train', 'val', 'test_seen', 'test_unseen')
LENGTH = 5  # frames of a story, including the source
CHANGE = 0.4  # probability that a caption changes the setting, together with a move
ACTIONS = ('moves', 'meets', 'meets', 'size')  # of other captions, equally likely; size: grow if small, else shrink

_MOVES = ('{name} moves to the {place}', '{name} goes to the {place}')
_NOW = ('{text}, now {where}', 'now {where} {text}')


@dataclasses.dataclass(frozen=True)
class Moment:
  """One frame as it should be, and how much of it its caption describes.

  Attributes:
    hero: the hero as an object of the scene.
    met: the other object, which the caption describes completely, or None.
    tells_size, tells_setting: whether the caption changes the hero's size, and whether it gives the setting.
    silent: whether the setting differs from that of the source and this caption does not mention it.
  """

  scene: Scene
  hero: Object
  met: Object | None
  tells_size: bool
  tells_setting: bool
  silent: bool
  caption: str


def draw_story(rng: np.random.Generator, split: str) -> tuple[Moment, ...]:
  """Samples the moments of a story of this split, the source first."""
  while True:
    moments = _draw(rng, split == 'test_unseen')
    bucket = zlib.crc32(repr([(m.scene, m.caption) for m in moments]).encode()) % 10
    held_out = 'val' if bucket == 0 else 'test_seen' if bucket == 1 else 'train'
    if split in ('test_unseen', held_out):
      return moments


def _draw(rng: np.random.Generator, unseen: bool) -> tuple[Moment, ...]:
  pick = lambda table: tuple(table)[int(rng.integers(len(table)))]
  place = lambda taken=-1: pick([p for p in range(shapes.GRID**2) if p != taken])
  pairs = [(s, c) for s in shapes.SHAPES for c in shapes.COLORS if ((s, c) in shapes.UNSEEN_PAIRS) == unseen]
  seen_pairs = [(s, c) for s in shapes.SHAPES for c in shapes.COLORS if (s, c) not in shapes.UNSEEN_PAIRS]
  name, setting, accessory = pick(NAMES), pick(shapes.BACKGROUNDS), pick(('', *shapes.ACCESSORIES))
  start, (shape, color) = place(), pick(pairs)
  hero = Object(start, shape, color, pick(shapes.SIZES), accessory)
  first = f'{name} is at the {shapes.POSITIONS[hero.position]} {shapes.WHERE[setting]}'
  moments = [Moment(Scene(setting, (hero,)), hero, None, False, True, False, first)]
  for _ in range(LENGTH - 1):
    met, changed = None, bool(rng.random() < CHANGE)
    action = 'moves' if changed else pick(ACTIONS)
    if changed:
      setting = pick([b for b in shapes.BACKGROUNDS if b != setting])
    hero = dataclasses.replace(hero, position=place(hero.position))
    where = shapes.POSITIONS[hero.position]
    if action == 'meets':
      spot, (shape, color) = place(hero.position), pick(seen_pairs)
      met = Object(spot, shape, color, pick(shapes.SIZES))
      other = f'{shapes.name(met)} at the {shapes.POSITIONS[met.position]}'
      text = f'at the {where} {name} meets {other}'
    elif action == 'size':
      verb, size = ('grows', 'large') if hero.size == 'small' else ('shrinks', 'small')
      hero = dataclasses.replace(hero, size=size)
      text = f'{name} {verb} at the {where}'
    else:
      text = pick(_MOVES).format(name=name, place=where)
    if changed:
      text = pick(_NOW).format(text=text, where=shapes.WHERE[setting])
    objects = (hero,) if met is None else tuple(sorted((hero, met)))
    silent = not changed and setting != moments[0].scene.background
    moments.append(Moment(Scene(setting, objects), hero, met, action == 'size', changed, silent, text))
  return tuple(moments)


@dataclasses.dataclass(frozen=True)
class StoryShapes:
  """Random-access source of `Story` records; story k is a function of (seed, split, k)."""

  split: str
  image_size: int
  seed: int
  count: int
  label_names: tuple[str, ...] = ()

  def __len__(self) -> int:
    return self.count

  def moments(self, k: int) -> tuple[Moment, ...]:
    if not 0 <= k < self.count:
      raise IndexError(f'story {k} is out of range for a source of {self.count}')
    return draw_story(np.random.default_rng([self.seed, 7, SPLITS.index(self.split), k]), self.split)

  def name(self, k: int) -> str:
    return f'story {k} of {self.split}'

  def captions(self, k: int) -> list[str]:
    return [m.caption for m in self.moments(k)]

  def draw(self, k: int, rng: np.random.Generator | None = None) -> Story:
    moments = self.moments(k)
    return Story([shapes.render(m.scene, self.image_size) for m in moments], [m.caption for m in moments])

  def __getitem__(self, k: int) -> Story:
    return self.draw(k)

  def report(self) -> list[str]:
    return []


def load(
  split: str, *, image_size: int = 48, seed: int = 0, count: int = 0, unit: str = 'story'
) -> StoryShapes | Frames:
  """The stories of a split; `count` 0 means the maximum, 1,000,000 for train and 2,000 for the others."""
  if split not in SPLITS:
    raise ValueError(f'story_shapes: unknown split {split!r}; expected one of {", ".join(SPLITS)}')
  sources.check_whole(image_size=image_size, seed=seed, count=count)
  if image_size < 8 * shapes.GRID:
    raise ValueError(f'story_shapes: image_size {image_size} is too small to tell shapes apart; use {8 * shapes.GRID}')
  most = 1_000_000 if split == 'train' else 2_000
  return of_unit(StoryShapes(split, image_size, seed, min(count or most, most)), LENGTH, unit)
