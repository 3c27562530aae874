"""unCLIP on the procedural world, on two CPU cores: CLIP, prior, upsampler and decoder.

  python train.py --config configs/unclip_shapes.py                # all four stages, in runs/unclip
  python sample.py --run runs/unclip/unclip --prompt "a large red circle at the top" --guidance 2
The decoder generates 36 x 36 pixels, the upsampler 72 x 72 from these. The decoder's run has all that sampling needs.
"""

from configs import common, quickstart
from configs.quickstart import SIZE


def get_config(arg: str = ''):
  arg = common.parse_arg(arg, stage='')
  c = common.base()
  c.stages = ('clip', 'prior', 'upsampler', 'unclip')
  c.root = 'runs/unclip'
  c.data.source = 'shapes'
  c.data.image_size = SIZE
  c.data.source_args = dict(image_size=SIZE)
  c.optim.update(name='adamw', b1=0.9, b2=0.99, weight_decay=0.01, clip=1.0, schedule='cosine')
  if arg.stage:
    common.choose_stage(c, arg.stage, dict(clip=clip, prior=prior, upsampler=upsampler, unclip=unclip))
  return c


def clip(c):
  """The CLIP of the quickstart, trained longer: it learns shapes last, and the decoder sees only through it."""
  quickstart.clip(c)
  c.train.update(steps=5_000, checkpoint_every=1_000, eval_every=5_000)


def prior(c):
  c.objective = 'prior'
  c.model = dict(variant='quickstart')
  c.frozen = dict(clip=c.get_ref('root') + '/clip')
  c.data.batch_size = 64
  c.optim.update(lr=1e-3, warmup=100)
  c.train.update(steps=3_000, ema=0.995, log_every=100, checkpoint_every=1_000, eval_every=3_000)


def upsampler(c):
  c.objective = 'upsampler'
  c.model = dict(variant='quickstart')
  c.loss = dict(crop=24)
  c.data.image_size = c.data.source_args.image_size = 2 * SIZE
  c.data.batch_size = 32
  c.optim.update(lr=1e-3, warmup=100)
  c.train.update(steps=1_500, ema=0.995, log_every=100, checkpoint_every=1_500, eval_every=1_500)


def unclip(c):
  c.objective = 'unclip'
  c.model = dict(variant='quickstart')
  root = c.get_ref('root')
  c.frozen = dict(clip=root + '/clip', prior=root + '/prior', upsampler=root + '/upsampler')
  c.loss = dict(caption_dropout=0.2)  # the paper's 0.5 would leave too few captioned steps
  c.data.batch_size = 32
  c.optim.update(lr=2e-3, warmup=100)
  c.train.update(steps=12_000, ema=0.998, log_every=100, checkpoint_every=1_000, eval_every=12_000)
