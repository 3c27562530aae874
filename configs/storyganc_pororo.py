"""StoryGANc on PororoSV (Maharana et al., 2022), at 64 x 64 pixels as published.

  python train.py --config configs/storyganc_pororo.py --config.data.path=PORORO \\
    --config.run_dir=runs/pororo_gan --config.frozen.roberta=runs/roberta
The layout of PORORO is described in dalle_jax/data/sources/pororo.py. runs/roberta is an imported RoBERTa:
`python -m dalle_jax.convert --from roberta --path FOLDER --out runs/roberta`. `captions=clip` needs
--config.frozen.clip=RUN instead, `captions=own` learns an encoder.
`variant=paper_128,size=128` generates 128 x 128 pixels. Published test results to match, with captions encoded by BERT:
FID 72.98, character F1 43.22, frame accuracy 17.09; by CLIP: 74.63, 39.68, 16.57.
"""

from configs import common


def get_config(arg: str = ''):
  arg = common.parse_arg(arg, variant='paper', captions='roberta', size=64, batch=12)
  return common.storyganc('pororo', arg, stories=10_191, labels=9)
