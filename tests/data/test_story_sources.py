"""The published story data sets are read as their release lays them out; here are small ones of exactly that form."""

import itertools
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from dalle_jax.data import ops, sources
from dalle_jax.data.sources import clevr_sv, didemo, flintstones, pororo
from tests.data.fakes import data_config
from tests.data.test_restricted import Runs, python2, write_npy

# --- PororoSV: clip k of the folder has the colour (k, frame, 0), k + 1 frames of 4 pixels, and the caption 'Clip k'

CLIPS = [f'Pororo_ENGLISH1_1/Pororo_ENGLISH1_1_ep{k // 6}/{k}.png' for k in range(12)]


def strip(path, k, frames):
  pixels = np.zeros((frames * 4 + 1, 4, 3), np.uint8)  # one row more than they need
  pixels[..., 0], pixels[: frames * 4, :, 1] = k, np.repeat(np.arange(frames), 4)[:, None]
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(path)


@pytest.fixture
def pororo_folder(tmp_path):
  return write_pororo(tmp_path / 'pororo')


def write_pororo(root, dtype='S'):
  for k, name in enumerate(CLIPS):
    strip(root / name, k, k + 1)
  np.save(root / 'img_cache4.npy', np.array(CLIPS[:8], dtype))
  np.save(root / 'following_cache4.npy', np.array([CLIPS[k + 1 : k + 5] for k in range(8)], dtype))
  parts = np.empty(3, object)
  parts[:] = [np.array([0, 1, 2, 3]), np.array([7]), np.array([5, 6])]
  write_npy(root / 'train_seen_unseen_ids.npy', parts)
  write_npy(root / 'descriptions.npy', {n[:-4]: [f'Clip {k}.', 'Another'] for k, n in enumerate(CLIPS)})
  return root


def write_pororo_tables(root):
  vectors = {n[:-4]: [np.full(512, k, np.float32)] for k, n in enumerate(CLIPS)}
  (root / 'descriptions_vec_512.pkl').write_bytes(python2(vectors))
  write_npy(root / 'labels.npy', {n[:-4]: np.eye(9)[k % 9] for k, n in enumerate(CLIPS)})


@pytest.mark.parametrize('dtype', ['S', 'U'])
def test_pororo_frame_by_frame(tmp_path, dtype):
  root = write_pororo(tmp_path / 'pororo', dtype)
  source = pororo.load('train', path=str(root))
  assert [len(pororo.load(s, path=str(root))) for s in pororo.SPLITS] == [4, 1, 2]
  assert source.name(2) == CLIPS[2] and pororo.load('test', path=str(root)).name(1) == CLIPS[6]
  assert source.captions(2) == [f'clip {k}.' for k in range(2, 7)]
  story = source[2]
  assert story.captions == source.captions(2) and story.vectors is None and story.labels is None
  assert source.label_names == ()
  for k, frame in zip(range(2, 7), story.frames, strict=True):
    assert frame.shape == (4, 4, 3) and frame.dtype == np.uint8
    assert (frame[..., 0] == k).all() and (frame[..., 1] == frame[0, 0, 1]).all() and frame[0, 0, 1] <= k


def test_pororo_vectors_and_labels(pororo_folder):
  write_pororo_tables(pororo_folder)
  source = pororo.load('test', path=str(pororo_folder))
  story = source[1]
  assert story.vectors.dtype == np.float32 and story.vectors.shape == (5, 512)
  assert story.vectors[:, 7].tolist() == [6, 7, 8, 9, 10]
  assert story.labels.dtype == bool and story.labels.argmax(1).tolist() == [6, 7, 8, 0, 1]
  assert source.label_names[:3] == ('Pororo', 'Loopy', 'Crong') and len(source.label_names) == 9


def numbers(story):
  return [int(f[0, 0, 1]) for f in story.frames]


def test_frames_repeat_without_a_generator_and_vary_with_one(pororo_folder):
  source = pororo.load('test', path=str(pororo_folder))
  again = pickle.loads(pickle.dumps(source))
  assert numbers(source[1]) == numbers(source[1]) == numbers(again[1])
  pororo.load('test', path=str(pororo_folder))[0]  # whatever was drawn before
  seeded = {tuple(numbers(pororo.load('test', path=str(pororo_folder), seed=s)[1])) for s in range(4)}
  drawn = {tuple(numbers(source.draw(1, np.random.default_rng(s)))) for s in range(20)}
  assert len(seeded) > 1 and len(drawn) > 10
  assert {n[4] for n in drawn} > {0, 9}  # from the first to the last of the strip
  assert numbers(source.draw(1, np.random.default_rng(3))) == numbers(source.draw(1, np.random.default_rng(3)))


