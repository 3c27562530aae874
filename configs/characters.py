"""A classifier of the characters in a frame, for the character F1, frame accuracy and FID of evaluate.py.

  python train.py --config configs/characters.py --config.run_dir=runs/who --config.data.path=PORORO
  python train.py --config configs/characters.py:flintstones --config.run_dir=runs/who --config.data.path=FLINTSTONES
  python train.py --config configs/characters.py:clevr_sv,size=64,steps=600 --config.data.path=CLEVR_SV \\
    --config.run_dir=runs/clevr/who          # two CPU cores; labels are pairs of colour and shape
The published figures use an Inception-v3 at 299 pixels, so compare only figures of the same classifier.
"""

from configs import common

LABELS = {'pororo': 9, 'flintstones': 7, 'clevr_sv': 24}


def get_config(arg: str = ''):
  arg = common.parse_arg(arg, source='pororo', size=128, batch=64, steps=10_000)
  if arg.source not in LABELS:
    raise ValueError(f'source {arg.source!r} has no labels; there are {", ".join(LABELS)}.')
  c = common.base()
  c.objective = 'classifier'
  c.model = dict(variant='base', labels=LABELS[arg.source])
  if arg.size < 128:
    c.model.update(variant='quickstart', patch=arg.size // 8)
  c.data.update(source=arg.source, image_size=arg.size, augment='random_crop,flip', batch_size=arg.batch)
  c.data.source_args = dict(unit='frame')
  if arg.source == 'clevr_sv':
    c.data.source_args.val_stories = 6
  c.optim.update(lr=3e-4, b2=0.98, weight_decay=0.1, warmup=100)
  c.train.update(steps=arg.steps, log_every=50, checkpoint_every=500, eval_every=500, evals=('loss',))
  return c
