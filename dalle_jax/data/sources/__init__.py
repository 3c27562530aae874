"""Random-access sources of records: one file for each kind, found by its name, each with `load(split, **kwargs)`."""

import hashlib
import importlib
import inspect
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SPLITS = ('train', 'val', 'test')


def load(config_data: Any, split: str):
  """Loads the source that `config.data` describes.

  `config_data.source` is KIND for dalle_jax/data/sources/KIND.py, or 'KIND:NAME' (e.g. tfds:NAME). NAME, `path` unless
  it is empty, and `source_args` become arguments of its `load`. Raises ValueError for an unknown kind or argument, and
  whatever that `load` raises: ValueError or FileNotFoundError, one line each.
  """
  function, name = _load(config_data.source)
  kind = config_data.source.partition(':')[0]
  kwargs = {**config_data.source_args}
  kwargs |= {'path': config_data.path} if config_data.path else {}
  kwargs |= {'name': name} if name else {}
  accepted = inspect.signature(function).parameters
  if unknown := sorted(set(kwargs) - set(accepted)):
    takes = ', '.join(k for k in accepted if k != 'split') or 'nothing'
    raise ValueError(f'the data source {kind!r} does not take {", ".join(unknown)}; it takes {takes}.')
  needed = [k for k, p in accepted.items() if k != 'split' and p.default is p.empty and k not in kwargs]
  if needed:
    hint = {'path': 'set config.data.path', 'name': f'write config.data.source as {kind}:NAME'}
    how = '; '.join(hint.get(k, f'set config.data.source_args.{k}') for k in needed)
    raise ValueError(f'the data source {kind!r} needs {", ".join(needed)}; {how}.')
  try:
    return function(split, **kwargs)
  except TypeError as e:  # e.g. a string where a number is expected
    given = ', '.join(f'{k}={v!r}' for k, v in kwargs.items())
    raise ValueError(f'the data source {kind!r} cannot use its arguments, {given}: {e}') from e


def takes(kind: str, argument: str) -> bool:
  """Whether a kind of source takes this argument. Raises ValueError for an unknown kind."""
  return argument in inspect.signature(_load(kind)[0]).parameters


def _load(kind: str) -> tuple[Any, str]:
  """`load` of 'KIND:NAME' or 'KIND', and NAME or ''."""
  module, _, name = kind.partition(':')
  known = sorted(p.stem for p in Path(__file__).parent.glob('*.py') if p.stem != '__init__')
  if module not in known:
    raise ValueError(f'config.data.source {kind!r} is unknown; there are {", ".join(known)}.')
  return importlib.import_module(f'{__name__}.{module}').load, name


def check_whole(**values: Any) -> None:
  """Raises ValueError, one line, unless all these arguments of a source are whole numbers, 0 or more."""
  for name, value in values.items():
    if not isinstance(value, int) or value < 0:
      raise ValueError(f'source_args.{name} is {value!r}; expected a whole number, 0 or more.')


def caption_fields(read: Callable[[], list[str]]) -> dict[str, Any]:
  """`caption` and `captions` of a record; if they cannot be read, both are empty and `caption_error` says why."""
  try:
    captions = read()
  except (ValueError, OSError) as e:  # such as UnicodeDecodeError
    return {'caption': '', 'captions': [], 'caption_error': str(e)}
  return {'caption': captions[0] if captions else '', 'captions': captions}


def caption_lines(text: bytes, name: str) -> list[str]:
  """The captions in a text file, one per line, without empty lines. Raises ValueError when it is not UTF-8."""
  try:
    lines = re.split('[\r\n]', text.decode('utf-8-sig'))  # splitlines also splits at U+2028 and others
  except UnicodeDecodeError as e:
    raise ValueError(f'{name} is not UTF-8 ({e}); save it as UTF-8') from e
  return [line.strip() for line in lines if line.strip()]


def visible_files(folder: str) -> tuple[list[str], list[str]]:
  """The paths of all files below a folder, and what `report` says of the folders that cannot be read.

  Hidden files and folders, where programs keep copies, are left out. Links to folders are followed. A folder that can
  be reached in several ways, as in a loop of links, is read once: by its path without links if it has one.
  """
  paths: list[str] = []
  errors: list[OSError] = []
  pending, visited = [folder], set()
  while pending:
    pending.sort(reverse=True)  # the same order on every machine
    for parent, folders, files in os.walk(pending.pop(), onerror=errors.append):  # does not enter links
      real = os.path.realpath(parent)
      if real in visited:
        folders[:] = []
        continue
      visited.add(real)
      folders[:] = [f for f in folders if not f.startswith('.')]
      pending += [path for f in folders if os.path.islink(path := os.path.join(parent, f))]
      paths += [os.path.join(parent, f) for f in files if not f.startswith('.')]
  if not errors:
    return paths, []
  first = min(errors, key=lambda e: e.filename)
  line = f'{len(errors)} folders cannot be read and are left out; the first is {first.filename} ({first.strerror})'
  return paths, [line]


def divide(names: Sequence[str], split: str, val_fraction: float, test_fraction: float) -> list[int]:
  """The indices, in order, of the `names` that belong to a split; 'all' has every one.

  The split of a name depends only on its hash, so it does not change when names are added or removed. The exception is
  when val or test has a positive fraction but no names, as in folders of a few images: each then gets the name of train
  with the lowest hash. Raises ValueError for an unknown split, fractions that leave nothing to train on, or too few
  names.
  """
  return choose(np.array([share(n) for n in names]), split, val_fraction, test_fraction).tolist()


def share(name: str) -> float:
  """The hash of a name as a number from 0 to 1."""
  return int.from_bytes(hashlib.sha256(name.encode('utf-8', 'surrogateescape')).digest()[:8]) / 2**64


def choose(shares: np.ndarray, split: str, val_fraction: float, test_fraction: float) -> np.ndarray:
  """Like `divide`, from float64 shares of names that are hashed already; returns int64 indices."""
  if split == 'all':
    return np.arange(len(shares))
  if split not in SPLITS:
    raise ValueError(f'config.data has the split {split!r}; expected one of {", ".join(SPLITS)}, or all.')
  if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
    raise ValueError(f'val_fraction {val_fraction} and test_fraction {test_fraction} must leave some for train.')
  train, val, test = range(3)
  part = np.where(shares < val_fraction, val, np.where(shares < val_fraction + test_fraction, test, train))
  for wanted, fraction in ((val, val_fraction), (test, test_fraction)):
    left = np.flatnonzero(part == train)
    lowest = left[shares[left] == shares[left].min(initial=1)]  # several where images share a name
    if fraction and wanted not in part and len(lowest) < len(left):
      part[lowest] = wanted
  chosen = np.flatnonzero(part == SPLITS.index(split))
  if not len(chosen):
    raise ValueError(
      f'the split {split!r} of {len(shares)} images is empty (val_fraction {val_fraction}, test_fraction '
      f'{test_fraction}); add images, change the fractions, take another split ("all" has every one)'
      ', or set config.data.val_split="" to train without it.'
    )
  return chosen
