"""The story world: what captions tell and what they keep silent, splits, and an oracle that knows right from wrong."""

import dataclasses
import itertools

import numpy as np
import pytest

from configs import story_shapes as recipe
from dalle_jax.data import pipeline
from dalle_jax.data.sources import shapes, story_shapes
from dalle_jax.data.stories import Story
from dalle_jax.evals.oracle import COLUMNS, Oracle, score_moments
from tests.data.fakes import data_config, encode_text

SIZE = 36
STORIES = {split: story_shapes.load(split, image_size=SIZE) for split in story_shapes.SPLITS}


@pytest.fixture(scope='module')
def oracle():
  return Oracle(SIZE, accessories=True)


def told(split, count=100):
  return [STORIES[split].moments(k) for k in range(count)]


def test_a_story_is_a_function_of_seed_split_and_number():
  first, again = STORIES['train'][3], story_shapes.load('train', image_size=SIZE)[3]
  np.testing.assert_array_equal(first.frames, again.frames)
  assert first.captions == again.captions and len(first.frames) == story_shapes.LENGTH
  assert story_shapes.load('train', image_size=SIZE, seed=1)[3].captions != first.captions


def test_no_caption_and_no_name_tells_the_look_of_the_hero():
  looks = {}
  for story in told('train', 300):
    hero = story[0].hero
    for m in story:
      words = m.caption.replace(shapes.name(m.met), '') if m.met else m.caption
      assert not {hero.shape, hero.color, 'hat', 'badge', 'boots'} & set(words.split())
      assert (m.hero.shape, m.hero.color, m.hero.accessory) == (hero.shape, hero.color, hero.accessory)
    name = next(n for n in story_shapes.NAMES if n in story[0].caption.split())
    looks.setdefault(name, set()).add((hero.shape, hero.color))
  assert set(looks) == set(story_shapes.NAMES) == set(recipe.NAMES) and min(map(len, looks.values())) > 10


def test_settings_and_sizes_last_until_they_are_told_to_change():
  silent = 0
  for story in told('train', 300):
    for before, m in itertools.pairwise(story):
      assert m.tells_setting == (m.scene.background != before.scene.background)
      assert m.tells_size == (m.hero.size != before.hero.size) == bool({'grows', 'shrinks'} & set(m.caption.split()))
      assert m.tells_setting == (shapes.WHERE[m.scene.background] in m.caption)
      assert m.hero.position != before.hero.position
      assert shapes.POSITIONS[m.hero.position] in m.caption
      assert m.silent == (not m.tells_setting and m.scene.background != story[0].scene.background)
      silent += m.silent
  assert 200 < silent < 600


def test_splits():
  unseen = lambda o: (o.shape, o.color) in shapes.UNSEEN_PAIRS
  assert all(unseen(m.hero) for story in told('test_unseen') for m in story)
  objects = [
    o for split in ('train', 'val', 'test_seen') for story in told(split) for m in story for o in m.scene.objects
  ]
  assert not any(map(unseen, objects))
  assert not any(unseen(m.met) for story in told('test_unseen') for m in story if m.met)
  key = lambda story: tuple((m.caption, m.scene) for m in story)
  parts = [{key(s) for s in told(split, 300)} for split in story_shapes.SPLITS]
  assert len(set.union(*parts)) == 1200
  with pytest.raises(ValueError, match="unknown split 'test'; expected one of train, val, test_seen, test_unseen"):
    story_shapes.load('test')


def test_the_oracle_accepts_what_is_right(oracle):
  moments = [m for story in told('test_seen', 60) for m in story]
  images = np.stack([shapes.render(m.scene, SIZE) for m in moments])
  right = score_moments(oracle, images, moments)
  assert set(right) == set(COLUMNS) and all(v.all() for v in right.values())


def judged(oracle, moment, scene):
  right = score_moments(oracle, shapes.render(scene, SIZE)[None], [moment])
  return {c for c in COLUMNS if not right[c][0]}


