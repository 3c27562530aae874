"""StoryDALL-E on the procedural world, from the DALL-E of the quickstart (needs its stages vqgan and dalle).

  python train.py --config configs/story_shapes.py           # full fine-tuning: 15 minutes on two CPU cores
  python train.py --config configs/story_shapes.py:prompt    # prompt tuning: the DALL-E is frozen
The ablations are `:no_retro` (without cross-attention) and `:no_story_encoder` (without the story token). `make
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
  # The first token of a frame decides its setting, and after a silent change only the story token knows that setting:
  # weighted like the other 80 tokens, it was still ignored after 500 steps. Between none and most of the input tokens
  # are noise, so that the model explains tokens by the captions and the source and not by their neighbours.
  c.loss = dict(text_weight=0.125, image_weight=0.875, first=10.0, token_noise=0.4, noise_spread=0.4)
  c.optim.update(name='adamw', lr=1e-3, b1=0.9, b2=0.99, weight_decay=0.045, warmup=50, clip=1.0, schedule='cosine')
  c.train.update(steps=steps, ema=0.0, log_every=50, checkpoint_every=500, eval_every=1_500, pictures=4)
  if variant == 'prompt':
    common.prompt_tuning(c)
