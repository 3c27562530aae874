"""DALL-E as in the paper: 256 text tokens and 1,024 image tokens (Ramesh et al., 2021, section 2 and appendix B).

  python train.py --config configs/dalle_paper.py:12b --config.run_dir=runs/12b --config.data.path=IMAGES \\
    --config.frozen.vqgan=runs/f8                                    # a multiple of 128 devices
  python train.py --config configs/dalle_paper.py:12b,tpu ... --distributed           # a TPU pod
  python train.py --config configs/dalle_paper.py:1.3b,tpu,accum=8 ... --distributed  # 16 TPU v5e
  python train.py --config configs/dalle_paper.py:300m,batch=64 ...  # one GPU of 80 GB
  python train.py --config configs/dalle_paper.py:smoke              # both stages, tiny, one step each, on a CPU
Variants: small (123M parameters), 300m (353M), 1.3b (1.31B), 12b (12.2B). An image is 32 x 32 tokens from 8,192 codes;
all images are encoded once, before training. docs/scaling.md says what fits on which TPUs.
"""

from configs import common


def get_config(arg: str = ''):
  arg = common.parse_arg(
    arg, variant='12b', source='folder', batch=1024, accum=1, steps=430_000, tpu=False, smoke=False
  )
  if arg.smoke:
    return smoke(stage='' if arg.variant == '12b' else arg.variant)
  c = common.base()
  c.data.update(source=arg.source, image_size=256, batch_size=arg.batch, workers=8)
  c.train.accum = arg.accum
  if arg.tpu:
    c.train.xla_options = common.ON_TPU
  return dalle(c, arg.variant, arg.steps)


def dalle(c, variant: str, steps: int):
  c.objective = 'dalle'
  c.model = dict(variant=variant)
  c.frozen = dict(vqgan='')
  c.tokenizer.update(vocab_size=16_384, length=256, dropout=0.1)
  c.loss = dict(text_weight=0.125, image_weight=0.875, caption_dropout=0.1)
  c.encode.enabled = True
  c.optim.update(lr=4.5e-4, b1=0.9, b2=0.96, weight_decay=4.5e-2, warmup=5_000, clip=4.0, schedule='cosine')
  c.train.update(steps=steps, ema=0.999, log_every=100, checkpoint_every=2_000, eval_every=2_000)
  c.mesh.update(common.MESHES['fsdp128' if variant == '12b' else 'fsdp'])
  return c


def smoke(stage: str):
  """Both stages at the full token counts, with networks of a tiny width, on images that need no download."""
  c = common.base()
  c.stages, c.root = ('vqgan', 'dalle'), 'runs/paper_smoke'
  c.data.update(source='shapes', image_size=256, batch_size=2, source_args=dict(image_size=256, count=16))

  def vqgan(c):
    c.objective = 'vqgan'
    c.model = dict(variant='f8_8192', ch=32, z_channels=32, code_dim=32)
    c.train.update(steps=1, evals=())

  def transformer(c):
    dalle(c, 'small', steps=1)
    c.model.update(d_model=64, depth=4, heads=2)
    c.frozen.vqgan = c.get_ref('root') + '/vqgan'
    c.tokenizer.dropout = 0.0
    c.train.evals = ()

  if stage:
    common.choose_stage(c, stage, dict(vqgan=vqgan, dalle=transformer))
  return c
