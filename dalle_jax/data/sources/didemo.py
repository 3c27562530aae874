"""DiDeMoSV: stories of three pictures out of videos, in the files of the public StoryDALL-E release.

PATH/train.json, val.json, test.json  [{"desc_to_frame": [[caption, "didemo/..."], ...]}, ...]
PATH/../didemo/...                    the pictures: their names begin with that of the folder, so PATH is .../didemo
PATH/didemo_use_embeds.pkl            such a name -> vector; if there
"""

import functools

import numpy as np

from dalle_jax.data import restricted, stories

LENGTH = 3  # frames of a story, the source included


class Didemo(stories.Listed):
  """Random-access source of `Story` records, whose frames are the bytes of files."""

  def read(self, name: str, rng: np.random.Generator) -> bytes:
    return stories.file_bytes(self.root, name)


def load(split: str, *, path: str, unit: str = 'story') -> Didemo | stories.Frames:
  """The stories of SPLIT.json: the first three of their pictures, captions as they are.

  Stories of fewer pictures, with one of the three missing, or without a vector for one where the others have them, are
  left out, and `report` counts them. Raises FileNotFoundError or ValueError, one line with the file, for what is
  missing, damaged or not data alone.
  """
  folder = stories.folder(path, split, 'the folder didemo, with train.json in it')
  file, root = folder / f'{split}.json', folder.parent
  listed = restricted.load(file, 'a list of {"desc_to_frame": [[caption, name of a picture], ...]}', list)
  try:
    pairs = [[(str(caption), str(name)) for caption, name in story['desc_to_frame']] for story in listed]
  except (KeyError, TypeError, ValueError) as e:
    raise ValueError(f'{file} is wrong ({e}); expected "desc_to_frame": [[caption, picture], ...] a story.') from e
  long = [story[:LENGTH] for story in pairs if len(story) >= LENGTH]
  lines = []
  if len(long) < len(pairs):
    lines.append(f'{len(pairs) - len(long)} of {len(pairs)} stories are left out: fewer than {LENGTH} frames')
  shows = [[name for _, name in story] for story in long]
  names = {n for show in shows for n in show}
  there = {n for n in names if stories.inside(root, n).is_file()}
  if names and not there:
    raise FileNotFoundError(f'{root / min(names)} and all other pictures of {file} are missing; expected them there.')
  vectors = None
  if (table := folder / 'didemo_use_embeds.pkl').is_file():
    found = restricted.load(table, 'a dict: name of a picture -> vector', dict)
    vectors = stories.rows(((n, found[n]) for n in names if n in found), table, np.float32)
  kept, more = stories.whole(shows, file=there, vector=vectors)
  texts = [[caption for caption, _ in long[i]] for i in kept]
  again = functools.partial(load, split, path=path)
  source = Didemo(root, [shows[i] for i in kept], texts, again, vectors, lines=[*lines, *more])
  return stories.of_unit(source, LENGTH, unit)
