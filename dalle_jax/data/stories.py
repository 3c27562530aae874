"""One record for every kind of story: pictures in order, a caption each. Frame 0 is the source, the rest continue it.

Axis legend: F frames with the source, T = F - 1 those to be generated.
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
    frames: F pictures, each of any kind that `ops.to_rgb` reads: bytes of a file, uint8[H, W, 3], a PIL image.
    captions: F strings; that of the source frame may be ''.
    vectors: float32[F, d], sentence embeddings of the captions, or None.
    labels: bool[F, C], who is in each frame, or None.
  """

  frames: Sequence[Any]
  captions: Sequence[str]
  vectors: np.ndarray | None = None
  labels: np.ndarray | None = None

  def __post_init__(self):
    if len(self.frames) != len(self.captions) or len(self.frames) < 2:
      raise ValueError(f'a story of {len(self.frames)} frames has {len(self.captions)} captions; expected one each.')
    for name in ('vectors', 'labels'):
      values = getattr(self, name)
      if values is not None and (values.ndim != 2 or len(values) != len(self.frames)):
        raise ValueError(f'the {name} of a story are {list(values.shape)}; expected a row for each frame.')


class StorySource(Protocol):
  """Random access to stories.

  `draw(index, rng)` is the record where chance has a part (a frame out of a clip): None draws by the index alone, so
  that evaluation repeats. `report()` has a line for everything worth knowing about the split, such as leakage.
  """

  label_names: tuple[str, ...]

  def __len__(self) -> int: ...

  def name(self, index: int) -> str: ...

  def captions(self, index: int) -> list[str]: ...

  def draw(self, index: int, rng: np.random.Generator | None) -> Story: ...

  def report(self) -> list[str]: ...


