"""StoryGANc on stories of the procedural world at 36 x 36 pixels; the task of configs/story_shapes.py.

  python train.py --config configs/storyganc_shapes.py                 # 17 to 24 minutes on two CPU cores
  python train.py --config configs/storyganc_shapes.py:no_attention    # without the source frame
  python train.py --config configs/storyganc_shapes.py:variant=paper,size=64,steps=20000   # the paper's size, on a GPU
`make storyganc` trains the first two and compares them with the StoryDALL-E of the quickstart.
"""

from configs import common


def get_config(arg: str = ''):
  arg = common.parse_arg(arg, no_attention=False, variant='quickstart', size=36, steps=2_000, batch=16, l2=30.0)
  c = common.base()
  c.objective = 'storyganc'
  c.root = 'runs/quickstart'
  c.run_dir = c.get_ref('root') + ('/storyganc_no_attention' if arg.no_attention else '/storyganc')
  c.model = dict(variant=arg.variant, attention=not arg.no_attention)
  c.loss = dict(l2_weight=arg.l2)  # the paper has no such term, but trains for many more steps
  c.tokenizer.update(vocab_size=512, length=24, dropout=0.0)
  c.data.update(source='story_shapes', image_size=arg.size, batch_size=arg.batch)
  c.data.source_args = dict(image_size=arg.size)
  c.optim.update(common.gan_optimizer(1e-3), schedule='constant')
  c.optim.groups = common.gan_groups(2e-4)
  c.train.update(steps=arg.steps, ema=0.99, log_every=50, checkpoint_every=500, eval_every=500, pictures=4)
  return c
