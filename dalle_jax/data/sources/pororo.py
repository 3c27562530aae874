"""PororoSV: stories of five frames of a cartoon, in the files of the public StoryDALL-E release.

PATH/Pororo_ENGLISH1_1/Pororo_ENGLISH1_1_ep12/26.png  the frames of a clip, stacked vertically
PATH/img_cache4.npy, following_cache4.npy             names of such files: [S] first frames, [S, 4] frames after them
PATH/train_seen_unseen_ids.npy                        indices into these lists: train, val (seen), test (unseen)
PATH/descriptions.npy                                 name without .png -> captions
PATH/descriptions_vec_512.pkl, labels.npy             name without .png -> [vector, ...] and 9 labels (optional)
"""

import functools
import operator
import os

import numpy as np
from PIL import Image

from dalle_jax.data import ops, restricted, sources, stories

SPLITS = ('train', 'val', 'test')
LENGTH = 5  # frames of a story, including the source
CHARACTERS = ('Pororo', 'Loopy', 'Crong', 'Eddy', 'Poby', 'Petty', 'Tongtong', 'Rody', 'Harry')


class Pororo(stories.Listed):
  """Random-access source of `Story` records: uint8[w, w, 3] frames, each sampled from its own strip."""

  def read(self, name: str, rng: np.random.Generator) -> np.ndarray:
    path = stories.inside(self.root, name)
    if not path.is_file():
      raise FileNotFoundError(f'{path} is missing; expected a strip of frames.')
    try:
      with Image.open(path) as strip:
        width, height = strip.size
        if height < width:
          raise ValueError(f'it is {width} x {height} pixels')
        top = width * int(rng.integers(height // width))
        return ops.decode(strip.crop((0, top, width, top + width)))
    except Exception as e:  # the exceptions that Pillow raises for broken files have no common class
      why = ' '.join(str(e).split())
      raise ValueError(f'{path} cannot be used ({why}); expected square frames, stacked vertically.') from e


def _lists(root) -> tuple[list[list[str]], dict[str, list[int]]]:
  """The frame names of all stories, S x 5, and the indices of each split. Raises FileNotFoundError or ValueError."""
  first = restricted.load(root / 'img_cache4.npy', 'the [S] names of first frames', np.ndarray)
  after = restricted.load(root / 'following_cache4.npy', 'the [S, 4] names of the frames after them', np.ndarray)
  if first.ndim != 1 or after.shape != (len(first), LENGTH - 1):
    raise ValueError(
      f'{root}: img_cache4.npy is {list(first.shape)} and following_cache4.npy {list(after.shape)}; expected names, '
      '[S] and [S, 4].'
    )
  file = root / 'train_seen_unseen_ids.npy'
  parts = restricted.load(file, 'three lists of indices: train, seen, unseen', (np.ndarray, list, tuple))
  try:
    names = [[os.fsdecode(n) for n in (source, *targets)] for source, targets in zip(first, after, strict=True)]
    ids = dict(zip(SPLITS, ([operator.index(i) for i in part] for part in parts), strict=True))
  except (TypeError, ValueError) as e:
    raise ValueError(f'{file} or a cache next to it is wrong ({e}); expected names and three lists of indices.') from e
  if bad := [i for part in ids.values() for i in part if not 0 <= i < len(names)]:
    raise ValueError(f'{file} has the index {bad[0]}; expected less than {len(names)}, the number of stories.')
  return names, ids


def load(split: str, *, path: str, unit: str = 'story', seed: int = 0) -> Pororo | stories.Frames:
  """The stories of a split: train, val (episodes seen in training) or test (unseen ones), captions in lower case.

  Without a generator, which frame of a strip is shown depends on `seed` and the numbers of story and frame. Stories
  that lack a caption, vector or label for a frame are left out, and `report` counts them. Raises FileNotFoundError or
  ValueError, one line that names the file, for a file that is missing, damaged or holds anything but data.
  """
  sources.check_whole(seed=seed)
  root = stories.folder(path, split, 'the folder of PororoSV, with img_cache4.npy in it')
  every, ids = _lists(root)
  frame_names = [every[i] for i in ids[split]]
  names = {n for story in frame_names for n in story}

  def table(file: str, what: str) -> dict:  # restricted to the frames of this split
    found = restricted.load(root / file, what, dict)
    return {n: found[n.removesuffix('.png')] for n in names if n.removesuffix('.png') in found}

  try:
    found = table('descriptions.npy', 'a dict: name without .png -> captions')
    captions = {n: os.fsdecode(c if isinstance(c, str) else c[0]).lower() for n, c in found.items() if len(c)}
    vectors = labels = None
    if (file := root / 'descriptions_vec_512.pkl').is_file():
      found = table(file.name, 'a dict: name without .png -> [vector, ...]')
      vectors = stories.rows(((n, v[0]) for n, v in found.items() if len(v)), file, np.float32)
  except (TypeError, KeyError, IndexError) as e:
    raise ValueError(f'{root}: a caption or vector is not in a list ({e}); expected name -> [first, ...].') from e
  if (file := root / 'labels.npy').is_file():
    found = table(file.name, 'a dict: name without .png -> 9 labels')
    labels = stories.rows(found.items(), file, bool, len(CHARACTERS))
  kept, lines = stories.complete(frame_names, caption=captions, vector=vectors, label=labels)
  frame_names = [frame_names[i] for i in kept]
  others = {s: {n for i in part for n in every[i]} for s, part in ids.items() if s != split}
  lines += stories.leakage([story[1:] for story in frame_names], others)
  texts = [[captions[n] for n in story] for story in frame_names]
  reload = functools.partial(load, split, path=path, seed=seed)
  source = Pororo(root, frame_names, texts, reload, vectors, labels, CHARACTERS if labels else (), lines, seed)
  return stories.of_unit(source, LENGTH, unit)