def test_each_mistake_costs_its_own_column(oracle):
  moments = [m for story in told('test_seen', 40) for m in story[1:]]
  alone = next(m for m in moments if not m.met and not m.tells_setting and not m.tells_size)
  meeting = next(m for m in moments if m.met and not m.tells_setting)
  growing, changing = next(m for m in moments if m.tells_size), next(m for m in moments if m.tells_setting)
  with_hero = lambda m, **change: dataclasses.replace(
    m.scene, objects=tuple(sorted(dataclasses.replace(o, **change) if o == m.hero else o for o in m.scene.objects))
  )
  other = lambda value, table: next(v for v in table if v != value)
  assert judged(oracle, alone, with_hero(alone, shape=other(alone.hero.shape, shapes.SHAPES))) == {'hero'}
  assert judged(oracle, alone, with_hero(alone, color=other(alone.hero.color, shapes.COLORS))) == {'hero'}
  worn = other(alone.hero.accessory, shapes.ACCESSORIES)
  assert judged(oracle, alone, with_hero(alone, accessory=worn)) == {'hero'}
  assert judged(oracle, alone, with_hero(alone, size=other(alone.hero.size, shapes.SIZES))) == {'size'}
  assert judged(oracle, growing, with_hero(growing, size=other(growing.hero.size, shapes.SIZES))) == {'caption', 'size'}
  assert judged(oracle, alone, with_hero(alone, position=(alone.hero.position + 1) % 9)) == {'caption'}
  elsewhere = lambda m: dataclasses.replace(m.scene, background=other(m.scene.background, shapes.BACKGROUNDS))
  assert judged(oracle, alone, elsewhere(alone)) == {'setting'}
  assert judged(oracle, changing, elsewhere(changing)) == {'setting', 'caption'}
  assert judged(oracle, meeting, dataclasses.replace(meeting.scene, objects=(meeting.hero,))) == {'caption'}
  assert judged(oracle, alone, dataclasses.replace(alone.scene, objects=())) == {'caption', 'hero', 'size'}
  twins = tuple(sorted((alone.hero, dataclasses.replace(alone.hero, position=(alone.hero.position + 1) % 9))))
  assert judged(oracle, alone, dataclasses.replace(alone.scene, objects=twins)) == {'caption'}
  assert judged(oracle, meeting, dataclasses.replace(meeting.scene, objects=(meeting.met,))) == {
    'caption',
    'hero',
    'size',
  }
  noise = np.random.default_rng(0).integers(0, 256, (1, SIZE, SIZE, 3), np.uint8)
  assert not any(v[0] for v in score_moments(oracle, noise, [alone]).values())


# --- Stories in batches


def test_batches_of_stories():
  source = story_shapes.load('train', image_size=SIZE, count=20)
  ids = lambda caption, seed: np.array([len(caption), seed is not None], np.int32)
  encoders = {'text': ids, 'clip_text': lambda caption, seed: ids(caption, seed)[:1]}
  options = dict(batch_size=4, seed=0, encode_text=encoders)
  batch = next(pipeline.make_loader(source, data_config(image_size=24), shuffle=True, **options))
  assert batch['image'].shape == (4, 5, 24, 24, 3) and batch['text'].shape == (4, 4, 2)
  assert batch['clip_text'].shape == (4, 4, 1) and batch['text'][..., 1].all()
  batch = next(pipeline.make_loader(source, data_config(image_size=SIZE), shuffle=False, **options))
  np.testing.assert_array_equal(batch['image'][1], source[1].frames)
  assert batch['text'][1, :, 0].tolist() == [len(c) for c in source.captions(1)[1:]]
  frames = story_shapes.load('train', image_size=SIZE, count=20, unit='frame')
  batch = next(pipeline.make_loader(frames, data_config(image_size=SIZE), shuffle=False, **options))
  np.testing.assert_array_equal(batch['image'][3], source[0].frames[3])


class Marked:
  """Stories of three frames, each dark but for its left half, with vectors and labels; the second lacks a caption."""

  def __len__(self):
    return 3

  def draw(self, index, rng):
    frame = np.zeros((16, 16, 3), np.uint8)
    frame[:, :8] = 255 if rng is None else int(rng.integers(200, 256))
    captions = ['', 'a 1', ' ' if index == 1 else 'a 2']
    return Story([frame] * 3, captions, np.arange(6.0).reshape(3, 2), np.eye(3, dtype=bool))


def test_frames_of_a_story_are_cropped_and_flipped_alike_and_what_is_broken_is_skipped():
  config = data_config(image_size=12, augment='random_crop,flip')
  loader = pipeline.make_loader(Marked(), config, encode_text=encode_text, batch_size=3, seed=0, shuffle=True)
  flipped = set()
  for _, batch in zip(range(10), loader, strict=False):
    assert (batch['image'] == batch['image'][:, :1]).all()
    flipped |= set((batch['image'][:, 0, 0, 0, 0] > 0).tolist())
    assert batch['vectors'].tolist() == [[[2, 3], [4, 5]]] * 3 and batch['labels'].shape == (3, 3, 3)
  assert flipped == {True, False} and loader.skipped


def test_a_story_with_too_few_captions_is_refused():
  with pytest.raises(ValueError, match='a story of 3 frames has 2 captions; expected one for each frame'):
    Story([0, 0, 0], ['', 'a'])
  with pytest.raises(ValueError, match=r'the vectors of a story are \[2, 4\]; expected a row for each frame'):
    Story([0, 0, 0], ['', 'a', 'b'], np.zeros((2, 4)))
