"""StoryGANc on FlintstonesSV (Maharana et al., 2022), at 64 x 64 pixels as published.

  python train.py --config configs/storyganc_flintstones.py --config.data.path=FLINTSTONES \\
    --config.run_dir=runs/flintstones_gan --config.frozen.roberta=runs/roberta
The layout of FLINTSTONES is described in dalle_jax/data/sources/flintstones.py. runs/roberta is an imported RoBERTa:
`python -m dalle_jax.convert --from roberta --path FOLDER --out runs/roberta`. `captions=clip` needs
--config.frozen.clip=RUN instead, `captions=own` learns an encoder.
`variant=paper_128,size=128` generates 128 x 128 pixels. Published test results to match, with captions encoded by BERT:
FID 91.37, character F1 70.45, frame accuracy 55.78; by CLIP: 90.29, 72.80, 58.39.
"""

from configs import common


def get_config(arg: str = ''):
  arg = common.parse_arg(arg, variant='paper', captions='roberta', size=64, batch=12)
  return common.storyganc('flintstones', arg, stories=20_132, labels=7)
