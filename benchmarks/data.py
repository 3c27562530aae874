"""Images per second of each data source through the loader, with threads and with worker processes.

python benchmarks/data.py --image_size=256 --path=FOLDER_OF_IMAGES
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

_SIZE = flags.DEFINE_integer('image_size', 64, 'side of the images')
_BATCH = flags.DEFINE_integer('batch_size', 64, 'images per batch')
_BATCHES = flags.DEFINE_integer('batches', 40, 'batches per measurement')
_WORKERS = flags.DEFINE_multi_integer('workers', [0, 2], 'numbers of worker processes; 0: threads only')
_PATH = flags.DEFINE_string('path', '', 'folder of NAME.jpg with NAME.txt; default: 200 generated images')


def main(_):
  with tempfile.TemporaryDirectory() as temporary:
    path = _PATH.value or draw_folder(Path(temporary) / 'pictures')
    print(f'{"source":<16}{"workers":>8}{"images/s":>12}{"ratio":>8}')
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
  """Returns images per second after the first batches, with text of `length` tokens, and CPU seconds per image.

  The CPU seconds are those of this process, without its workers.
  """
  fields = dict(source=kind, path=path, augment=augment, source_args=source_args or {})
  config = ConfigDict(dict(fields, image_size=size, group=1, workers=workers))
  source = sources.load(config, 'train')
  tokenizer = bpe.train((source[i]['caption'] for i in range(min(len(source), 200))), 512)
  encoder = bpe.TextEncoder(tokenizer, length, 0.1)
  loader = pipeline.make_loader(
    source, config, encode_text=encoder, batch_size=_BATCH.value, seed=0, shuffle=True, start_step=0
  )
  for _ in range(2 * pipeline.AHEAD):  # read ahead while the workers started
    next(loader)
  start, cpu = time.perf_counter(), time.process_time()
  for _ in range(_BATCHES.value):
    next(loader)
  seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
  loader.close()
  return _BATCHES.value * _BATCH.value / seconds, cpu / (_BATCHES.value * _BATCH.value)


def draw_folder(path: Path) -> str:
  """Writes 200 JPEGs of 512 x 384 pixels with captions."""
  path.mkdir()
  source = shapes.load('train', image_size=384)
  for i in range(200):
    record, file = source[i], io.BytesIO()
    Image.fromarray(np.pad(record['image'], ((0, 0), (64, 64), (0, 0)), 'wrap')).save(file, 'jpeg')
    (path / f'{i:04d}.jpg').write_bytes(file.getvalue())
    (path / f'{i:04d}.txt').write_text(record['caption'])
  return str(path)


def pack(folder: Path, path: Path) -> str:
  """Packs the files of a folder into a tar, in the order of their names."""
  with tarfile.open(path, 'w') as tar:
    for file in sorted(folder.iterdir()):
      tar.add(file, file.name)
  return str(path)


def write_tokens(path: Path) -> str:
  """Writes 10,000 images of 32 x 32 tokens in the format of `pipelines.encode`."""
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