def test_a_pickled_source_holds_no_tables(pororo_folder):
  write_pororo_tables(pororo_folder)
  for unit in ('story', 'frame'):
    source = pororo.load('train', path=str(pororo_folder), unit=unit, seed=3)
    assert len(pickle.dumps(source)) < 1000
    again = pickle.loads(pickle.dumps(source))
    assert len(again) == len(source) and again.captions(3) == source.captions(3) and again.report() == source.report()
    assert again.label_names == source.label_names == pororo.CHARACTERS


def test_single_frames(pororo_folder):
  write_pororo_tables(pororo_folder)
  load = lambda unit: sources.load(
    data_config(source='pororo', path=str(pororo_folder), source_args=dict(unit=unit)), 'test'
  )
  stories, frames = load('story'), load('frame')
  assert len(frames) == 10 and frames.name(7) == f'{CLIPS[6]}, frame 2' and frames.captions(7) == ['clip 8.']
  (pororo_folder / CLIPS[9]).unlink()  # a neighbour in the story: a picture is read alone
  record = frames.draw(7, None)
  assert record['caption'] == 'clip 8.' and record['labels'].tolist() == (np.arange(9) == 8).tolist()
  assert record['image'][0, 0].tolist() == stories.frame(1, 2, None)[0, 0].tolist()
  with pytest.raises(ValueError, match="unit is 'clip'; expected"):
    load('clip')


def raises_one_line(error, message, call, *args, **kwargs):
  with pytest.raises(error, match=message) as e:
    call(*args, **kwargs)
  assert '\n' not in str(e.value)


def test_pororo_broken_strips_raise_when_they_are_drawn(pororo_folder):
  source = pororo.load('train', path=str(pororo_folder))
  path = pororo_folder / CLIPS[4]
  Image.new('RGB', (8, 7)).save(path)
  raises_one_line(ValueError, r'ep0/4\.png cannot be used \(it is 8 x 7 pixels\)', source.draw, 0, None)
  path.write_bytes(b'no picture')
  raises_one_line(ValueError, r'ep0/4\.png cannot be used \(cannot identify', source.draw, 0, None)
  path.write_bytes((pororo_folder / CLIPS[5]).read_bytes()[:-30])
  raises_one_line(ValueError, r'ep0/4\.png cannot be used', source.draw, 0, None)
  path.unlink()
  raises_one_line(FileNotFoundError, r'ep0/4\.png is missing', source.draw, 0, None)
  assert source.captions(0)[4] == 'clip 4.'


def test_pororo_reports_leakage_and_what_it_leaves_out(pororo_folder):
  source = pororo.load('test', path=str(pororo_folder))  # targets 6 .. 10; train has 0 .. 7, val 7 .. 11
  assert source.report() == [
    '3 target frames of 2 of 2 stories are also frames of train',
    '7 target frames of 2 of 2 stories are also frames of val',
  ]
  write_npy(pororo_folder / 'descriptions.npy', {n[:-4]: [n] for n in CLIPS[:10]})
  source = pororo.load('test', path=str(pororo_folder))
  assert len(source) == 1 and source.report()[0].startswith('1 of 2 stories are left out: a frame has no caption')
  raises_one_line(ValueError, 'no story for this split: 1 of 1', pororo.load, 'val', path=str(pororo_folder))


def test_pororo_wrong_files_are_named(pororo_folder):
  load = lambda split='train': pororo.load(split, path=str(pororo_folder))
  raises_one_line(ValueError, "has the split 'dev'; expected one of train, val, test", load, 'dev')
  raises_one_line(FileNotFoundError, 'gone.* is not a folder', pororo.load, 'train', path=str(pororo_folder / 'gone'))
  for name in ('img_cache4.npy', 'following_cache4.npy', 'train_seen_unseen_ids.npy', 'descriptions.npy'):
    kept = (pororo_folder / name).read_bytes()
    (pororo_folder / name).write_bytes(kept[:-5])
    raises_one_line(ValueError, f'{name} cannot be read', load)
    (pororo_folder / name).unlink()
    raises_one_line(FileNotFoundError, f'{name} is missing; expected', load)
    (pororo_folder / name).write_bytes(kept)
  write_pororo_tables(pororo_folder)
  write_npy(pororo_folder / 'labels.npy', {n[:-4]: np.eye(8)[0] for n in CLIPS})
  raises_one_line(ValueError, r'labels\.npy has \[8\] numbers .*expected \[9\]', load)
  np.save(pororo_folder / 'train_seen_unseen_ids.npy', [[0, 1], [2, 3], [4, 8]])
  raises_one_line(ValueError, 'has the index 8; expected less than 8', load)
  np.save(pororo_folder / 'img_cache4.npy', ['../secret.png'] * 7)
  raises_one_line(ValueError, r'img_cache4\.npy is \[7\]', load)


