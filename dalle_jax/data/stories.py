"""One record type for every kind of story: images in order, each with a caption. Frame 0 is the source of the others.

Axis legend: F frames including the source, C labels, d the width of sentence embeddings.
"""

import dataclasses
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

SPLITS = ('train', 'val', 'test')


@dataclasses.dataclass(frozen=True)
class Story:
  """A source frame and its continuation. Raises ValueError unless there is a caption for every frame.

  Attributes:
    frames: F images, each of any kind that `ops.to_rgb` reads: bytes of a file, uint8[H, W, 3] or a PIL image.
    captions: F strings; that of the source frame may be ''.
    vectors: float32[F, d], sentence embeddings of the captions, or None.
    labels: bool[F, C], which characters or objects are in each frame, or None.
  """

  frames: Sequence[Any]
  captions: Sequence[str]
  vectors: np.ndarray | None = None
  labels: np.ndarray | None = None

  def __post_init__(self):
    if len(self.frames) != len(self.captions) or len(self.frames) < 2:
      raise ValueError(
        f'a story of {len(self.frames)} frames has {len(self.captions)} captions; expected one for each frame.'
      )
    for name in ('vectors', 'labels'):
      values = getattr(self, name)
      if values is not None and (values.ndim != 2 or len(values) != len(self.frames)):
        raise ValueError(f'the {name} of a story are {list(values.shape)}; expected a row for each frame.')


class StorySource(Protocol):
  """Random access to stories.

  `draw(index, rng)` returns a record of which some parts are random, such as which frame of a clip is shown. With None
  they depend on the index only, so that evaluation is repeatable. `report()` returns a line for everything worth
  knowing about the split, such as leakage.
  """

  label_names: tuple[str, ...]

  def __len__(self) -> int: ...

  def name(self, index: int) -> str: ...

  def captions(self, index: int) -> list[str]: ...

  def draw(self, index: int, rng: np.random.Generator | None) -> Story: ...

  def report(self) -> list[str]: ...


