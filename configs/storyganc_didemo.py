"""DiDeMoSV: StoryGANc (Maharana et al., 2022), 64 x 64 pixels as published.

  python train.py --config configs/storyganc_didemo.py --config.data.path=DIDEMO \\
    --config.run_dir=runs/didemo_gan --config.frozen.roberta=runs/roberta
dalle_jax/data/sources/didemo.py tells the layout of DIDEMO; runs/roberta is an imported RoBERTa (`python -m
dalle_jax.convert --from roberta`). `captions=clip` takes --config.frozen.clip=RUN, `captions=own` learns an encoder;
`variant=paper_128,size=128` draws 128 x 128. To match on test,
captions by BERT: FID 91.43; by CLIP: 92.64.
"""

from configs import common


def get_config(arg: str = ''):
  arg = common.parse_arg(arg, variant='paper', captions='roberta', size=64, batch=12)
  return common.storyganc('didemo', arg, stories=11_550, frames=2)
