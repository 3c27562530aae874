"""The quickstart: VQGAN, CLIP, DALL-E and StoryDALL-E on the procedural world, in 18 to 65 minutes on two CPU cores.

  python train.py --config configs/quickstart.py            # all four stages
  python train.py --config configs/quickstart.py:vqgan      # one stage
`python quickstart.py` (`make quickstart`) does the same, then samples and scores held-out captions with the oracle.
"""

from configs import common, story_shapes

SIZE = 36  # 3 x 3 cells of 12 pixels; f = 4 gives 9 x 9 codes
TEXT = 24  # maximum tokens per caption


def get_config(arg: str = ''):
  arg = common.parse_arg(arg, stage='')
  c = common.base()
  c.stages = ('vqgan', 'clip', 'dalle', 'story')
  c.root = 'runs/quickstart'
  c.data.source = 'shapes'
  c.data.image_size = SIZE
  c.data.source_args = dict(image_size=SIZE)
  if arg.stage:
    common.choose_stage(c, arg.stage, dict(vqgan=vqgan, clip=clip, dalle=dalle, story=story_shapes.story))
  return c


def vqgan(c):
  c.objective = 'vqgan'
  c.model = dict(variant='quickstart')
  c.loss = dict(l2_weight=1.0, disc_weight=0.0, beta=0.1, ema_decay=0.97)
  c.data.source_args.max_objects = 9  # crowded images: three times as many appearances to learn from
  c.data.source_args.accessories = 0.5  # which the heroes of stories wear
  c.data.batch_size = 16
  c.optim.update(name='adamw', lr=3e-3, b1=0.9, b2=0.95, weight_decay=1e-4, warmup=100, clip=1.0, schedule='cosine')
  c.train.update(steps=2_500, ema=0.0, log_every=100, checkpoint_every=1_000, eval_every=2_500)


def clip(c):
  c.objective = 'clip'
  c.model = dict(variant='quickstart')
  c.tokenizer.update(vocab_size=512, length=TEXT)
  c.data.batch_size = 128
  c.data.group = c.data.source_args.siblings = 4  # hard negatives: scenes that differ in one attribute
  c.optim.update(name='adamw', lr=2e-3, b1=0.9, b2=0.98, weight_decay=0.05, warmup=50, clip=1.0, schedule='cosine')
  c.train.update(steps=1_400, ema=0.0, log_every=50, checkpoint_every=500, eval_every=1_400)


def dalle(c):
  c.objective = 'dalle'
  c.model = dict(variant='quickstart')
  c.frozen = dict(vqgan=c.get_ref('root') + '/vqgan')
  c.tokenizer.update(vocab_size=512, length=TEXT)
  c.encode.enabled = True
  c.data.source_args.count = 30_000
  c.loss = dict(token_noise=0.3)  # without it, unseen pairs of shape and colour are not generated
  c.data.batch_size = 64
  c.optim.update(name='adamw', lr=2e-3, b1=0.9, b2=0.96, weight_decay=0.045, warmup=100, clip=1.0, schedule='cosine')
  c.train.update(steps=1_500, ema=0.0, log_every=50, checkpoint_every=500, eval_every=750)
