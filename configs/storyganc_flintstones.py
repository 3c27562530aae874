"""FlintstonesSV: StoryGANc (Maharana et al., 2022), 64 x 64 pixels as published.

  python train.py --config configs/storyganc_flintstones.py --config.data.path=FLINTSTONES \\
    --config.run_dir=runs/flintstones_gan --config.frozen.roberta=runs/roberta
dalle_jax/data/sources/flintstones.py tells the layout of FLINTSTONES; runs/roberta is an imported RoBERTa (`python -m
dalle_jax.convert --from roberta`). `captions=clip` takes --config.frozen.clip=RUN, `captions=own` learns an encoder;
`variant=paper_128,size=128` draws 128 x 128. To match on test,
captions by BERT: FID 91.37, character F1 70.45, frame accuracy 55.78; by CLIP: 90.29, 72.80, 58.39.
"""

from configs import common


def get_config(arg: str = ''):
  arg = common.parse_arg(arg, variant='paper', captions='roberta', size=64, batch=12)
  return common.storyganc('flintstones', arg, stories=20_132, labels=7)