@dataclasses.dataclass(frozen=True)
class Frames:
  """Every frame of every story as a single image with its caption, for networks that take single images.

  Random-access source: `{'image': the frame, 'caption': str}` and, where the stories have them, `labels` bool[C].
  """

  stories: Any
  length: int  # F

  def __len__(self) -> int:
    return len(self.stories) * self.length

  def name(self, index: int) -> str:
    return f'{self.stories.name(index // self.length)}, frame {index % self.length}'

  def captions(self, index: int) -> list[str]:
    return [self.stories.captions(index // self.length)[index % self.length]]

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.draw(index, None)

  def report(self) -> list[str]:
    return self.stories.report()

  @property
  def label_names(self) -> tuple[str, ...]:
    return self.stories.label_names

  def draw(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
    if hasattr(self.stories, 'draw_frame'):  # opens one image where `draw` would open all of them
      return self.stories.draw_frame(*divmod(index, self.length), rng)
    story, frame = self.stories.draw(index // self.length, rng), index % self.length
    record = {'image': story.frames[frame], 'caption': story.captions[frame]}
    return record if story.labels is None else {**record, 'labels': story.labels[frame]}


def of_unit(stories: Any, length: int, unit: str) -> Any:
  """Returns the source itself for 'story' and its `Frames` for 'frame'. Raises ValueError for another unit."""
  if unit not in ('story', 'frame'):
    raise ValueError(f'source_args.unit is {unit!r}; expected "story", or "frame" for single images.')
  return stories if unit == 'story' else Frames(stories, length)


def leakage(targets: Sequence[Sequence[str]], others: dict[str, set[str]]) -> list[str]:
  """Returns a line for each other split that shares frames with the targets, a list of frame names per story."""
  lines = []
  for split, names in others.items():
    shared = [[t for t in story if t in names] for story in targets]
    if count := sum(map(len, shared)):
      stories = sum(bool(s) for s in shared)
      lines.append(f'{count} target frames of {stories} of {len(targets)} stories are also frames of {split}')
  return lines


# --- Stories given as lists of frame names, as in published data sets


@dataclasses.dataclass(frozen=True)
class Listed:
  """Random-access source of `Story` records; a subclass defines how `read` finds the frame of a name.

  Only `reload` is pickled for a worker, which then reads the tables again. Raises ValueError when there is no story.

  Attributes:
    root: the folder of the data set.
    frame_names: S x F names of frames.
    texts: S x F captions.
    reload: makes this source again.
    vectors, labels: name -> float32[d] and name -> bool[C], or None.
    lines: what `report` returns.
    seed: what is random without a generator is a function of it and the numbers of story and frame.
  """

  root: Path
  frame_names: Sequence[Sequence[str]] = dataclasses.field(repr=False)
  texts: Sequence[Sequence[str]] = dataclasses.field(repr=False)
  reload: Callable[[], Any] = dataclasses.field(repr=False)
  vectors: Mapping[str, np.ndarray] | None = dataclasses.field(default=None, repr=False)
  labels: Mapping[str, np.ndarray] | None = dataclasses.field(default=None, repr=False)
  label_names: tuple[str, ...] = ()
  lines: Sequence[str] = ()
  seed: int = 0

  def __post_init__(self):
    if not self.frame_names:
      why = '; '.join(self.lines) or 'its list is empty'
      raise ValueError(f'{self.root} has no story for this split: {why}; is the data set complete?')

  def __reduce__(self):
    return self.reload, ()

  def __len__(self) -> int:
    return len(self.frame_names)

  def name(self, index: int) -> str:
    return self.frame_names[index][0]

  def captions(self, index: int) -> list[str]:
    return list(self.texts[index])

  def __getitem__(self, index: int) -> Story:
    return self.draw(index, None)

  def report(self) -> list[str]:
    return list(self.lines)

  def read(self, name: str, rng: np.random.Generator) -> Any:
    """The image of this name. Raises FileNotFoundError or ValueError, one line that names the file."""
    raise NotImplementedError

  def frame(self, index: int, number: int, rng: np.random.Generator | None) -> Any:
    rng = np.random.default_rng((self.seed, index, number)) if rng is None else rng
    return self.read(self.frame_names[index][number], rng)

  def draw(self, index: int, rng: np.random.Generator | None) -> Story:
    names = self.frame_names[index]
    frames = [self.frame(index, number, rng) for number in range(len(names))]
    rows = [None if table is None else np.stack([table[n] for n in names]) for table in (self.vectors, self.labels)]
    return Story(frames, self.captions(index), *rows)

  def draw_frame(self, index: int, number: int, rng: np.random.Generator | None) -> dict[str, Any]:
    """A record of `Frames`."""
    record = {'image': self.frame(index, number, rng), 'caption': self.texts[index][number]}
    return record if self.labels is None else {**record, 'labels': self.labels[self.frame_names[index][number]]}


def folder(path: str, split: str, expected: str) -> Path:
  """The folder of a data set. Raises FileNotFoundError when there is none and ValueError for an unknown split."""
  if split not in SPLITS:
    raise ValueError(f'config.data has the split {split!r}; expected one of {", ".join(SPLITS)}.')
  root = Path(os.path.abspath(Path(path).expanduser()))
  if not root.is_dir():
    raise FileNotFoundError(f'config.data.path {path!r} is not a folder; expected {expected}.')
  return root


def inside(root: Path, name: str) -> Path:
  """The file of a name from an untrusted list. Raises ValueError for a name that leads out of the folder."""
  if Path(name).is_absolute() or '..' in Path(name).parts or '\0' in name:
    raise ValueError(f'{name[:200]!r} leads out of {root}; expected names of files in it.')
  return root / name


def file_bytes(root: Path, name: str) -> bytes:
  path = inside(root, name)
  if not path.is_file():
    raise FileNotFoundError(f'{path} is missing; expected the image of a frame.')
  return path.read_bytes()


def rows(table: Iterable[tuple[str, Any]], file: Path, dtype: type, width: int = 0) -> dict[str, np.ndarray]:
  """Converts a table to name -> `dtype`[width]; with width 0, the first row sets the width.

  Raises ValueError, one line that names the file, for any other row.
  """
  result = {}
  for name, value in table:
    try:
      row: np.ndarray = np.asarray(value).astype(dtype)
    except (TypeError, ValueError) as e:
      raise ValueError(f'{file} has no numbers for {name!r} ({" ".join(str(e).split())}).') from e
    width = width or row.size
    if row.shape != (width,):
      raise ValueError(f'{file} has {list(row.shape)} numbers for {name!r}; expected [{width}].')
    result[name] = row
  return result


def complete(frame_names: Sequence[Sequence[str]], **tables: Container[str] | None) -> tuple[list[int], list[str]]:
  """The indices of stories whose frames are all in every table given, and a line for each table that lacks frames."""
  kept, lines = list(range(len(frame_names))), []
  for what, table in tables.items():
    lacks = {i: n for i in kept if table is not None for n in frame_names[i] if n not in table}
    if lacks:
      kept = [i for i in kept if i not in lacks]
      first = next(iter(lacks.values()))
      lines.append(f'{len(lacks)} of {len(frame_names)} stories are left out: a frame has no {what}, such as {first}')
  return kept, lines