def test_names_do_not_lead_out_of_the_folder(pororo_folder):
  np.save(pororo_folder / 'img_cache4.npy', ['../secret.png'] * 8)
  write_npy(pororo_folder / 'descriptions.npy', {n.removesuffix('.png'): ['x'] for n in ['../secret.png', *CLIPS]})
  raises_one_line(ValueError, 'leads out of', pororo.load('train', path=str(pororo_folder)).draw, 0, None)


def test_a_hostile_table_is_refused_and_not_run(pororo_folder):
  mark = pororo_folder / 'mark'
  hostile = pickle.dumps({'a': Runs(exec, f'open({str(mark)!r}, "w")')})
  write_pororo_tables(pororo_folder)
  for name in ('descriptions_vec_512.pkl', 'labels.npy', 'descriptions.npy', 'train_seen_unseen_ids.npy'):
    kept = (pororo_folder / name).read_bytes()
    for body in (hostile, kept[:128] + hostile):  # as a pickle, and behind the header of a .npy file
      (pororo_folder / name).write_bytes(body if name.endswith('npy') else hostile)
      raises_one_line(ValueError, rf'{name} is refused.* builtins\.exec', pororo.load, 'train', path=str(pororo_folder))
    (pororo_folder / name).write_bytes(kept)
  assert not mark.exists()


# --- FlintstonesSV: clip k of episode e has the colour (k, frame, e)

EPISODES = {1: 8, 2: 6, 3: 4}  # episode -> clips


def clip(e, k):
  return f's_01_e_{e:02d}_shot_{k:06d}_{k + 75:06d}'


@pytest.fixture
def flintstones_folder(tmp_path):
  root = tmp_path / 'flintstones'
  (root / 'video_frames_sampled').mkdir(parents=True)
  every = [(e, k) for e, count in EPISODES.items() for k in range(count)]
  for e, k in every:
    frames = np.zeros((k + 2, 6, 6, 3), np.uint8)
    frames[..., 0], frames[..., 1], frames[..., 2] = k, np.arange(k + 2)[:, None, None], e
    np.save(root / 'video_frames_sampled' / f'{clip(e, k)}.npy', frames)
  notes = [
    {
      'globalID': clip(e, k),
      'description': f'Fred does {k} in {e}.',
      'characters': [{'entityLabel': n} for n in (['fred', 'mr slate'] if k % 2 else ['wilma', 'a policeman'])],
    }
    for e, k in reversed(every)
  ]
  (root / 'flintstones_annotations_v1-0.json').write_text(json.dumps(notes))
  ids = [clip(e, k) for e, k in every]
  split = {'train': ids[:3] + ids[8:9], 'val': [ids[5]], 'test': sorted({*ids[3:8], *ids[9:]} - {ids[5]}, reverse=True)}
  (root / 'train-val-test_split.json').write_text(json.dumps(split))
  return root


def test_flintstones_frame_by_frame(flintstones_folder):
  source = flintstones.load('train', path=str(flintstones_folder))
  assert len(source) == 4 and source.name(3) == clip(2, 0)
  story = source[1]
  assert story.captions == source.captions(1) == [f'Fred does {k} in 1.' for k in range(1, 6)]
  assert [f.shape for f in story.frames] == [(6, 6, 3)] * 5 and story.vectors is None
  assert [f[0, 0, 0] for f in story.frames] == [1, 2, 3, 4, 5] and {f[0, 0, 2] for f in story.frames} == {1}
  assert all(f[0, 0, 1] == f[5, 5, 1] <= k + 1 for k, f in enumerate(story.frames, 1))
  assert numbers(story) == numbers(source[1])
  assert len({tuple(numbers(source.draw(1, np.random.default_rng(s)))) for s in range(20)}) > 10
  names = np.array(source.label_names)
  assert [names[row].tolist() for row in story.labels[:2]] == [['Fred', 'Mr Slate'], ['Wilma']]


