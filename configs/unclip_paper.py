"""unCLIP at the paper's sizes (Ramesh et al., 2022, appendix C) with a frozen CLIP, one run per stage.

  python -m dalle_jax.convert --from clip --path clip-vit-large-patch14/ --out runs/clip
  python train.py --config configs/unclip_paper.py:unclip --config.root=runs/mine --config.data.path=IMAGES \\
    --config.frozen.clip=runs/clip                                   # `:prior` likewise
  python sample.py --run runs/mine/unclip --prior runs/mine/prior --upsampler runs/mine/upsampler \\
    --upsampler runs/mine/upsampler_2 --prompt "..." --guidance 4 --steps 250 --prior_steps 64
Stages: prior (1.2B parameters) and unclip (2.2B), with a CLIP; upsampler (64 to 256 pixels, 0.7B) and upsampler_2 (256
to 1,024 pixels, 0.3B), without one.
Differences from the paper: only CLIP encodes text, networks have no dropout, the upsamplers' inputs are corrupted by
blur only, and the upsamplers sample like the decoder and all with the same number of steps.
"""

from configs import common


def get_config(arg: str = ''):
  arg = common.parse_arg(arg, stage='', source='folder', accum=1)
  c = common.base()
  c.stages = ('prior', 'upsampler', 'upsampler_2', 'unclip')
  c.root = 'runs/unclip'
  c.data.update(source=arg.source, image_size=224, workers=8)
  c.train.update(accum=arg.accum, ema=0.9999, log_every=100, checkpoint_every=2_000, eval_every=10_000)
  c.optim.update(name='adam', lr=1.2e-4, b1=0.9, b2=0.999, clip=1.0, warmup=1_000, schedule='constant')
  c.mesh.update(common.MESHES['fsdp'])
  if arg.stage:
    stages = dict(prior=prior, upsampler=upsampler, upsampler_2=upsampler_2, unclip=unclip)
    common.choose_stage(c, arg.stage, stages)
  return c


def prior(c):
  c.objective = 'prior'
  c.model = dict(variant='paper')
  c.frozen = dict(clip='')
  c.data.batch_size = 4096
  c.optim.update(name='adamw', lr=1.1e-4, b2=0.96, eps=1e-6, weight_decay=6e-2)
  c.train.steps = 600_000


def unclip(c):
  c.objective = 'unclip'
  c.model = dict(variant='paper')
  c.frozen = dict(clip='')
  c.data.batch_size = 2048
  c.train.steps = 800_000


def upsampler(c):
  c.objective = 'upsampler'
  c.model = dict(variant='paper')
  c.loss = dict(crop=64)
  c.data.update(image_size=256, batch_size=1024)
  c.train.steps = 1_000_000


def upsampler_2(c):
  c.objective = 'upsampler'
  c.model = dict(variant='paper_1024')
  c.loss = dict(crop=256)
  c.data.update(image_size=1024, batch_size=512)
  c.optim.lr = 1e-4
  c.train.update(steps=1_000_000, pictures=4)
