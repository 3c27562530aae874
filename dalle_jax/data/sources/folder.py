"""A folder of NAME.jpg (jpeg, png, webp) with NAME.txt beside it, one caption a line; sub-folders count too."""

import dataclasses
import os
from pathlib import Path

from dalle_jax.data import sources

SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp')


@dataclasses.dataclass(frozen=True)
class Folder:
  """Random-access source: `{'image': bytes of the file, 'caption': first line or '', 'captions': all lines}`."""

  path: str
  pictures: tuple[str, ...] = dataclasses.field(repr=False)  # relative to path, sorted

  def __len__(self) -> int:
    return len(self.pictures)

  def name(self, index: int) -> str:
    return os.path.join(self.path, self.pictures[index])

  def __getitem__(self, index: int) -> dict:
    image = Path(self.name(index)).read_bytes()
    return {'image': image, **sources.caption_fields(lambda: self.captions(index))}

  def captions(self, index: int) -> list[str]:
    text = Path(self.name(index)).with_suffix('.txt')
    lines = text.read_text(encoding='utf-8-sig').splitlines() if text.is_file() else []
    return [line.strip() for line in lines if line.strip()]


def load(split: str, *, path: str, val_fraction: float = 0.05, test_fraction: float = 0.0) -> Folder:
  """The pictures of a split, which a hash of each picture's relative path decides (see `sources.divide`).

  Pictures without a caption stay in: they serve a model that needs none, and are skipped by one that does. Raises
  FileNotFoundError or ValueError when there is no folder, no picture in it, or none in the split.
  """
  root = Path(path).expanduser()
  expected = f'expected a folder of NAME{"|".join(SUFFIXES)} with the caption in NAME.txt'
  if not root.is_dir():
    raise FileNotFoundError(f'config.data.path {path!r} is no folder; {expected}.')
  files = (f for f in sources.visible_files(str(root)) if f.lower().endswith(SUFFIXES))
  found = sorted(Path(f).relative_to(root).as_posix() for f in files)
  if not found:
    raise ValueError(f'config.data.path {path!r} has no pictures; {expected}.')
  # Without the suffix: NAME.jpg and a later NAME.png are the same picture to a reader, and must not cross splits.
  keys = [os.path.splitext(f)[0] for f in found]
  return Folder(str(root), tuple(found[i] for i in sources.divide(keys, split, val_fraction, test_fraction)))
