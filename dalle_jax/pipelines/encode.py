"""Encodes images to VQGAN codes once, before a transformer trains on them thousands of times.

The result is a folder that `data.sources.tokens` reads (which describes its files). Until it is complete, codes and
captions are in *.partial, and progress.json records how much of them is valid, so that a killed run resumes there. The
file `lock` is locked while a command writes to the folder.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict
from tqdm import tqdm

from dalle_jax.data import ops, pipeline
from dalle_jax.data.sources.tokens import line_ends
from dalle_jax.data.stories import Story
from dalle_jax.functional.pixels import to_float
from dalle_jax.models import image_tokenizer
from dalle_jax.training import checkpoint, sharding

SAVE_EVERY = 30.0  # seconds
PARTIAL = {'tokens.partial': 'tokens.bin', 'captions.partial': 'captions.jsonl', 'vectors.partial': 'vectors.bin'}
SAMPLED = 16  # records whose content is part of the identity of a source


def encode_dataset(
  source: pipeline.Source,
  vqgan_run: checkpoint.Run,
  out_dir: str | Path,
  image_size: int,
  batch_size: int,
  workers: int = 0,
) -> dict[str, Any]:
  """Encodes every usable image or story of `source`, centrally cropped, and returns the content of meta.json.

  If the parameters are laid out over a mesh, each batch is split over it. With several processes, which must share
  `out_dir`, each reads its part of the images, with `workers` worker processes (0: with threads). A finished folder of
  the same network, source and size is left as it is; otherwise the folder is encoded again. A source is
  identified by its kind, its length, the names of its records and a sample of their content: delete the folder after
  changing single images. A second command that encodes into the same folder waits for the first.

  Raises ValueError for an image size that does not suit the network, or when nothing in the source is usable.
  """
  model, params = image_tokenizer.of_run(vqgan_run.config), vqgan_run.network('vqgan')
  grid, num_codes = model.grid(image_size), int(model.num_codes)
  writes = jax.process_index() == 0
  identity = {
    'vqgan': fingerprint(params),
    'source': describe(source) if writes else '',
    'image_size': image_size,
    'grid': list(grid),
    'num_codes': num_codes,
    'dtype': 'uint16' if num_codes <= 2**16 else 'int32',
  }
  layout = getattr(jax.tree.leaves(params)[0], 'sharding', None)
  mesh = layout.mesh if isinstance(layout, NamedSharding) and isinstance(layout.mesh, Mesh) else None
  shards = sharding.batch_shards(mesh) if mesh else 1
  if batch_size < 1:
    raise ValueError(f'encode.batch_size is {batch_size}; expected 1 or more.')
  batch_size = -(-batch_size // shards) * shards  # a multiple of the number of shards

  @functools.partial(jax.jit, out_shardings=sharding.whole(mesh))
  def encode(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    images = batch.pop('image')
    flat = to_float(images.reshape(-1, *images.shape[-3:]))  # frames of a story are images
    codes = model.apply({'params': params}, flat, method='encode')
    return {'codes': codes.reshape(images.shape[0], -1), **batch}

  with _Writer(Path(out_dir), identity) if writes else contextlib.nullcontext() as writer:
    # Where to begin, -1 when there is nothing to do: only process 0 knows, as only it writes.
    done = int(multihost_utils.broadcast_one_to_all(np.int64(writer.done if writer else 0)))
    if done >= 0:
      config = ConfigDict(dict(image_size=image_size, augment=''))
      part, parts = sharding.part_to_read(mesh) if mesh else (0, 1)
      loader = pipeline.make_loader(
        source,
        config,
        encode_text=None,
        batch_size=batch_size,
        seed=0,
        shuffle=False,
        start_step=done // batch_size,
        part=part,
        parts=parts,
        workers=workers,
      )
      total = len(source)
      bar = tqdm(total=total, initial=done, unit='images', desc='encoding', disable=writer is None, mininterval=5.0)
      for start in range(done // batch_size * batch_size, total, batch_size):
        batch = {k: v for k, v in next(loader).items() if k in ('image', 'vectors')}
        size = len(batch['image'])
        batch['place'] = part * size + np.arange(size, dtype=np.int32)  # parts may be anywhere in the batch
        encoded = encode(params, sharding.put_batch(batch, mesh) if mesh else batch)
        rows = _gather_rows([[row.index, list(row.captions)] for row in loader.rows], part, parts)
        if writer:
          order = np.argsort(encoded['place'])
          vectors = np.asarray(encoded['vectors'])[order] if 'vectors' in encoded else None
          writer.append(start, np.asarray(encoded['codes'])[order], rows[: total - start], vectors)
        bar.update(min(start + batch_size, total) - bar.n)
      bar.close()
      loader.close()
      if writer:
        writer.finish()
  multihost_utils.sync_global_devices('encoded')
  return json.loads((Path(out_dir) / 'meta.json').read_text())


def _gather_rows(rows: list[Any], part: int, parts: int) -> list[Any]:
  """The rows of all parts in order, as JSON values, given those of `part`, which this process has read."""
  if parts == 1:
    return rows
  text = np.frombuffer(json.dumps(rows).encode(), np.uint8)
  headers = multihost_utils.process_allgather(np.array([part, len(text)]))
  longest = 2 ** int(headers[:, 1].max() - 1).bit_length()  # a power of two, as each length is compiled
  texts = multihost_utils.process_allgather(np.pad(text, (0, longest - len(text))))
  by_part = {int(p): json.loads(bytes(line[:n])) for (p, n), line in zip(headers, texts, strict=True)}
  return [row for p in range(parts) for row in by_part[p]]


def fingerprint(params: Any) -> str:
  """A hash of all parameters that does not depend on their sharding, as it sums integers, not floats."""

  def checksum(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32).ravel()
    return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

  sums = jax.device_get(jax.jit(lambda tree: jax.tree.map(checksum, tree))(params))
  flat_params, flat_sums = sharding.flatten(params), sharding.flatten(sums)
  text = '; '.join(f'{k} {flat_params[k].shape} {flat_sums[k]}' for k in sorted(flat_params))
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def check(source: Any, vqgan_run: checkpoint.Run) -> None:
  """Raises ValueError unless the data set was encoded by this VQGAN."""
  if source.meta['vqgan'] != fingerprint(vqgan_run.network('vqgan')):
    raise ValueError(
      f'{source.path} was encoded by another VQGAN than {vqgan_run.path}; set config.frozen.vqgan to that one.'
    )


def describe(source: pipeline.Source) -> str:
  """The kind and length of a source, and a hash of its names and of some of its records."""
  digest = hashlib.sha256()
  name: Any = getattr(source, 'name', None)
  for i in range(len(source)) if name else ():
    digest.update(name(i).encode('utf-8', 'surrogateescape') + b'\n')
  for i in np.linspace(0, len(source) - 1, min(SAMPLED, len(source))).astype(int).tolist():
    try:
      record: Any = source[i]
      record = vars(record) if isinstance(record, Story) else record
      digest.update(repr(record.get('captions') or record['caption']).encode())
      for image in record.get('frames') or [record['image']]:
        digest.update(ops.decode(image).tobytes())
    except Exception as e:  # a broken record is part of what the source is
      digest.update(type(e).__name__.encode())
  return f'{type(source).__name__} {len(source)} {digest.hexdigest()[:16]}'


class _Writer:
  """The files of one encoded data set, locked while they are written; `done` counts source records.

  `done` is -1 when the folder is finished. Another command that encodes into the folder waits until this one has left
  the `with` block or is gone.
  """

  def __init__(self, out: Path, identity: dict[str, Any]):
    self.out, self.identity = out, identity
    self.done, self.count, self.files = -1, 0, []
    self._resources = contextlib.ExitStack()

  def __enter__(self) -> '_Writer':
    self.out.mkdir(parents=True, exist_ok=True)
    if self._is_finished():  # which needs no lock: the folder may be read-only
      return self
    with contextlib.ExitStack() as stack:
      _lock(stack.enter_context((self.out / 'lock').open('w')), self.out)
      if not self._is_finished():
        self._open(stack)
      self._resources = stack.pop_all()
    return self

  def __exit__(self, *_: Any) -> None:
    self._resources.close()

  def _is_finished(self) -> bool:
    meta = self._read('meta.json')
    return bool(meta) and all(meta.get(k) == v for k, v in self.identity.items())

  def _open(self, stack: contextlib.ExitStack) -> None:
    """Opens the files to append to, at the last saved progress with the same identity or empty."""
    (self.out / 'meta.json').unlink(missing_ok=True)  # from here on the folder is incomplete
    progress, paths = self._read('progress.json'), [self.out / name for name in PARTIAL]
    self.sizes = progress.get('bytes', [0] * len(paths))
    intact = all(p.is_file() and p.stat().st_size >= s for p, s in zip(paths, self.sizes, strict=True))
    if progress.get('identity') != self.identity or not intact:
      progress, self.sizes = {}, [0] * len(paths)
    self.done, self.count = progress.get('done', 0), progress.get('count', 0)
    self.files = [stack.enter_context(p.open('ab')) for p in paths]
    for file, size in zip(self.files, self.sizes, strict=True):
      file.truncate(size)
    self.saved = time.monotonic()

  def _read(self, name: str) -> dict[str, Any]:
    try:
      return json.loads((self.out / name).read_text())
    except (OSError, json.JSONDecodeError):
      return {}

  def append(
    self, start: int, codes: np.ndarray, rows: Sequence[tuple[int, list[str]]], vectors: np.ndarray | None = None
  ) -> None:
    """Appends records `start`, `start` + 1, ... except those already done and those that replace broken ones.

    `rows` are pairs of record index and captions.
    """
    keep = [i for i, (index, _) in enumerate(rows) if start + i >= self.done and index == start + i]
    pieces = [
      codes[keep].astype(self.identity['dtype']).tobytes(),
      ''.join(json.dumps(rows[i][1]) + '\n' for i in keep).encode(),
      b'' if vectors is None else vectors[keep].astype(np.float32).tobytes(),
    ]
    for i, (file, piece) in enumerate(zip(self.files, pieces, strict=True)):
      file.write(piece)
      self.sizes[i] += len(piece)
    self.done, self.count = start + len(rows), self.count + len(keep)
    if time.monotonic() - self.saved > SAVE_EVERY:
      self.save()

  def save(self) -> None:
    """Records the progress. Raises ValueError when the files are not as long as what was written to them."""
    for file, size in zip(self.files, self.sizes, strict=True):
      file.flush()
      os.fsync(file.fileno())
      actual = os.fstat(file.fileno()).st_size
      if actual != size:
        raise ValueError(
          f'{file.name} has {actual} bytes after {size} were written: something else writes to it; stop that, then run '
          'the same command again.'
        )
    progress = {'identity': self.identity, 'done': self.done, 'count': self.count, 'bytes': self.sizes}
    checkpoint.write_json(self.out / 'progress.json', progress)
    self.saved = time.monotonic()

  def finish(self) -> None:
    """Gives the files their final names and writes meta.json. Raises as `save`."""
    self.save()
    codes, _, vectors = self.sizes
    for file, name in zip(self.files, PARTIAL.values(), strict=True):
      file.close()
      os.replace(file.name, self.out / name)
    line_ends(self.out / 'captions.jsonl').tofile(self.out / 'captions.ends')
    if not vectors:
      (self.out / PARTIAL['vectors.partial']).unlink()
    width = np.dtype(self.identity['dtype']).itemsize * int(np.prod(self.identity['grid']))
    frames = codes // (width * self.count) if self.count else 1
    dim = vectors // (4 * (frames - 1) * self.count) if vectors else 0
    meta = {**self.identity, 'count': self.count, 'skipped': self.done - self.count, 'frames': frames, 'vectors': dim}
    checkpoint.write_json(self.out / 'meta.json', meta)
    (self.out / 'progress.json').unlink()


def _lock(file: IO[str], folder: Path) -> None:
  """Locks `file` until it is closed, waiting for whoever holds it; without a lock where the file system has none."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    print(f'{folder} is being encoded by another command; waiting for it to finish', flush=True)
    fcntl.flock(file, fcntl.LOCK_EX)
  except OSError as e:
    print(f'warning: {folder} cannot be locked ({e}); do not encode into it twice at the same time.', flush=True)
