"""Pictures a second of each source through the loader, and how workers and encoding ahead compare with threads.

python benchmarks/data.py --image_size=256 --path=FOLDER_OF_PICTURES
"""

import io
import json
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags
from ml_collections import ConfigDict
from PIL import Image

from dalle_jax.data import bpe, pipeline, sources
from dalle_jax.data.sources import shapes

_SIZE = flags.DEFINE_integer('image_size', 64, 'side of the pictures')
_BATCH = flags.DEFINE_integer('batch_size', 64, 'pictures a batch')
_BATCHES = flags.DEFINE_integer('batches', 40, 'batches a measurement')
_WORKERS = flags.DEFINE_multi_integer('workers', [0, 2], 'numbers of worker processes; 0: threads')
_PATH = flags.DEFINE_string('path', '', 'folder of NAME.jpg with NAME.txt; a drawn one of 200 pictures without it')


def main(_):
  with tempfile.TemporaryDirectory() as temporary:
    path = _PATH.value or draw_folder(Path(temporary) / 'pictures')
    print(f'{"source":<16}{"workers":>8}{"pictures/s":>12}{"ratio":>8}')
    first = None
    for kind, kwargs in (
      ('shapes', dict(source_args=dict(image_size=max(_SIZE.value, 24)))),
      ('folder', dict(path=path)),
      ('folder', dict(path=path, augment='random_crop,flip')),
      ('tars', dict(path=pack(Path(path), Path(temporary) / 'pictures.tar'))),
      ('emoji', {}),
      ('tokens', dict(path=write_tokens(Path(temporary) / 'tokens'))),
    ):
      for workers in _WORKERS.value:
        try:
          rate, _ = measure(kind, workers, _SIZE.value, **kwargs)
        except FileNotFoundError as e:
          print(f'{kind:<16}{e}')
          break
        first = first or rate
        label = f'{kind}{" augmented" if "augment" in kwargs else ""}'
        print(f'{label:<16}{workers:>8}{rate:>12.0f}{rate / first:>8.2f}', flush=True)


def measure(
  kind: str,
  workers: int,
  size: int,
  *,
  length: int = 64,
  path: str = '',
  augment: str = '',
  source_args: dict | None = None,
) -> tuple[float, float]:
  """Pictures a second after the first batches, with text of `length` tokens; seconds of a core here for each.

  The latter is not all where there are workers.
  """
  fields = dict(source=kind, path=path, augment=augment, source_args=source_args or {})
  config = ConfigDict(dict(fields, image_size=size, group=1, workers=workers))
  source = sources.load(config, 'train')
  words = bpe.train((source[i]['caption'] for i in range(min(len(source), 200))), 512)
  encoder = bpe.TextEncoder(words, length, 0.1)
  loader = pipeline.make_loader(
    source, config, encode_text=encoder, batch_size=_BATCH.value, seed=0, shuffle=True, start_step=0
  )
  for _ in range(2 * pipeline.AHEAD):  # what was read ahead while workers started
    next(loader)
  start, cpu = time.perf_counter(), time.process_time()
  for _ in range(_BATCHES.value):
    next(loader)
  seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
  loader.close()
  return _BATCHES.value * _BATCH.value / seconds, cpu / (_BATCHES.value * _BATCH.value)


def draw_folder(path: Path) -> str:
  """Writes 200 JPEGs of 512 x 384 with captions."""
  path.mkdir()
  source = shapes.load('train', image_size=384)
  for i in range(200):
    record, file = source[i], io.BytesIO()
    Image.fromarray(np.pad(record['image'], ((0, 0), (64, 64), (0, 0)), 'wrap')).save(file, 'jpeg')
    (path / f'{i:04d}.jpg').write_bytes(file.getvalue())
    (path / f'{i:04d}.txt').write_text(record['caption'])
  return str(path)


def pack(folder: Path, path: Path) -> str:
  """Puts the files of a folder into a tar, in the order of their names."""
  with tarfile.open(path, 'w') as tar:
    for file in sorted(folder.iterdir()):
      tar.add(file, file.name)
  return str(path)


def write_tokens(path: Path) -> str:
  """Writes what `pipelines.encode` would: 10,000 pictures of 32 x 32 codes."""
  folder = path / 'train'
  folder.mkdir(parents=True)
  source, count = shapes.load('train'), 10_000
  codes = np.random.default_rng(0).integers(0, 8192, (count, 1024), np.uint16)
  (folder / 'tokens.bin').write_bytes(codes.tobytes())
  captions = [json.dumps([source[i % 500]['caption']]) for i in range(count)]
  (folder / 'captions.jsonl').write_text('\n'.join(captions) + '\n')
  (folder / 'meta.json').write_text(json.dumps(dict(count=count, grid=[32, 32], dtype='uint16')))
  return str(path)


if __name__ == '__main__':
  app.run(main)
