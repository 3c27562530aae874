"""DiDeMoSV: StoryDALL-E from a trained DALL-E (Maharana et al., 2022).

  python train.py --config configs/story_didemo.py --config.data.path=DIDEMO \\
    --config.run_dir=runs/didemo --config.init.path=runs/dalle --config.frozen.vqgan=runs/f8
  python train.py --config configs/story_didemo.py:prompt ...       # the DALL-E frozen: prompt tuning
dalle_jax/data/sources/didemo.py tells the layout of DIDEMO. The DALL-E may have any size: config.init.path.
Sentence vectors come with the data; `sentences=own` does without them, `sentences=clip` takes --config.frozen.clip=RUN.
To match on test: FID 32.92; by prompt tuning 64.58.
"""

from configs import common


def get_config(arg: str = ''):
  arg = common.parse_arg(arg, adapt='finetune', variant='init', sentences='data', batch=8, lr=1e-4)
  return common.story('didemo', arg, stories=11_550, frames=2)
