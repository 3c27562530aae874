"""StoryDALL-E on DiDeMoSV, from a trained DALL-E (Maharana et al., 2022).

  python train.py --config configs/story_didemo.py --config.data.path=DIDEMO \\
    --config.run_dir=runs/didemo --config.init.path=runs/dalle --config.frozen.vqgan=runs/f8
  python train.py --config configs/story_didemo.py:prompt ...       # prompt tuning: the DALL-E is frozen
The layout of DIDEMO is described in dalle_jax/data/sources/didemo.py. The DALL-E may have any size. Sentence
vectors come with the data; `sentences=own` does without them, `sentences=clip` needs --config.frozen.clip=RUN.
Published test results to match:
FID 32.92; with prompt tuning 64.58.
"""

from configs import common


def get_config(arg: str = ''):
  arg = common.parse_arg(arg, adapt='finetune', variant='init', sentences='data', batch=8, lr=1e-4)
  return common.story('didemo', arg, stories=11_550, frames=2)
