"""StoryGANc on DiDeMoSV (Maharana et al., 2022), at 64 x 64 pixels as published.

  python train.py --config configs/storyganc_didemo.py --config.data.path=DIDEMO \\
    --config.run_dir=runs/didemo_gan --config.frozen.roberta=runs/roberta
The layout of DIDEMO is described in dalle_jax/data/sources/didemo.py. runs/roberta is an imported RoBERTa:
`python -m dalle_jax.convert --from roberta --path FOLDER --out runs/roberta`. `captions=clip` needs
--config.frozen.clip=RUN instead, `captions=own` learns an encoder.
`variant=paper_128,size=128` generates 128 x 128 pixels. Published test results to match, with captions encoded by BERT:
FID 91.43; by CLIP: 92.64.
"""

from configs import common


def get_config(arg: str = ''):
  arg = common.parse_arg(arg, variant='paper', captions='roberta', size=64, batch=12)
  return common.storyganc('didemo', arg, stories=11_550, frames=2)
