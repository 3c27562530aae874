"""Fine-tuning of an imported VQGAN with its discriminator and LPIPS on a folder of images.

  python -m dalle_jax.convert --from taming --path vqgan_imagenet_f16_1024/ --out runs/f16
  python train.py --config configs/finetune_vqgan.py --config.data.path=IMAGES --config.run_dir=runs/mine
The checkpoint must have a discriminator and LPIPS, as those of taming-transformers do; without a discriminator give
`--config.loss.disc_weight=0.0`. The batch statistics of the discriminator stay fixed.
"""

from configs import common


def get_config(arg: str = ''):
  arg = common.parse_arg(arg, base='runs/f16', batch=4, steps=20_000, size=256, lr=4.5e-6)
  c = common.vqgan(common.parse_arg('', source='folder', batch=arg.batch, steps=arg.steps))
  c.run_dir = 'runs/vqgan_finetuned'
  c.model = dict(variant='init')
  c.init.path = arg.base
  c.frozen = dict(lpips=f'{arg.base}/frozen/lpips')
  c.loss.update(disc_weight=0.75, disc_start=0.0, revive=0.0, disc=dict(norm='fixed_batch'))
  c.data.image_size = arg.size
  c.optim.lr = arg.lr
  return c