def test_flintstones_followers_are_worked_out_as_they_are_cached(flintstones_folder):
  splits = ('train', 'test')
  rebuilt = [flintstones.load(s, path=str(flintstones_folder)).frame_names for s in splits]
  cache = {clip(e, k): [clip(e, k + j) for j in range(1, 5)] for e, n in EPISODES.items() for k in range(n - 4)}
  (flintstones_folder / 'following_cache4.pkl').write_bytes(python2(cache))
  assert [flintstones.load(s, path=str(flintstones_folder)).frame_names for s in splits] == rebuilt
  cache[clip(1, 0)] = [clip(3, k) for k in (3, 1, 0, 2)]  # where there is a cache it decides
  (flintstones_folder / 'following_cache4.pkl').write_bytes(pickle.dumps(cache))
  assert flintstones.load('train', path=str(flintstones_folder)).frame_names[0][1] == clip(3, 3)


def test_flintstones_counts_short_stories_and_leakage(flintstones_folder):
  # Stories of train begin at clips 0, 1, 2 of episode 1 and 0 of 2; val is 5 of 1, test has all other clips.
  train = flintstones.load('train', path=str(flintstones_folder))
  assert train.report() == [
    '2 target frames of 2 of 4 stories are also frames of val',
    '11 target frames of 4 of 4 stories are also frames of test',
  ]
  test = flintstones.load('test', path=str(flintstones_folder))
  assert sorted(test.name(i) for i in range(len(test))) == [clip(1, 3), clip(2, 1)]
  assert test.report()[0] == '11 of 13 stories are left out: fewer than 4 clips follow the first'
  raises_one_line(ValueError, 'no story for this split: 1 of 1', flintstones.load, 'val', path=str(flintstones_folder))


def test_flintstones_vectors_and_labels_of_files(flintstones_folder):
  ids = [clip(e, k) for e, n in EPISODES.items() for k in range(n)]
  np.save(flintstones_folder / 'flintstones_use_embeddings.npy', np.arange(18.0)[:, None] * np.ones(512))
  index = flintstones_folder / 'flintstones_use_embed_idxs.pkl'
  index.write_bytes(python2({n: 17 - k for k, n in enumerate(ids)}))
  (flintstones_folder / 'labels.pkl').write_bytes(python2({n: np.eye(7)[k % 7] for k, n in enumerate(ids)}))
  source = flintstones.load('train', path=str(flintstones_folder))
  story = source[1]
  assert story.vectors.shape == (5, 512) and story.vectors.dtype == np.float32
  assert story.vectors[:, 9].tolist() == [16, 15, 14, 13, 12] and story.labels.argmax(1).tolist() == [1, 2, 3, 4, 5]
  index.write_bytes(pickle.dumps(dict.fromkeys(ids, 18)))
  raises_one_line(ValueError, r'idxs\.pkl does not fit', flintstones.load, 'train', path=str(flintstones_folder))


def test_flintstones_broken_clips_and_files(flintstones_folder):
  source = flintstones.load('train', path=str(flintstones_folder))
  path = flintstones_folder / 'video_frames_sampled' / f'{clip(1, 2)}.npy'
  whole = path.read_bytes()
  for body in (whole[:-9], b'junk', pickle.dumps(Runs(exec, 'raise SystemExit'))):
    path.write_bytes(body)
    raises_one_line(ValueError, f'{clip(1, 2)}.npy cannot be read', source.draw, 0, None)
  np.save(path, np.zeros((2, 6, 6), np.uint8))
  raises_one_line(ValueError, r'is uint8\[2, 6, 6\]; expected uint8 \[n, H, W, 3\]', source.draw, 0, None)
  path.unlink()
  raises_one_line(FileNotFoundError, f'{clip(1, 2)}.npy is missing', source.draw, 0, None)
  assert len(source[3].frames) == 5
  load = lambda: flintstones.load('train', path=str(flintstones_folder))
  (flintstones_folder / 'following_cache4.pkl').write_bytes(pickle.dumps(Runs(exec, 'raise SystemExit')))
  raises_one_line(ValueError, r'following_cache4\.pkl is refused.* builtins\.exec', load)
  for body in ('{"train": ["a"]}', '{"train": [1], "val": [], "test": []}', '{"train": ["a"], "val": [], "test": []}'):
    (flintstones_folder / 'following_cache4.pkl').unlink(missing_ok=True)
    (flintstones_folder / 'train-val-test_split.json').write_text(body)
    raises_one_line(ValueError, r'train-val-test_split\.json.* is wrong', load)
  (flintstones_folder / 'train-val-test_split.json').unlink()
  raises_one_line(FileNotFoundError, r'train-val-test_split\.json is missing', load)


