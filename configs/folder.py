"""Your own images: a folder of NAME.jpg (png, webp) with captions in NAME.txt, including sub-folders.

  python train.py --config configs/folder.py --config.data.path=IMAGES --config.root=runs/mine   # on a CPU
  python train.py --config configs/folder.py:size=256,batch=32,steps=100000 --config.data.path=IMAGES  # on a GPU
  python sample.py --run runs/mine/dalle --clip runs/mine/clip --prompt "..." --n 8
WebDataset tars instead: `--config.data.source=tars --config.data.path='DIR/shard-{000..099}.tar'`.
There are three stages: VQGAN, CLIP (for reranking) and DALL-E; `:vqgan`, `:clip` and `:dalle` run one. From size=256 on
the networks have the paper's layout (f = 8, 32 x 32 codes at 256 pixels), otherwise small ones are used. Only the VQGAN
sees mirrored images: in the stages that read captions, "left" and "right" would become wrong. A few hundred images are
only memorised.
"""

from configs import common

STAGES = ('vqgan', 'clip', 'dalle')


def get_config(arg: str = ''):
  arg = common.parse_arg(arg, stage='', size=64, batch=16, steps=3_000)
  c = common.base()
  c.stages, c.root = STAGES, 'runs/folder'
  c.data.update(source='folder', image_size=arg.size, augment='random_crop', batch_size=arg.batch)
  c.tokenizer.update(vocab_size=4_096, length=32)
  large = arg.size >= 256

  def vqgan(c):
    c.objective = 'vqgan'
    c.model = dict(variant='f8_8192', dtype='bfloat16') if large else dict(variant='small')
    c.loss = dict(l2_weight=1.0, disc_weight=0.75 if large else 0.0, disc_start=0.5)
    if not large:
      c.loss.update(beta=0.1, ema_decay=0.97)  # with a few hundred images, codes must adapt fast
    c.tokenizer.vocab_size = 0
    c.data.augment = 'random_crop,flip'
    c.optim.update(lr=1e-4 if large else 1e-3, warmup=100)
    c.train.update(steps=arg.steps, log_every=50, checkpoint_every=500, eval_every=1_000)

  def clip(c):
    c.objective = 'clip'
    c.model = dict(variant='quickstart', patch=arg.size // 8)
    c.optim.update(lr=1e-3, b2=0.98, weight_decay=0.05, warmup=50)
    c.train.update(steps=arg.steps // 3, log_every=50, checkpoint_every=500, eval_every=500)

  def dalle(c):
    c.objective = 'dalle'
    c.model = dict(variant='small') if large else dict(variant='mini')
    c.frozen = dict(vqgan=c.get_ref('root') + '/vqgan')
    c.loss = dict(caption_dropout=0.1, guidance=2.0)
    c.encode.enabled, c.data.augment = True, ''  # images are encoded once
    c.optim.update(lr=5e-4, b2=0.96, weight_decay=0.045, warmup=100)
    c.train.update(steps=arg.steps, log_every=50, checkpoint_every=500, eval_every=1_000)

  if arg.stage:
    common.choose_stage(c, arg.stage, dict(vqgan=vqgan, clip=clip, dalle=dalle))
  return c
