"""FlintstonesSV: stories of five frames of a cartoon, in the files of the public StoryDALL-E release.

PATH/video_frames_sampled/ID.npy      uint8 [n, H, W, 3], the frames of a clip
PATH/flintstones_annotations_v1-0.json [{globalID, description, characters: [{entityLabel}]}]
PATH/train-val-test_split.json        {train, val, test}: IDs
PATH/following_cache4.pkl             ID -> the next 4 IDs (derived from the IDs where it is missing)
PATH/labels.pkl                       ID -> 7 labels (taken from the annotations where it is missing)
PATH/flintstones_use_embeddings.npy, flintstones_use_embed_idxs.pkl  [N, 512] and ID -> row (optional)
"""

import functools
import os
from collections.abc import Iterable

import numpy as np

from dalle_jax.data import restricted, sources, stories

SPLITS = ('train', 'val', 'test')
LENGTH = 5  # frames of a story, including the source
CHARACTERS = ('Wilma', 'Fred', 'Betty', 'Barney', 'Dino', 'Pebbles', 'Mr Slate')


class Flintstones(stories.Listed):
  """Random-access source of `Story` records: uint8[H, W, 3] frames, each sampled from its own clip."""

  def read(self, name: str, rng: np.random.Generator) -> np.ndarray:
    path = stories.inside(self.root, f'video_frames_sampled/{name}.npy')
    clip = restricted.open_array(path, 'the frames of a clip, uint8 [n, H, W, 3]')
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or not clip.size:
      raise ValueError(f'{path} is {clip.dtype}{list(clip.shape)}; expected uint8 [n, H, W, 3].')
    return np.array(clip[int(rng.integers(len(clip)))])


def followers(ids: Iterable[str]) -> dict[str, list[str]]:
  """ID -> the next 4 in the same season and episode, fewer at its end; IDs are s_SEASON_e_EPISODE_shot_..."""
  ordered = sorted(set(ids))
  episode = {i: (i.split('_')[1], i.split('_')[3]) for i in ordered}
  after = {}
  for k, i in enumerate(ordered):
    after[i] = [j for j in ordered[k + 1 : k + LENGTH] if episode[j] == episode[i]]
  return after


def _vectors(root, names: set[str]) -> dict[str, np.ndarray] | None:
  file, index = root / 'flintstones_use_embeddings.npy', root / 'flintstones_use_embed_idxs.pkl'
  if not file.is_file():
    return None
  table, row = restricted.open_array(file, 'vectors, [N, 512]'), restricted.load(index, 'a dict: ID -> row', dict)
  try:
    return stories.rows(((n, table[int(row[n])]) for n in names if n in row), file, np.float32)
  except (IndexError, TypeError) as e:
    raise ValueError(f'{index} does not fit {file.name} {list(table.shape)} ({e}); expected ID -> row of that.') from e


def load(split: str, *, path: str, unit: str = 'story', seed: int = 0) -> Flintstones | stories.Frames:
  """The stories of a split: one of its clips and the four after it in the episode, whichever split those belong to.

  Without a generator, which frame of a clip is shown depends on `seed` and the numbers of story and frame. Stories with
  fewer than four clips after the first, or that lack a caption, vector or label for a frame, are left out; `report`
  counts them, and also the target frames that are in other splits. Raises FileNotFoundError or ValueError, one line
  that names the file, for a file that is missing, damaged or holds anything but data; for a clip only when it is read.
  """
  sources.check_whole(seed=seed)
  root = stories.folder(path, split, 'the folder of FlintstonesSV, with train-val-test_split.json in it')
  file, cache = root / 'train-val-test_split.json', root / 'following_cache4.pkl'
  notes, label_file = root / 'flintstones_annotations_v1-0.json', root / 'labels.pkl'
  parts = restricted.load(file, 'a dict of lists of IDs: train, val, test', dict)
  annotations = restricted.load(notes, 'a list of {globalID, description, characters}', list)
  following = restricted.load(cache, 'a dict: ID -> the next 4 IDs', dict) if cache.is_file() else None
  known = restricted.load(label_file, 'a dict: ID -> 7 labels', dict) if label_file.is_file() else None
  try:
    ids = {s: [os.fsdecode(i) for i in parts[s]] for s in SPLITS}
    following = followers(i for s in SPLITS for i in ids[s]) if following is None else following
    after = {i: [os.fsdecode(j) for j in following.get(i, ())[: LENGTH - 1]] for i in ids[split]}
    long = [(i, *after[i]) for i in ids[split] if len(after[i]) == LENGTH - 1]
    captions = {a['globalID']: str(a['description']) for a in annotations}
    if known is None:
      present = {a['globalID']: {c['entityLabel'].lower() for c in a['characters']} for a in annotations}
      known = {i: [c.lower() in names for c in CHARACTERS] for i, names in present.items()}
  except (AttributeError, IndexError, KeyError, TypeError) as e:
    raise ValueError(
      f'{root}: {file.name}, {cache.name} or {notes.name} is wrong ({type(e).__name__}: {e}); expected lists train, '
      'val and test of IDs such as s_01_e_02_shot_003, ID -> the next IDs, and {globalID, description, characters}.'
    ) from e
  names = {n for story in long for n in story}
  vectors = _vectors(root, names)
  labels = stories.rows(((n, known[n]) for n in names if n in known), label_file, bool, len(CHARACTERS))
  lines = []
  if short := len(ids[split]) - len(long):
    lines.append(f'{short} of {len(ids[split])} stories are left out: fewer than 4 clips follow the first')
  kept, more = stories.complete(long, caption=captions, vector=vectors, label=labels)
  frame_names = [long[i] for i in kept]
  others = {s: set(ids[s]) for s in SPLITS if s != split}
  lines += more + stories.leakage([story[1:] for story in frame_names], others)
  texts = [[captions[n] for n in story] for story in frame_names]
  reload = functools.partial(load, split, path=path, seed=seed)
  source = Flintstones(root, frame_names, texts, reload, vectors, labels, CHARACTERS, lines, seed)
  return stories.of_unit(source, LENGTH, unit)
