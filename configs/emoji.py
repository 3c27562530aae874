"""Emoji from their names: VQGAN and DALL-E on the colour emoji font of this machine, on two CPU cores.

sudo apt-get install fonts-noto-color-emoji        # if there is no such font; macOS and Windows have one
python train.py --config configs/emoji.py          # both stages; `:vqgan` and `:dalle` run one
python sample.py --run runs/emoji/dalle --prompt "grinning face" --prompt "red apple" --temperature 0.5
"""

from configs import common


def get_config(arg: str = ''):
  arg = common.parse_arg(arg, stage='')
  c = common.base()
  c.stages, c.root = ('vqgan', 'dalle'), 'runs/emoji'
  c.data.update(source='emoji', image_size=64)
  if arg.stage:
    common.choose_stage(c, arg.stage, dict(vqgan=vqgan, dalle=dalle))
  return c


def vqgan(c):
  c.objective = 'vqgan'
  c.model = dict(variant='small')
  c.loss = dict(l2_weight=1.0, beta=0.1, ema_decay=0.97)
  c.data.update(batch_size=16, augment='flip')
  c.optim.update(lr=1e-3, b2=0.95, weight_decay=1e-4, warmup=100)
  c.train.update(steps=2_500, log_every=100, checkpoint_every=500, eval_every=2_500)


def dalle(c):
  c.objective = 'dalle'
  c.model = dict(variant='mini')
  c.frozen = dict(vqgan=c.get_ref('root') + '/vqgan')
  c.tokenizer.update(vocab_size=1_024, length=16, dropout=0.0)
  c.loss = dict(caption_dropout=0.05)
  c.encode.enabled = True
  c.data.batch_size = 64
  c.optim.update(lr=2e-3, b2=0.96, weight_decay=0.01, warmup=100)
  c.train.update(steps=1_200, log_every=50, checkpoint_every=400, eval_every=400)
