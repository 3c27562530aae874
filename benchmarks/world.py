"""The procedural world: images per second on one core, and the accuracy of the oracle.

python benchmarks/world.py --image_size=48
"""

import dataclasses
import time

import numpy as np
from absl import app, flags

from dalle_jax.data.sources import shapes
from dalle_jax.evals.oracle import Oracle

_SIZE = flags.DEFINE_integer('image_size', 48, 'side of the images')
_COUNT = flags.DEFINE_integer('count', 4_000, 'number of images')
TARGET = 1_500  # images per second


def other(value, values, rng):
  rest = [v for v in values if v != value]
  return rest[int(rng.integers(len(rest)))]


def changed(scene: shapes.Scene, rng: np.random.Generator) -> shapes.Scene:
  """Returns the scene with one random attribute changed."""
  which = ('background', 'count', 'position', 'shape', 'color', 'size')[int(rng.integers(6))]
  free = [p for p in range(shapes.GRID**2) if p not in {o.position for o in scene.objects}]
  k = int(rng.integers(len(scene.objects)))
  o = scene.objects[k]
  if which == 'background':
    return dataclasses.replace(scene, background=other(scene.background, shapes.BACKGROUNDS, rng))
  if which == 'count':
    more = dataclasses.replace(o, position=free[int(rng.integers(len(free)))])
    rest = scene.objects[:k] + scene.objects[k + 1 :]
    return dataclasses.replace(
      scene, objects=rest if rest and rng.random() < 0.5 else tuple(sorted((*scene.objects, more)))
    )
  values = {'position': free, 'shape': shapes.SHAPES, 'color': shapes.COLORS, 'size': shapes.SIZES}[which]
  new = dataclasses.replace(o, **{which: other(getattr(o, which), values, rng)})
  return dataclasses.replace(scene, objects=tuple(sorted((*scene.objects[:k], new, *scene.objects[k + 1 :]))))


def main(_):
  size, count = _SIZE.value, _COUNT.value
  source = shapes.load('train', image_size=size)
  source[0]
  start = time.process_time()
  for k in range(count):
    source[k]
  rate = count / (time.process_time() - start)
  print(f'{size} x {size} images with captions: {rate:,.0f} per second on one core, {rate / TARGET:.1f} x {TARGET:,}')
  oracle, rng = Oracle(size), np.random.default_rng(0)
  right = wrong = 0
  for first in range(0, count, 500):
    scenes = [source.scene(k) for k in range(first, min(first + 500, count))]
    right += oracle.score(np.stack([shapes.render(s, size) for s in scenes]), scenes)['all'].sum()
    wrong += oracle.score(np.stack([shapes.render(changed(s, rng), size) for s in scenes]), scenes)['all'].sum()
  print(f'oracle: accepts {100 * right / count:.2f}% of true images, {100 * wrong / count:.2f}% of changed ones')
  noise = rng.integers(0, 256, (200, size, size, 3), np.uint8)
  blank = np.repeat(rng.integers(0, 256, (200, 1, 1, 3), np.uint8), size, 1).repeat(size, 2)
  scenes = [source.scene(k) for k in range(200)]
  for name, images in (('noise', noise), ('blank', blank)):
    print(f'{name}: {100 * oracle.score(images, scenes)["all"].mean():.2f}% accepted')


if __name__ == '__main__':
  app.run(main)
