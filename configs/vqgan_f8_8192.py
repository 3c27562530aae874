"""A VQGAN with DALL-E's layout: 256 x 256 pixels to 32 x 32 tokens from 8,192 codes, Gumbel quantizer.

  python train.py --config configs/vqgan_f8_8192.py --config.run_dir=runs/f8 --config.data.path=IMAGES
  python train.py --config configs/vqgan_f8_8192.py:source=tfds:imagenet2012,batch=96 --config.run_dir=runs/f8
Hyperparameters are those of Esser et al., 2021, and the public vqgan_gumbel_f8. For the perceptual loss give
--config.frozen.lpips=runs/lpips, after `python -m dalle_jax.convert --from lpips --path FOLDER --out runs/lpips`;
without it the loss is L1, and the log says so. Published result to match: reconstruction FID 1.49 on ImageNet val.
"""

from configs import common


def get_config(arg: str = ''):
  arg = common.parse_arg(arg, source='folder', batch=64, steps=500_000)
  c = common.vqgan(arg)
  c.model = dict(variant='f8_8192', dtype='bfloat16')
  c.loss.update(disc_weight=0.75, kl_weight=1e-8, temperature=1.0, temperature_end=0.0625)
  return c