# --- DiDeMoSV


@pytest.fixture
def didemo_folder(tmp_path):
  root = tmp_path / 'didemo'
  names = [f'didemo/images/v{v}_{k}.png' for v in range(4) for k in range(4)]
  (root / 'images').mkdir(parents=True)
  for k, name in enumerate(names):
    Image.new('RGBA' if k % 2 else 'L', (9, 7), (k, 0, 0, 255) if k % 2 else k).save(tmp_path / name)
  (tmp_path / names[9]).unlink()  # the second of story 2
  lengths = (3, 4, 3, 2)
  story = lambda v: {'desc_to_frame': [[f'A Man {v} {k}', names[4 * v + k]] for k in range(lengths[v])]}
  for split in ('train', 'val', 'test'):
    stories = [story(v) for v in range(4)] if split == 'train' else [story(1)]
    (root / f'{split}.json').write_text(json.dumps(stories))
  return root


def test_didemo_frame_by_frame(didemo_folder):
  source = didemo.load('train', path=str(didemo_folder))
  assert len(source) == 2 and [len(didemo.load(s, path=str(didemo_folder))) for s in ('val', 'test')] == [1, 1]
  story = source[1]
  assert story.captions == source.captions(1) == ['A Man 1 0', 'A Man 1 1', 'A Man 1 2']
  pictures = [ops.decode(f) for f in story.frames]
  assert [p.shape for p in pictures] == [(7, 9, 3)] * 3 and [int(p[0, 0, 0]) for p in pictures] == [4, 5, 6]
  assert source.name(1) == 'didemo/images/v1_0.png' and story.labels is None and source.label_names == ()
  assert source.report() == [
    '1 of 4 stories are left out: fewer than 3 frames',
    '1 of 3 stories are left out: a frame has no file, such as didemo/images/v2_1.png',
  ]
  assert len(didemo.load('train', path=str(didemo_folder), unit='frame')) == 6
  assert pickle.loads(pickle.dumps(source)).captions(0) == source.captions(0)


def test_didemo_vectors(didemo_folder):
  table = {f'didemo/images/v{v}_{k}.png': np.full(512, 4 * v + k, np.float32) for v in range(4) for k in range(4)}
  (didemo_folder / 'didemo_use_embeds.pkl').write_bytes(pickle.dumps(table))
  assert didemo.load('train', path=str(didemo_folder))[1].vectors[:, 0].tolist() == [4, 5, 6]
  del table['didemo/images/v1_2.png']
  (didemo_folder / 'didemo_use_embeds.pkl').write_bytes(pickle.dumps(table))
  source = didemo.load('train', path=str(didemo_folder))
  assert len(source) == 1 and 'no vector, such as didemo/images/v1_2.png' in source.report()[2]


def test_didemo_wrong_files(didemo_folder):
  load = lambda path=didemo_folder: didemo.load('train', path=str(path))
  other = didemo_folder.parent / 'elsewhere' / 'd'
  other.mkdir(parents=True)
  (other / 'train.json').write_bytes((didemo_folder / 'train.json').read_bytes())
  raises_one_line(FileNotFoundError, r'elsewhere/didemo/images/v0_0\.png and all other', load, other)
  for body, message in (
    ('[', 'cannot be read'),
    ('{}', 'contains a dict; expected a list'),
    ('[{}]', "'desc_to_frame'"),
    ('[{"desc_to_frame": [["a"]]}]', 'is wrong'),
    ('[]', 'no story for this split'),
    (json.dumps([{'desc_to_frame': [['a', '/etc/passwd']] * 3}]), 'leads out of'),
  ):
    (didemo_folder / 'train.json').write_text(body)
    raises_one_line(ValueError, message, load)
  (didemo_folder / 'train.json').unlink()
  raises_one_line(FileNotFoundError, r'train\.json is missing', load)


# --- CLEVR-SV

RIGHT = np.array([0.6, 0.8, 0.0])


def thing(shape, color, material, size, way):
  one = lambda names, name: np.eye(len(names))[names.index(name)]
  what = one(clevr_sv.SHAPES, shape), one(clevr_sv.COLORS, color), one(clevr_sv.MATERIALS, material)
  return np.concatenate([*what, one(clevr_sv.SIZES, size), way * RIGHT + [0, 0, 0.35]])