@dataclasses.dataclass(frozen=True)
class Frames:
  """Every frame of every story as a picture with its caption, for networks that know of pictures alone.

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
    if hasattr(self.stories, 'draw_frame'):  # opens one picture where `draw` would open all
      return self.stories.draw_frame(*divmod(index, self.length), rng)
    story, frame = self.stories.draw(index // self.length, rng), index % self.length
    record = {'image': story.frames[frame], 'caption': story.captions[frame]}
    return record if story.labels is None else {**record, 'labels': story.labels[frame]}


def of_unit(stories: Any, length: int, unit: str) -> Any:
  """The source itself for 'story', its `Frames` for 'frame'. Raises ValueError for another unit."""
  if unit not in ('story', 'frame'):
    raise ValueError(f'source_args.unit is {unit!r}; expected "story", or "frame" for single pictures.')
  return stories if unit == 'story' else Frames(stories, length)


def leakage(targets: Sequence[Sequence[str]], others: dict[str, set[str]]) -> list[str]:
  """A line for each other split whose frames the target frames (a list of names a story) of this one also show."""
  lines = []
  for split, names in others.items():
    shared = [[t for t in story if t in names] for story in targets]
    if count := sum(map(len, shared)):
      stories = sum(bool(s) for s in shared)
      lines.append(f'{count} target frames of {stories} of {len(targets)} stories are also frames of {split}')
  return lines


# --- Stories given by lists of names, as published data sets have them


@dataclasses.dataclass(frozen=True)
class Listed:
  """Random-access source of `Story` records; a subclass says how `read` finds the frame of a name.

  Pickled for a worker it is only `again`, and the worker reads the tables anew. Raises ValueError without a story.

  Attributes:
    root: the folder of the data set.
    shows: S x F names of frames.
    texts: S x F captions.
    again: makes this source.
    vectors, labels: name -> float32[d] and bool[C], or None.
    lines: what `report` tells.
    seed: of the frames drawn without a generator, together with the numbers of story and frame.
  """

  root: Path
  shows: Sequence[Sequence[str]] = dataclasses.field(repr=False)
  texts: Sequence[Sequence[str]] = dataclasses.field(repr=False)
  again: Callable[[], Any] = dataclasses.field(repr=False)
  vectors: Mapping[str, np.ndarray] | None = dataclasses.field(default=None, repr=False)
  labels: Mapping[str, np.ndarray] | None = dataclasses.field(default=None, repr=False)
  label_names: tuple[str, ...] = ()
  lines: Sequence[str] = ()
  seed: int = 0

  def __post_init__(self):
    if not self.shows:
      why = '; '.join(self.lines) or 'its list is empty'
      raise ValueError(f'{self.root} has no story for this split: {why}; is the data set whole?')

  def __reduce__(self):
    return self.again, ()

  def __len__(self) -> int:
    return len(self.shows)

  def name(self, index: int) -> str:
    return self.shows[index][0]

  def captions(self, index: int) -> list[str]:
    return list(self.texts[index])

  def __getitem__(self, index: int) -> Story:
    return self.draw(index, None)

  def report(self) -> list[str]:
    return list(self.lines)

  def read(self, name: str, rng: np.random.Generator) -> Any:
    """The picture of this name. Raises FileNotFoundError or ValueError, one line with the file."""
    raise NotImplementedError

  def frame(self, index: int, number: int, rng: np.random.Generator | None) -> Any:
    rng = np.random.default_rng((self.seed, index, number)) if rng is None else rng
    return self.read(self.shows[index][number], rng)

  def draw(self, index: int, rng: np.random.Generator | None) -> Story:
    names = self.shows[index]
    frames = [self.frame(index, number, rng) for number in range(len(names))]
    rows = [None if table is None else np.stack([table[n] for n in names]) for table in (self.vectors, self.labels)]
    return Story(frames, self.captions(index), *rows)

  def draw_frame(self, index: int, number: int, rng: np.random.Generator | None) -> dict[str, Any]:
    """A record of `Frames`."""
    record = {'image': self.frame(index, number, rng), 'caption': self.texts[index][number]}
    return record if self.labels is None else {**record, 'labels': self.labels[self.shows[index][number]]}


def folder(path: str, split: str, expected: str) -> Path:
  """The folder of a data set. Raises FileNotFoundError when it is none, ValueError for an unknown split."""
  if split not in SPLITS:
    raise ValueError(f'config.data has the split {split!r}; expected one of {", ".join(SPLITS)}.')
  root = Path(os.path.abspath(Path(path).expanduser()))
  if not root.is_dir():
    raise FileNotFoundError(f'config.data.path {path!r} is no folder; expected {expected}.')
  return root


def inside(root: Path, name: str) -> Path:
  """The file of a name out of somebody's list. Raises ValueError for one that leads out of the folder."""
  if Path(name).is_absolute() or '..' in Path(name).parts or '\0' in name:
    raise ValueError(f'{name[:200]!r} leads out of {root}; expected names of files in it.')
  return root / name


def file_bytes(root: Path, name: str) -> bytes:
  path = inside(root, name)
  if not path.is_file():
    raise FileNotFoundError(f'{path} is missing; expected the picture of a frame.')
  return path.read_bytes()


def rows(table: Iterable[tuple[str, Any]], file: Path, dtype: type, width: int = 0) -> dict[str, np.ndarray]:
  """name -> `dtype`[width]; width 0 is that of the first. Raises ValueError, one line with the file, for others."""
  found = {}
  for name, value in table:
    try:
      row: np.ndarray = np.asarray(value).astype(dtype)
    except (TypeError, ValueError) as e:
      raise ValueError(f'{file} has no numbers for {name!r} ({" ".join(str(e).split())}).') from e
    width = width or row.size
    if row.shape != (width,):
      raise ValueError(f'{file} has {list(row.shape)} numbers for {name!r}; expected [{width}].')
    found[name] = row
  return found


def whole(shows: Sequence[Sequence[str]], **tables: Container[str] | None) -> tuple[list[int], list[str]]:
  """The indices of stories with every frame in every table that there is, and a line for each that lacks frames."""
  kept, lines = list(range(len(shows))), []
  for what, table in tables.items():
    lacks = {i: n for i in kept if table is not None for n in shows[i] if n not in table}
    if lacks:
      kept = [i for i in kept if i not in lacks]
      first = next(iter(lacks.values()))
      lines.append(f'{len(lacks)} of {len(shows)} stories are left out: a frame has no {what}, such as {first}')
  return kept, lines
