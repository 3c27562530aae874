"""Images as VQGAN codes, written once by `pipelines.encode.encode_dataset`, so that training decodes no images.

PATH/SPLIT/meta.json       count, frames, grid, num_codes, dtype, vectors, origin; written last: all else is complete
PATH/SPLIT/tokens.bin      count x frames x (h * w) codes of `dtype`, row by row
PATH/SPLIT/captions.jsonl  on each line, the list of captions of a record
PATH/SPLIT/captions.ends   int64, where each of these lines ends; without it, the ends are searched for
PATH/SPLIT/vectors.bin     float32 sentence embeddings, count x (frames - 1) x `vectors` (optional)
`frames` is 1 for single images; the first of several frames is the source of a story.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

CHUNK = 2**24  # bytes of captions that are searched for line ends at a time


def line_ends(captions: Path) -> np.ndarray:
  """Where the lines of a file end, int64. It is read in chunks, as large data sets have more captions than memory."""

  def chunks() -> Iterator[np.ndarray]:
    text = np.memmap(captions, np.uint8, 'r') if captions.stat().st_size else np.zeros(0, np.uint8)
    for start in range(0, len(text), CHUNK):
      yield np.flatnonzero(text[start : start + CHUNK] == ord('\n')) + start

  return np.concatenate([np.zeros(0, np.int64), *chunks()])


class Tokens:
  """Random-access source: `{'tokens': int32[h * w], 'caption': str, 'captions': list[str]}`, read from disk.

  Stories have tokens int32[F, h * w], F captions and, if they were encoded with them, vectors float32[F, d] (0 for the
  source).
  """

  def __init__(self, path: str | Path):
    """Raises FileNotFoundError when the folder is not a complete encoded data set, ValueError when it is damaged."""
    self.path = Path(path)
    meta = self.path / 'meta.json'
    if not meta.is_file():
      raise FileNotFoundError(f'{path} has no encoded data set; encode one first (config.encode.enabled=True).')
    self.meta = json.loads(meta.read_text())
    count, self.frames, dim = self.meta['count'], self.meta.get('frames', 1), self.meta.get('vectors', 0)
    width = self.frames * int(np.prod(self.meta['grid']))
    tokens, captions = self.path / 'tokens.bin', self.path / 'captions.jsonl'
    dtype = np.dtype(self.meta['dtype'])
    if not tokens.is_file() or tokens.stat().st_size != count * width * dtype.itemsize or not captions.is_file():
      raise ValueError(
        f'{path} is damaged: tokens.bin or captions.jsonl does not fit meta.json; delete it to encode again.'
      )
    self._tokens = np.memmap(tokens, dtype, 'r', shape=(count, width))
    vectors, shape = self.path / 'vectors.bin', (count, self.frames - 1, dim)
    if dim and (not vectors.is_file() or vectors.stat().st_size != 4 * np.prod(shape)):
      raise ValueError(f'{path} is damaged: vectors.bin does not fit meta.json; delete it to encode again.')
    self._vectors = np.memmap(vectors, np.float32, 'r', shape=shape) if dim else None
    self._captions = np.memmap(captions, np.uint8, 'r')
    ends = self.path / 'captions.ends'
    stored = count and ends.is_file() and ends.stat().st_size == 8 * count
    self._ends = np.memmap(ends, np.int64, 'r') if stored else line_ends(captions)
    if len(self._ends) != count or (count and self._ends[-1] + 1 != len(self._captions)):
      raise ValueError(
        f'{path} is damaged: {len(self._ends)} lines of captions for {count} records; delete it to encode again.'
      )

  def __reduce__(self):
    return Tokens, (self.path,)

  def __len__(self) -> int:
    return len(self._ends)

  def __getitem__(self, index: int) -> dict:
    captions = self.captions(index)
    tokens = self._tokens[index].astype(np.int32)
    record = {'tokens': tokens, 'caption': captions[0] if captions else '', 'captions': captions}
    if self.frames > 1:
      record['tokens'] = tokens.reshape(self.frames, -1)
    if self._vectors is not None:
      record['vectors'] = np.pad(self._vectors[index], ((1, 0), (0, 0)))
    return record

  def captions(self, index: int) -> list[str]:
    start = self._ends[index - 1] + 1 if index else 0
    return json.loads(self._captions[start : self._ends[index]].tobytes())


def load(split: str, *, path: str) -> Tokens:
  """The encoded images of PATH/SPLIT."""
  return Tokens(Path(path).expanduser() / split)
