"""Random access to uncompressed WebDataset tars of NAME.jpg (jpeg, png, webp) and NAME.txt or NAME.json, its captions.

PATH is a pattern (DIR/shard-{000..099}.tar, DIR/*.tar), a folder of tars, or a single tar. The members of a tar that
share a key form a sample. The key is the name up to the first dot after its last slash, so the image of `a/b` may be
`a/b.jpg`, but not `a/b.seg.jpg`.

The index of a tar, which says where each member is stored, is made from its headers and captions in JSON once. It is
saved next to the tar in NAME.tar.index; where that cannot be written, in ~/.cache/dalle_jax; else only in memory. It is
made again when the size or modification time of the tar has changed.
"""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import io
import json
import os
import re
import tarfile
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from dalle_jax.data import sources
from dalle_jax.data.sources.folder import SUFFIXES

ROW = np.dtype(  # of a sample: where image and caption begin in the tar, and the name of the image in Index.names
  [('image', '<u8'), ('image_size', '<u4'), ('text', '<u8'), ('text_size', '<u4'), ('json', '?'), ('name', '<u4')]
)
FORMAT = 4  # of index files
LARGEST = 2**32 - 1  # bytes of a member
MEMBER = re.compile(r'((?:.*/)?[^/.]+)(\.[^/]+)', re.DOTALL)  # key, suffix
TARS = re.compile(r'.*\.(tar|tar\.(gz|bz2|xz|zst)|tgz)')
COMPRESSED = {b'\x1f\x8b': 'gzip', b'BZh': 'bzip2', b'\xfd7zXZ': 'xz', b'(\xb5/\xfd': 'zstd'}
EXPECTED = f'expected tars of NAME{"|".join(SUFFIXES)} with the caption in NAME.txt or NAME.json'
NOTES = {  # what is wrong with a tar -> its line in the report
  'cut': '{count} tars are cut off or damaged, and used only up to there; the first is {first}',
  'none': '{count} tars have no images; the first is {first}',
  'alone': '{count} samples have no image and are left out; the first is {first}',
  'dots': '{count} images are left out, as the name of a sample ends at its first dot; the first is {first}',
  'links': '{count} members are links or sparse files and are left out; the first is {first}',
  'again': '{count} members are not the first of their kind in a sample and are left out; the first is {first}',
}
Note = tuple[str, int, str]  # a key of NOTES, a count, the first occurrence
OPEN = 256  # tars that a process keeps open
READERS = 8  # threads that read headers, for file systems with a high latency
PADDING = 2**20  # bytes of zeros that may end a tar: one record, of 10 KiB by default
NEAR = 2**16  # bytes; an image and a caption that are not further apart are read at once


@dataclasses.dataclass(frozen=True)
class Index:
  """The n samples of one tar and what is wrong with it."""

  rows: np.ndarray  # ROW[n]
  shares: np.ndarray  # float64[n], `sources.share` of the keys
  names: bytes  # of the images, each followed by NUL
  notes: Sequence[Note]


class Tars:
  """Random-access source: `{'image': bytes of the file, 'caption': first line or '', 'captions': all lines}`."""

  def __init__(self, shards: Sequence[str], ends: np.ndarray, rows: np.ndarray, lines: Sequence[str]):
    """`rows` is ROW[n] of all shards in order, of which shard k has those before ends[k]; `lines` are for `report`."""
    self.shards, self.ends, self.rows, self.lines = shards, ends, rows, lines
    self._open = functools.lru_cache(OPEN)(io.FileIO)  # closes itself when it is no longer referenced

  def __reduce__(self):
    return Tars, (self.shards, self.ends, self.rows, self.lines)

  def __len__(self) -> int:
    return len(self.rows)

  def shard(self, index: int) -> str:
    return self.shards[int(np.searchsorted(self.ends, range(len(self))[index], 'right'))]

  def name(self, index: int) -> str:
    shard, start = self.shard(index), int(self.rows['name'][index])
    names = index_of(shard).names
    return f'{shard}:{names[start : names.find(0, start)].decode("utf-8", "surrogateescape")}'

  def __getitem__(self, index: int) -> dict:
    image, image_size, text, text_size, is_json, _ = self.rows[index].item()
    stored, caption = self._read(index, (image, image_size), (text, text_size))
    return {'image': stored, **sources.caption_fields(lambda: _captions(caption, is_json))}

  def captions(self, index: int) -> list[str]:
    _, _, text, text_size, is_json, _ = self.rows[index].item()
    (caption,) = self._read(index, (text, text_size))
    return _captions(caption, is_json)

  def report(self) -> list[str]:
    lines = [f'{len(self):,} images in {len(self.shards):,} tars', *self.lines]
    without = int((self.rows['text_size'] == 0).sum())
    return [*lines, f'{without} of them have no caption'] if without else lines

  def _read(self, index: int, *spans: tuple[int, int]) -> list[bytes]:
    """The bytes of spans (start, size) of the shard, by one call if they are near each other."""
    file = self._open(self.shard(index))
    filled = [(start, size) for start, size in spans if size]
    start, end = min((s for s, _ in filled), default=0), max((s + n for s, n in filled), default=0)
    if end - start > sum(n for _, n in filled) + NEAR:
      return [os.pread(file.fileno(), n, s) for s, n in spans]
    whole = os.pread(file.fileno(), end - start, start)
    return [whole[s - start : s - start + n] if n else b'' for s, n in spans]


