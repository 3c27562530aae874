"""DiDeMoSV: stories of three frames from videos, in the files of the public StoryDALL-E release.

PATH/train.json, val.json, test.json  [{"desc_to_frame": [[caption, "didemo/..."], ...]}, ...]
PATH/../didemo/...                    the images: their names begin with that of the folder, so PATH is .../didemo
PATH/didemo_use_embeds.pkl            such a name -> vector (optional)
"""

import functools

import numpy as np

from dalle_jax.data import restricted, stories

LENGTH = 3  # frames of a story, including the source


class Didemo(stories.Listed):
  """Random-access source of `Story` records, whose frames are the bytes of files."""

  def read(self, name: str, rng: np.random.Generator) -> bytes:
    return stories.file_bytes(self.root, name)


def load(split: str, *, path: str, unit: str = 'story') -> Didemo | stories.Frames:
  """The stories of SPLIT.json: their first three images, with captions unchanged.

  Stories are left out, and counted by `report`, when they have fewer images, when one of the three is missing, or when
  there are vectors but one of the three has none. Raises FileNotFoundError or ValueError, one line that names the file,
  for a file that is missing, damaged or holds anything but data.
  """
  folder = stories.folder(path, split, 'the folder didemo, with train.json in it')
  file, root = folder / f'{split}.json', folder.parent
  listed = restricted.load(file, 'a list of {"desc_to_frame": [[caption, name of an image], ...]}', list)
  try:
    pairs = [[(str(caption), str(name)) for caption, name in story['desc_to_frame']] for story in listed]
  except (KeyError, TypeError, ValueError) as e:
    raise ValueError(f'{file} is wrong ({e}); expected "desc_to_frame": [[caption, image], ...] in each story.') from e
  long = [story[:LENGTH] for story in pairs if len(story) >= LENGTH]
  lines = []
  if len(long) < len(pairs):
    lines.append(f'{len(pairs) - len(long)} of {len(pairs)} stories are left out: fewer than {LENGTH} frames')
  frame_names = [[name for _, name in story] for story in long]
  names = {n for story in frame_names for n in story}
  there = {n for n in names if stories.inside(root, n).is_file()}
  if names and not there:
    raise FileNotFoundError(f'{root / min(names)} and all other images of {file} are missing; expected them there.')
  vectors = None
  if (table := folder / 'didemo_use_embeds.pkl').is_file():
    found = restricted.load(table, 'a dict: name of an image -> vector', dict)
    vectors = stories.rows(((n, found[n]) for n in names if n in found), table, np.float32)
  kept, more = stories.complete(frame_names, file=there, vector=vectors)
  texts = [[caption for caption, _ in long[i]] for i in kept]
  reload = functools.partial(load, split, path=path)
  source = Didemo(root, [frame_names[i] for i in kept], texts, reload, vectors, lines=[*lines, *more])
  return stories.of_unit(source, LENGTH, unit)
