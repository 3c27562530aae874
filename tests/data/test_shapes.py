"""The procedural world: determinism, splits, and an oracle that accepts the truth and nothing else."""

import dataclasses

import numpy as np
import pytest

from dalle_jax.data.sources import shapes
from dalle_jax.evals.oracle import ATTRIBUTES, Oracle


def _pictures(source, count):
  return np.stack([source[k]['image'] for k in range(count)]), [source.scene(k) for k in range(count)]


def _recolored(o):
  return dataclasses.replace(o, color=next(c for c in shapes.COLORS if c != o.color))


def _changed(scene, attribute, rng):
  """The scene with exactly one attribute of the background or of one object changed."""
  other = lambda table, value: rng.choice([v for v in table if v != value])
  if attribute == 'background':
    return dataclasses.replace(scene, background=str(other(shapes.BACKGROUNDS, scene.background)))
  k = int(rng.integers(len(scene.objects)))
  o = scene.objects[k]
  rest = scene.objects[:k] + scene.objects[k + 1 :]
  if attribute == 'count':
    free = [p for p in range(9) if p not in {x.position for x in scene.objects}]
    extra = dataclasses.replace(o, position=int(rng.choice(free)))
    return dataclasses.replace(scene, objects=tuple(sorted((*scene.objects, extra))))
  if attribute == 'position':
    free = [p for p in range(9) if p not in {x.position for x in scene.objects}]
    new = dataclasses.replace(o, position=int(rng.choice(free)))
  else:
    table = {'shape': shapes.SHAPES, 'color': shapes.COLORS, 'size': shapes.SIZES}[attribute]
    new = dataclasses.replace(o, **{attribute: str(other(table, getattr(o, attribute)))})
  return dataclasses.replace(scene, objects=tuple(sorted((*rest, new))))


@pytest.mark.parametrize('split', shapes.SPLITS)
def test_record_is_a_function_of_seed_split_and_index(split):
  a, b = shapes.load(split, seed=3), shapes.load(split, seed=3, count=50)
  for k in (0, 7, 49):
    assert a[k]['caption'] == b[k]['caption']
    np.testing.assert_array_equal(a[k]['image'], b[k]['image'])
  assert [a[k]['caption'] for k in range(20)] != [shapes.load(split, seed=4)[k]['caption'] for k in range(20)]


def test_every_scene_is_in_its_split_and_only_test_unseen_shows_the_held_out_pairs():
  for split in shapes.SPLITS:
    for max_objects in (2, 9):
      source = shapes.load(split, max_objects=max_objects)
      for k in range(200):
        scene = source.scene(k)
        assert scene.split == split
        assert scene.unseen == (split == 'test_unseen')
        assert 1 <= len(scene.objects) <= max_objects
        assert len({o.position for o in scene.objects}) == len(scene.objects)


