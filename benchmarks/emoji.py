"""How often the emoji generated from a name is nearer to the emoji of that name than to any other.

  python benchmarks/emoji.py --run=runs/emoji/dalle --names=200
Distances are L2 to the VQGAN's reconstructions of all emoji. --out writes a grid of true and generated emoji.
"""

from pathlib import Path

import numpy as np
from absl import app, flags

from dalle_jax.data import ops
from dalle_jax.data.sources import SPLITS, emoji
from dalle_jax.pipelines.dalle import DallE
from dalle_jax.pipelines.grids import caption_grid

_RUN = flags.DEFINE_string('run', 'runs/emoji/dalle', 'run directory of a DALL-E')
_NAMES = flags.DEFINE_integer('names', 200, 'captions per split')
_SPLITS = flags.DEFINE_list('splits', ['train', 'test'], 'splits of the emoji')
_TEMPERATURE = flags.DEFINE_float('temperature', 0.0, 'sampling temperature')
_GUIDANCE = flags.DEFINE_float('guidance', 1.0, 'sampling guidance')
_OUT = flags.DEFINE_string('out', '', 'PNG file to write')


def main(_):
  model = DallE.load(_RUN.value)
  source_args, path = model.config['data']['source_args'], model.config['data']['path']
  sources = {s: emoji.load(s, path=path, **source_args) for s in SPLITS}
  records = [(split, source[i]) for split, source in sources.items() for i in range(len(source))]
  size = model.image_size
  true = np.stack([ops.crop(ops.to_rgb(r['image']), size, (), None) for _, r in records])
  known = model.reconstruct(true).reshape(len(true), -1).astype(np.float32)
  rows = []
  for split in _SPLITS.value:
    mine = [i for i, (s, _) in enumerate(records) if s == split]
    chosen = np.random.default_rng(0).permutation(mine)[: _NAMES.value]
    names = [records[i][1]['caption'] for i in chosen]
    samples = model.sample(names, temperature=_TEMPERATURE.value, guidance=_GUIDANCE.value)
    images = np.stack([s.images[0] for s in samples])
    flat = images.reshape(len(images), -1).astype(np.float32)
    distance = np.square(flat).sum(1)[:, None] - 2 * flat @ known.T + np.square(known).sum(1)
    right = distance.argmin(1) == chosen
    print(f'{split}: for {right.sum()} of {len(names)} names, the nearest of {len(known)} emoji is the named one')
    rows += [(name, [true[i], image]) for name, i, image in list(zip(names, chosen, images, strict=True))[:12]]
  if _OUT.value:
    Path(_OUT.value).parent.mkdir(parents=True, exist_ok=True)
    caption_grid(rows).save(_OUT.value)


if __name__ == '__main__':
  app.run(main)
