"""StoryGANc on CLEVR-SV, 72 real stories at 64 x 64 pixels, on two CPU cores; the task of configs/story_clevr.py.

  python train.py --config configs/storyganc_clevr.py --config.data.path=CLEVR_SV --config.run_dir=runs/clevr/storyganc
  python evaluate.py --run runs/clevr/storyganc --path CLEVR_SV
CLEVR_SV has images/ and CLEVR_dict.npy. The image discriminator also classifies which of 24 kinds of objects a frame
shows. `variant=paper` has the paper's widths.
"""

from configs import common


def get_config(arg: str = ''):
  arg = common.parse_arg(arg, variant='small', steps=1_000, batch=8, l2=30.0)
  c = common.base()
  c.objective = 'storyganc'
  c.model = dict(variant=arg.variant, frames=3, labels=24)
  c.loss = dict(l2_weight=arg.l2)  # the paper has no such term, but trains for many more steps
  c.tokenizer.update(vocab_size=512, length=16, dropout=0.0)
  c.data.update(source='clevr_sv', image_size=64, batch_size=arg.batch, source_args=dict(val_stories=6))
  c.optim.update(common.gan_optimizer(2e-4), schedule='constant')
  c.optim.groups = common.gan_groups(2e-4)
  c.train.update(steps=arg.steps, ema=0.99, log_every=50, checkpoint_every=500, eval_every=500, pictures=4)
  return c
