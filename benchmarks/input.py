"""Tokens per second of the input pipeline for the paper's model (256 + 1,024 tokens), against what its steps consume.

  python -m benchmarks.input --rate=50000 --gpus=8       # the rate that `python -m benchmarks.step` gives for one GPU
There is one row per source: tokens that were encoded in advance, or JPEGs of several short sides in tars, which are
decoded, cropped to 256 x 256 and left for a VQGAN on the GPU. `cores` is the number of cores like those of this machine
that the steps need, from the CPU time that the threads of one process spend per sample.
"""

import tempfile
from pathlib import Path

import numpy as np
from absl import app, flags
from PIL import Image

from benchmarks import data
from dalle_jax.data.sources import shapes

TEXT, IMAGE, SIZE = 256, 1024, 256
_RATE = flags.DEFINE_float('rate', 50_000, 'tokens per second that the steps consume on one GPU')
_GPUS = flags.DEFINE_integer('gpus', 8, 'GPUs of one host')
_SIDES = flags.DEFINE_multi_integer('side', [256, 512, 1024], 'short sides of the JPEGs')
_COUNT = flags.DEFINE_integer('count', 64, 'number of JPEGs per short side')


def main(_):
  need = _RATE.value * _GPUS.value
  print(f'{_GPUS.value} GPUs at {_RATE.value:,.0f} tokens/s each consume {need / (TEXT + IMAGE):,.0f} samples/s')
  print(f'{"source":<28}{"workers":>8}{"samples/s":>11}{"tokens/s":>12}{"of demand":>13}{"cores":>7}')
  with tempfile.TemporaryDirectory() as temporary:
    root = Path(temporary)
    rows = [('tokens', 'tokens', dict(path=data.write_tokens(root / 'tokens')))]
    for side in _SIDES.value:
      folder = draw(root / str(side), side)
      size = np.mean([f.stat().st_size for f in folder.glob('*.jpg')]) / 1024
      path = data.pack(folder, root / f'{side}.tar')
      rows.append(
        (f'tars {side * 4 // 3} x {side}, {size:.0f} KiB', 'tars', dict(path=path, augment='random_crop,flip'))
      )
    for label, kind, kwargs in rows:
      for workers in flags.FLAGS.workers:
        rate, cpu = data.measure(kind, workers, SIZE, length=TEXT, **kwargs)
        tokens = rate * (TEXT + IMAGE)
        cores = '' if workers else f'{cpu * need / (TEXT + IMAGE):.2f}'
        print(
          f'{label:<28}{workers:>8}{rate:>11,.0f}{tokens:>12,.0f}{100 * tokens / need:>12.0f}%{cores:>7}', flush=True
        )


def draw(path: Path, side: int) -> Path:
  """Writes JPEGs of 4/3 side x side pixels with detail at all scales, like photographs, and procedural captions."""
  path.mkdir()
  rng, source = np.random.default_rng(0), shapes.load('train')
  for i in range(_COUNT.value):
    image = np.full((side, side * 4 // 3, 3), 128.0, np.float32)
    scale = side
    while scale >= 1:
      noise = rng.normal(128, 24, (-(-side // scale), -(-image.shape[1] // scale), 3)).clip(0, 255).astype(np.uint8)
      grown = Image.fromarray(noise).resize(image.shape[1::-1], Image.Resampling.BICUBIC)
      image += (np.asarray(grown, np.float32) - 128) * min(1.0, scale / 8)
      scale //= 2
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path / f'{i:04d}.jpg', quality=90)
    (path / f'{i:04d}.txt').write_text(source[i]['caption'])
  return path


if __name__ == '__main__':
  app.run(main)
