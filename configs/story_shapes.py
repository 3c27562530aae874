"""Stories of the procedural world: the DALL-E of the quickstart, retro-fitted (needs its stages vqgan and dalle).

  python train.py --config configs/story_shapes.py           # full fine-tuning
  python train.py --config configs/story_shapes.py:prompt    # the DALL-E frozen, what is added trained
Also `:no_retro` (no cross-attention) and `:no_story_encoder` (no story token): what each part is good for. `make
ablations` trains and scores all four.

  python -m dalle_jax.sweep --config configs/story_shapes.py --config.train.steps=400    # learning rates
"""

from configs import common

VARIANTS = ('full', 'no_retro', 'no_story_encoder', 'prompt')
NAMES = ('pip', 'momo', 'lulu', 'bobo', 'kiki', 'zuzu', 'nana', 'titi', 'fifi', 'gogo', 'rara', 'vivi')
WORDS = ('moves', 'goes', 'meets', 'grows', 'shrinks', 'now')


def get_config(arg: str = ''):
  arg = common.parse_arg(arg, variant='full', steps=1_500)
  c = common.base()
  c.root = 'runs/quickstart'
  c.run_dir = c.get_ref('root') + '/' + ('story' if arg.variant == 'full' else f'story_{arg.variant}')
  c.data.update(source='story_shapes', image_size=36, source_args=dict(image_size=36))
  story(c, arg.variant, arg.steps)
  return c


def sweep(add):
  for lr in (5e-4, 1e-3, 2e-3):
    add(**{'optim.lr': lr})


def story(c, variant: str = 'full', steps: int = 1_500):
  if variant not in VARIANTS:
    raise ValueError(f'variant {variant!r} is unknown; there are {", ".join(VARIANTS)}.')
  c.objective = 'story_dalle'
  c.model = dict(
    variant='quickstart',
    retro=int(variant != 'no_retro'),
    story_encoder='' if variant == 'no_story_encoder' else 'global',
  )
  c.frozen = dict(vqgan=c.get_ref('root') + '/vqgan')
  c.init.update(path=c.get_ref('root') + '/dalle', new='story/.*')
  c.tokenizer.update(vocab_size=512, length=24, dropout=0.0, new_tokens=NAMES + WORDS)
  c.encode.enabled = True
  c.data.source = 'story_shapes'
  c.data.source_args = dict(image_size=c.data.image_size, count=8_000)
  c.data.batch_size = 16  # stories
  # The first token of a frame decides its setting, which after a silent change the story token alone knows: as one of
  # 81 it was still ignored after 500 steps. From none to most tokens are read as noise, so that they are explained by
  # captions and source and not by their neighbours.
  c.loss = dict(text_weight=0.125, image_weight=0.875, first=10.0, token_noise=0.4, noise_spread=0.4)
  c.optim.update(name='adamw', lr=1e-3, b1=0.9, b2=0.99, weight_decay=0.045, warmup=50, clip=1.0, schedule='cosine')
  c.train.update(steps=steps, ema=0.0, log_every=50, checkpoint_every=500, eval_every=1_500, pictures=4)
  if variant == 'prompt':
    common.prompt_tuning(c)