def _captions(text: bytes, is_json: bool) -> list[str]:
  if is_json:
    return [caption.strip() for caption in _json_captions(text) if caption.strip()]
  return sources.caption_lines(text, 'its NAME.txt')


def _json_captions(text: bytes) -> list[str]:
  try:
    found = json.loads(text).get('caption')
  except (ValueError, AttributeError, RecursionError) as e:
    raise ValueError(f'its NAME.json is not a JSON object with a "caption" ({e})') from e
  # NaN, the only value that differs from itself, is what pandas writes for a missing caption.
  values = [v for v in (found if isinstance(found, list) else [found]) if v is not None and v == v]
  if not all(type(v) in (str, int, float) for v in values):
    raise ValueError(f'the "caption" in its NAME.json is {found!r:.100}; expected a string, a number or a list of them')
  return [str(v) for v in values]


def _is_null(text: bytes) -> bool:
  """Whether a NAME.json has no caption, rather than one that cannot be read, which the reader of the sample reports."""
  try:
    return not _captions(text, is_json=True)
  except ValueError:
    return False


def load(split: str, *, path: str, val_fraction: float = 0.05, test_fraction: float = 0.0) -> Tars:
  """The images of a split, which is decided by a hash of each sample's key (see `sources.divide`).

  So the split of a sample does not depend on how samples are distributed over tars. Images without a caption are
  included: a model that needs none uses them, and one that needs captions skips them. `report` counts what cannot be
  used. Raises FileNotFoundError when there is no tar or one of a range is missing; ValueError for a file that is
  compressed or not a tar, or when there is no image, or none in the split.
  """
  shards, unreadable = find(path)
  with ThreadPoolExecutor(READERS) as pool:
    indices = list(tqdm(pool.map(index_of, shards), 'reading headers', len(shards), unit='tars', delay=5.0))
  pairs = zip(shards, indices, strict=True)
  notes = _tally((what, count, f'{shard}{first}') for shard, index in pairs for what, count, first in index.notes)
  lines = [NOTES[what].format(count=f'{count:,}', first=first) for what, count, first in notes]
  lines += unreadable
  shares = np.concatenate([i.shares for i in indices])
  if not len(shares):
    raise ValueError(f'config.data.path {path!r} has no images; {EXPECTED}. {"; ".join(lines)}.')
  chosen = sources.choose(shares, split, val_fraction, test_fraction)
  ends = np.searchsorted(chosen, np.cumsum([len(i.rows) for i in indices]))
  return Tars(shards, ends, np.concatenate([i.rows for i in indices])[chosen], lines)


def find(path: str) -> tuple[list[str], list[str]]:
  """The tars of a path, in the order of its range, else sorted, and what `report` says of unreadable folders.

  Raises FileNotFoundError, one line.
  """
  known: list[str] = []
  unreadable: list[str] = []
  names = _range(os.path.expanduser(path))
  for name in names:
    if os.path.isdir(name):
      files, lines = sources.visible_files(name)
      known += sorted(f for f in files if TARS.fullmatch(f))
      unreadable += lines
    elif os.path.exists(name) or not glob.has_magic(name):
      known.append(name)
    else:
      found = sorted(f for f in glob.glob(name, recursive=True) if TARS.fullmatch(f))
      known += found or (names[1:] and [name])  # one of a range is missing
  missing = [name for name in known if not os.path.isfile(name)]
  if missing or not known:
    why = '; '.join(['has no tars', *unreadable])
    if missing:
      why = f'{len(missing)} of {len(known)} tars are missing, the first is {missing[0]}'
    raise FileNotFoundError(f'config.data.path {path!r}: {why}; {EXPECTED}: DIR/shard-{{000..099}}.tar, or a folder.')
  return known, unreadable


def _range(pattern: str) -> list[str]:
  """'a{08..10}' -> a08, a09, a10; of several ranges the last one runs fastest."""
  found = re.search(r'\{(\d+)\.\.(\d+)\}', pattern)
  if not found:
    return [pattern]
  first, last = found.groups()
  numbers = (f'{i:0{len(first)}d}' for i in range(int(first), int(last) + 1))
  return [f'{pattern[: found.start()]}{i}{rest}' for i in numbers for rest in _range(pattern[found.end() :])]


# --- Index


