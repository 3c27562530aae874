"""StoryDALL-E on FlintstonesSV, from a trained DALL-E (Maharana et al., 2022).

  python train.py --config configs/story_flintstones.py --config.data.path=FLINTSTONES \\
    --config.run_dir=runs/flintstones --config.init.path=runs/dalle --config.frozen.vqgan=runs/f8
  python train.py --config configs/story_flintstones.py:prompt ...       # prompt tuning: the DALL-E is frozen
The layout of FLINTSTONES is described in dalle_jax/data/sources/flintstones.py. The DALL-E may have any size. Sentence
vectors come with the data; `sentences=own` does without them, `sentences=clip` needs --config.frozen.clip=RUN.
Published test results to match:
FID 26.49, character F1 73.43, frame accuracy 55.19; with prompt tuning 53.71, 42.48, 32.54.
"""

from configs import common


def get_config(arg: str = ''):
  arg = common.parse_arg(arg, adapt='finetune', variant='init', sentences='data', batch=4, lr=1e-5)
  return common.story('flintstones', arg, stories=20_132, new_tokens=common.CHARACTERS['flintstones'])
