"""Fine-tuning of an imported minDALL-E or StoryDALL-E to the stories of a public data set.

  python -m dalle_jax.convert --from mindalle --path 1.3B/ --out runs/mindalle
  python train.py --config configs/finetune_storydalle.py:pororo --config.data.path=PORORO --config.run_dir=runs/pororo
`:flintstones`, `:didemo` and `:shapes` are the other data sets; `base=RUN` is the run to start from; `adapt=prompt`
freezes its DALL-E. Every third block has cross-attention to the source frame, as in the released model (Maharana et
al., 2022, section 5); `retro=1` gives it to every block, which an imported DALL-E needs whose depth is not a multiple
of 3.
"""

from configs import common

STORIES = {'pororo': 10_191, 'flintstones': 20_132, 'didemo': 11_550, 'shapes': 8_000}


def get_config(arg: str = ''):
  arg = common.parse_arg(
    arg, data='pororo', base='runs/mindalle', adapt='finetune', sentences='own', batch=4, lr=1e-4, size=256, retro=3
  )
  if arg.data not in STORIES:
    raise ValueError(f'data {arg.data!r} is unknown; there are {", ".join(STORIES)}.')
  arg.variant = 'init'
  frames = 2 if arg.data == 'didemo' else 4
  names = common.CHARACTERS.get(arg.data, ())
  c = common.story(arg.data, arg, stories=STORIES[arg.data], new_tokens=names, frames=frames)
  c.run_dir = f'runs/{arg.data}'
  c.model.retro = arg.retro
  c.init.path = arg.base
  c.frozen.vqgan = f'{arg.base}/frozen/vqgan'
  c.data.image_size = arg.size
  if arg.data == 'shapes':
    c.data.update(source='story_shapes', workers=0, source_args=dict(count=STORIES['shapes']))
  return c