THINGS = [
  thing('sphere', 'green', 'rubber', 'small', -2.5),
  thing('cube', 'gray', 'metal', 'large', 0.1),
  thing('cylinder', 'yellow', 'metal', 'small', 3.0),
  thing('cube', 'gray', 'rubber', 'large', 1.5),
]


@pytest.fixture
def clevr_folder(tmp_path):
  root = tmp_path / 'clevr_sv'
  (root / 'images').mkdir(parents=True)
  table = {}
  for number, k in itertools.product(range(100, 196), range(1, 5)):
    name = f'CLEVR_new_{number:06d}_{k}.png'
    shown = [THINGS[(number + j) % 4] for j in range(k)] + [np.zeros(18)] * (4 - k)
    table[name] = np.concatenate([*shown, RIGHT])
    if number in (100, 172):
      Image.new('RGBA', (8, 6), (number, k, 0, 255)).save(root / 'images' / name)
  write_npy(root / 'CLEVR_dict.npy', table)
  return root


def test_clevr_captions_tell_what_a_frame_adds(clevr_folder):
  source = clevr_sv.load('train', path=str(clevr_folder))
  story = source[0]
  assert (
    story.captions
    == source.captions(0)
    == [
      'a small green rubber sphere on the left',
      'a large gray metal cube in the middle',
      'a small yellow metal cylinder on the right',
      'a large gray rubber cube on the right',
    ]
  )
  assert source.captions(1) == [*story.captions[1:], story.captions[0]]
  assert [ops.decode(f)[0, 0].tolist() for f in story.frames] == [[100, k, 0] for k in range(1, 5)]
  names = np.array(source.label_names)
  assert len(names) == 24 and story.labels.dtype == bool
  assert [set(names[row]) for row in story.labels] == [
    {'green sphere'},
    {'green sphere', 'gray cube'},
    {'green sphere', 'gray cube', 'yellow cylinder'},
    {'green sphere', 'gray cube', 'yellow cylinder'},
  ]
  assert source.report() == [] and story.vectors is None
  frames = clevr_sv.load('train', path=str(clevr_folder), unit='frame')
  assert len(frames) == 288 and frames[2]['caption'] == story.captions[2]
  assert frames.label_names == source.label_names and frames[2]['labels'].tolist() == story.labels[2].tolist()


def test_clevr_splits(clevr_folder):
  load = lambda split, **kwargs: clevr_sv.load(split, path=str(clevr_folder), **kwargs)
  stories = lambda source: [int(source.name(i).split('_')[2]) for i in range(len(source))]
  assert stories(load('train')) == [*range(100, 172)] and stories(load('test')) == [*range(172, 196)]
  assert stories(load('train', val_stories=6)) == [*range(100, 166)]
  assert stories(load('val', val_stories=6)) == [*range(166, 172)]
  assert stories(pickle.loads(pickle.dumps(load('val', val_stories=6)))) == [*range(166, 172)]
  raises_one_line(ValueError, r'set config\.data\.source_args\.val_stories .*val_split="test"', load, 'val')
  raises_one_line(ValueError, 'val_stories is 72; expected 0 to 71', load, 'train', val_stories=72)


def test_clevr_wrong_files(clevr_folder):
  load = lambda: clevr_sv.load('test', path=str(clevr_folder))
  raises_one_line(FileNotFoundError, r'CLEVR_new_000173_1\.png is missing', load().draw, 1, None)
  file = clevr_folder / 'CLEVR_dict.npy'
  name = 'CLEVR_new_000172_1.png'
  write_npy(file, {name: np.zeros(74)})
  raises_one_line(ValueError, r'CLEVR_dict\.npy has \[74\] numbers.*expected \[75\]', load)
  write_npy(file, {name: np.full(75, 0.5)})
  raises_one_line(ValueError, r'CLEVR_dict\.npy is wrong for', load)
  write_npy(file, {f'CLEVR_new_000172_{k}.png': np.concatenate([*THINGS, RIGHT]) for k in range(1, 5)})
  raises_one_line(ValueError, 'no story for this split: 24 of 24 stories are left out: a frame has no desc', load)
  file.write_bytes(b'junk')
  raises_one_line(ValueError, r'CLEVR_dict\.npy cannot be read', load)
  file.unlink()
  raises_one_line(FileNotFoundError, r'CLEVR_dict\.npy is missing', load)
