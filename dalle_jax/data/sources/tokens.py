"""Pictures as codes, written once by `pipelines.encode.encode_dataset`: no picture is decoded in training.

PATH/SPLIT/meta.json       count, grid, num_codes, dtype, where it came from; written last, so it means "whole"
PATH/SPLIT/tokens.bin      count x (h * w) codes of `dtype`, row by row
PATH/SPLIT/captions.jsonl  a list of captions a line
"""

import json
from pathlib import Path

import numpy as np


class Tokens:
  """Random-access source: `{'tokens': int32[h * w], 'caption': str, 'captions': list[str]}`, read from the disk."""

  def __init__(self, path: str | Path):
    """Raises FileNotFoundError when the folder is not a finished encoded data set, ValueError when it is damaged."""
    self.path = Path(path)
    meta = self.path / 'meta.json'
    if not meta.is_file():
      raise FileNotFoundError(f'{path} holds no encoded data set; encode one first (config.encode.enabled=True).')
    self.meta = json.loads(meta.read_text())
    count, width = self.meta['count'], int(np.prod(self.meta['grid']))
    tokens, captions = self.path / 'tokens.bin', self.path / 'captions.jsonl'
    dtype = np.dtype(self.meta['dtype'])
    if not tokens.is_file() or tokens.stat().st_size != count * width * dtype.itemsize or not captions.is_file():
      raise ValueError(
        f'{path} is damaged: tokens.bin or captions.jsonl does not fit meta.json; delete it to encode again.'
      )
    self._tokens = np.memmap(tokens, dtype, 'r', shape=(count, width))
    self._captions = np.memmap(captions, np.uint8, 'r')
    self._ends = np.flatnonzero(self._captions == ord('\n'))
    if len(self._ends) != count:
      raise ValueError(
        f'{path} is damaged: {len(self._ends)} lines of captions for {count}; delete it to encode again.'
      )

  def __reduce__(self):
    return Tokens, (self.path,)

  def __len__(self) -> int:
    return len(self._ends)

  def __getitem__(self, index: int) -> dict:
    start = self._ends[index - 1] + 1 if index else 0
    captions = json.loads(self._captions[start : self._ends[index]].tobytes())
    tokens = self._tokens[index].astype(np.int32)
    return {'tokens': tokens, 'caption': captions[0] if captions else '', 'captions': captions}


def load(split: str, *, path: str) -> Tokens:
  """The encoded pictures of PATH/SPLIT."""
  return Tokens(Path(path).expanduser() / split)