def index_of(path: str) -> Index:
  """The index of a tar in its present state. Raises ValueError if it is compressed or not a tar, or OSError."""
  stat = os.stat(path)
  return _index(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(4)
def _index(path: str, size: int, time: int) -> Index:
  cache = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'dalle_jax'
  digest = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]
  files, stamp = [Path(f'{path}.index'), cache / f'{digest}.tar.index'], [FORMAT, size, time]
  for file in files:
    if stored := _stored(file, stamp):
      return stored
  index = scan(path)
  head = {'of': stamp, 'rows': len(index.rows), 'notes': index.notes}
  whole = b''.join((json.dumps(head).encode(), b'\n', index.rows.tobytes(), index.shares.tobytes(), index.names))
  for file in files:
    partial = file.with_name(f'{file.name}.{uuid.uuid4().hex[:8]}.tmp')  # other processes may be writing theirs
    with contextlib.suppress(OSError):
      file.parent.mkdir(parents=True, exist_ok=True)
      partial.write_bytes(whole)
      os.replace(partial, file)
      break
    with contextlib.suppress(OSError):
      partial.unlink()
  return index


def _stored(file: Path, stamp: Sequence[int]) -> Index | None:
  """The index in a file, or None if the file is missing, incomplete or that of another tar."""
  try:
    head, _, rest = file.read_bytes().partition(b'\n')
    meta = json.loads(head)
    if meta['of'] != stamp:
      return None
    count = meta['rows']
    rows, shares = np.frombuffer(rest, ROW, count), np.frombuffer(rest, '<f8', count, count * ROW.itemsize)
    names = rest[count * (ROW.itemsize + 8) :]
    return Index(rows, shares, names, meta['notes']) if names.count(0) == count else None
  except (OSError, ValueError, KeyError, TypeError):
    return None


def scan(path: str) -> Index:
  """Reads the headers of a tar, and JSON captions. Raises ValueError if it is compressed or not a tar, or OSError."""
  size = os.path.getsize(path)
  samples: dict[str, dict[str, tuple[str, int, int]]] = {}  # key -> part -> member, start, size
  notes: list[Note] = []
  # To tarfile, a damaged header is the end of the archive; it does not report it.
  with _opened(path) as tar, contextlib.suppress(tarfile.ReadError):
    for member in tar:
      plain = member.isreg() and not member.issparse()  # the size of others is not that of their data in the tar
      if plain and member.offset_data + member.size > size:
        break
      match = MEMBER.fullmatch(member.name.removeprefix('./'))
      if not match or _hidden(member.name) or member.isdir():
        continue
      key, suffix = match[1], match[2].lower()
      part = 'image' if suffix in SUFFIXES else suffix if suffix in ('.txt', '.json') else ''
      if part and not plain:
        notes.append(('links', 1, f':{member.name}'))
      elif part and part not in samples.setdefault(key, {}):
        samples[key][part] = member.name, member.offset_data, min(member.size, LARGEST)
      elif part or suffix.endswith(SUFFIXES):
        notes.append(('again' if part else 'dots', 1, f':{member.name}'))
  names, rows, shares, start = [], [], [], 0
  with open(path, 'rb') as file:
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE) or not _is_padding(file, size):
      notes.append(('cut', 1, f' at byte {min(tar.offset, size):,}'))
    for key, parts in samples.items():
      if 'image' not in parts:
        notes.append(('alone', 1, f':{next(iter(parts.values()))[0]}'))
        continue
      name, image, length = parts['image']
      source = next((p for p in ('.txt', '.json') if p in parts), '')
      _, text, text_length = parts.get(source, ('', 0, 0))
      if source == '.json' and _is_null(os.pread(file.fileno(), text_length, text)):
        source, text, text_length = '', 0, 0
      rows.append((image, length, text, text_length, source == '.json', start))
      shares.append(sources.share(key))
      names.append(name.encode('utf-8', 'surrogateescape') + b'\0')
      start += len(names[-1])
  if not rows:
    notes.append(('none', 1, ''))
  return Index(np.array(rows, ROW), np.array(shares, '<f8'), b''.join(names), _tally(notes))


def _is_padding(file: IO[bytes], size: int) -> bool:
  """Whether the rest of a tar is zeros, and no more of them than programs write."""
  if size - file.tell() > PADDING:
    return False
  return not file.read().strip(b'\0')


def _hidden(name: str) -> bool:
  return any(part.startswith('.') and part not in ('.', '..') for part in name.split('/'))


def _opened(path: str) -> tarfile.TarFile:
  with open(path, 'rb') as file:
    start = file.read(8)
  if kind := next((kind for magic, kind in COMPRESSED.items() if start.startswith(magic)), None):
    raise ValueError(f'{path} is compressed ({kind}); unpack it to a plain tar, which allows random access.')
  try:
    return tarfile.open(path, 'r:', encoding='utf-8', errors='surrogateescape')
  except tarfile.TarError as e:
    raise ValueError(f'{path} is not a tar ({e}); {EXPECTED}.') from e


def _tally(notes: Iterable[Note]) -> list[Note]:
  """Merges notes into one of each kind, with the sum of the counts and the first occurrence."""
  merged: dict[str, Note] = {}
  for what, count, first in notes:
    _, before, earliest = merged.get(what, (what, 0, first))
    merged[what] = what, before + count, earliest
  return list(merged.values())
