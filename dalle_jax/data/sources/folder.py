"""A folder of NAME.jpg (jpeg, png, webp), each with its captions, one per line, in NAME.txt; sub-folders included."""

import dataclasses
import os
from pathlib import Path

from dalle_jax.data import sources

SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp')


@dataclasses.dataclass(frozen=True)
class Folder:
  """Random-access source: `{'image': bytes of the file, 'caption': first line or '', 'captions': all lines}`."""

  path: str
  images: tuple[str, ...] = dataclasses.field(repr=False)  # relative to path, sorted
  lines: tuple[str, ...] = ()  # what `report` returns

  def __len__(self) -> int:
    return len(self.images)

  def name(self, index: int) -> str:
    return os.path.join(self.path, self.images[index])

  def __getitem__(self, index: int) -> dict:
    image = Path(self.name(index)).read_bytes()
    return {'image': image, **sources.caption_fields(lambda: self.captions(index))}

  def captions(self, index: int) -> list[str]:
    files = (Path(self.name(index)).with_suffix(suffix) for suffix in ('.txt', '.TXT'))
    text = next((f for f in files if f.is_file()), None)
    return sources.caption_lines(text.read_bytes(), str(text)) if text else []

  def report(self) -> list[str]:
    return list(self.lines)


def load(split: str, *, path: str, val_fraction: float = 0.05, test_fraction: float = 0.0) -> Folder:
  """The images of a split, which is decided by a hash of each image's relative path (see `sources.divide`).

  Images without a caption are included: a model that needs none uses them, and one that needs captions skips them.
  Linked folders are read, too, and `report` counts the folders that cannot be read. Raises FileNotFoundError or
  ValueError when there is no such folder, no image in it, or none in the split.
  """
  root = Path(path).expanduser()
  expected = f'expected a folder of NAME{"|".join(SUFFIXES)} with the caption in NAME.txt'
  if not root.is_dir():
    raise FileNotFoundError(f'config.data.path {path!r} is not a folder; {expected}.')
  files, lines = sources.visible_files(str(root))
  found = sorted(Path(f).relative_to(root).as_posix() for f in files if f.lower().endswith(SUFFIXES))
  if not found:
    raise ValueError(f'config.data.path {path!r} has no images; {"; ".join([expected, *lines])}.')
  # Without the suffix, so that NAME.jpg and NAME.png, two versions of one image, are never in different splits.
  keys = [os.path.splitext(f)[0] for f in found]
  chosen = sources.divide(keys, split, val_fraction, test_fraction)
  return Folder(str(root), tuple(found[i] for i in chosen), tuple(lines))