@pytest.mark.parametrize('split', shapes.SPLITS)
def test_siblings_differ_in_little_and_stay_in_their_split(split):
  families, alone = shapes.load(split, siblings=4), shapes.load(split)
  changed = []
  for k in range(0, 200, 4):
    first, *others = (families.scene(k + i) for i in range(4))
    assert first == alone.scene(k // 4)
    for other in others:
      assert other.split == split and other != first and 1 <= len(other.objects) <= 2
      changed.append(
        (other.background != first.background)
        + max(len({*a.objects} - {*b.objects}) for a, b in ((first, other), (other, first)))
      )
  assert split != 'train' or np.mean(np.array(changed) == 1) > 0.8


def test_captions_tell_every_attribute_in_several_wordings():
  source = shapes.load('train')
  forms = set()
  for k in range(300):
    caption, scene = source[k]['caption'], source.scene(k)
    for o in scene.objects:
      assert f'a {o.size} {o.color} {o.shape} at the {shapes.POSITIONS[o.position]}' in caption
    forms.add((caption.startswith('a picture of'), caption[0] == 'a', ' with ' in caption, ' and ' in caption))
  assert len(forms) >= 5


def test_edges_are_anti_aliased_and_every_look_is_drawn():
  assert len(shapes.SHAPES) >= 8 and len(shapes.COLORS) >= 8 and len(shapes.BACKGROUNDS) >= 6
  for shape in shapes.SHAPES:
    for size in shapes.SIZES:
      mask = shapes.coverage(shape, size, 4, 48)[2]
      assert mask.max() == 1 and mask.min() < 0.25, (shape, size)  # a gap between neighbours
      assert ((mask > 0.05) & (mask < 0.95)).any(), (shape, size)
      assert 0.1 < mask.mean() < 0.9, (shape, size)


@pytest.mark.parametrize('image_size', [32, 48, 64])
def test_oracle_accepts_true_renderings(image_size):
  count = 200
  for split in ('test', 'test_unseen'):
    images, scenes = _pictures(shapes.load(split, image_size=image_size), count)
    assert Oracle(image_size).score(images, scenes)['all'].mean() >= 0.999


def test_oracle_reads_cells_that_share_pixels_with_what_their_neighbours_wear():
  images, scenes = _pictures(shapes.load('test', image_size=32, max_objects=9, accessories=1.0), 100)
  assert Oracle(32, accessories=True).score(images, scenes)['all'].all()


@pytest.mark.parametrize('attribute', ATTRIBUTES)
def test_oracle_rejects_one_changed_attribute(attribute):
  rng, source = np.random.default_rng(0), shapes.load('test')
  scenes = [source.scene(k) for k in range(400)]
  wrong = [_changed(s, attribute, rng) for s in scenes]
  score = Oracle(48).score(np.stack([shapes.render(s, 48) for s in wrong]), scenes)
  assert score['all'].mean() <= 0.001
  assert score[attribute].mean() <= 0.001
  if attribute not in ('count', 'position'):
    others = [a for a in ATTRIBUTES if a != attribute]
    assert np.mean([score[a] for a in others]) >= 0.95  # a swapped colour can pair the objects the other way round


def test_blank_and_noise_pictures_score_zero():
  source = shapes.load('test')
  scenes = [source.scene(k) for k in range(60)]
  blank = np.stack([shapes.render(dataclasses.replace(s, objects=()), 48) for s in scenes])
  noise = np.random.default_rng(0).integers(0, 256, blank.shape, dtype=np.uint8)
  for images in (blank, noise, np.zeros_like(blank), np.full_like(blank, 255)):
    assert not any(v.any() for v in Oracle(48).score(images, scenes).values())


def test_crowded_pictures_are_compared_cell_by_cell():
  images, scenes = _pictures(shapes.load('test', max_objects=9), 60)
  assert max(len(s.objects) for s in scenes) == 9 and Oracle(48).score(images, scenes)['all'].all()
  crowded = [s for s in scenes if len(s.objects) > 3]
  wrong = [dataclasses.replace(s, objects=(*s.objects[:-1], _recolored(s.objects[-1]))) for s in crowded]
  score = Oracle(48).score(np.stack([shapes.render(s, 48) for s in wrong]), crowded)
  assert not score['color'].any() and score['shape'].all() and score['position'].all()
  few = [s for s in crowded if len(s.objects) < 9]
  free = lambda s: next(p for p in range(8, -1, -1) if p not in {o.position for o in s.objects})
  moved = [tuple(sorted((dataclasses.replace(s.objects[0], position=free(s)), *s.objects[1:]))) for s in few]
  images = np.stack([shapes.render(dataclasses.replace(s, objects=m), 48) for s, m in zip(few, moved, strict=True)])
  score = Oracle(48).score(images, few)
  assert not score['position'].any() and score['color'].all() and score['shape'].all()


def test_large_pictures_are_read_too():
  images, scenes = _pictures(shapes.load('test', image_size=99), 4)  # shrunk by three, as two does not divide it
  assert Oracle(99).score(images, scenes)['all'].all()
  with pytest.raises(ValueError, match='image_size 299 has no divisor from 4 to 9; use a multiple of 4'):
    Oracle(299)


def test_bad_arguments_are_refused():
  with pytest.raises(ValueError, match='unknown split'):
    shapes.load('dev')
  with pytest.raises(ValueError, match='too small'):
    shapes.load('train', image_size=16)
  with pytest.raises(ValueError, match='max_objects'):
    shapes.load('train', max_objects=10)
  with pytest.raises(ValueError, match='siblings'):
    shapes.load('train', siblings=0)
  with pytest.raises(ValueError, match='one or two objects'):
    shapes.load('train', siblings=2, max_objects=1)
  with pytest.raises(ValueError, match='expected uint8'):
    Oracle(48).read(np.zeros((1, 48, 48, 3)))
