"""StoryDALL-E on PororoSV, from a trained DALL-E (Maharana et al., 2022).

  python train.py --config configs/story_pororo.py --config.data.path=PORORO \\
    --config.run_dir=runs/pororo --config.init.path=runs/dalle --config.frozen.vqgan=runs/f8
  python train.py --config configs/story_pororo.py:prompt ...       # prompt tuning: the DALL-E is frozen
The layout of PORORO is described in dalle_jax/data/sources/pororo.py. The DALL-E may have any size. Sentence
vectors come with the data; `sentences=own` does without them, `sentences=clip` needs --config.frozen.clip=RUN.
Published test results to match:
FID 25.90, character F1 36.97, frame accuracy 17.26; with prompt tuning 61.23, 29.68, 11.65.
"""

from configs import common


def get_config(arg: str = ''):
  arg = common.parse_arg(arg, adapt='finetune', variant='init', sentences='data', batch=4, lr=1e-4)
  return common.story('pororo', arg, stories=10_191, new_tokens=common.CHARACTERS['pororo'])
