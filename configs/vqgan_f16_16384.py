"""A VQGAN with few tokens: 256 x 256 pixels to 16 x 16 tokens from 16,384 codes, nearest neighbour.

  python train.py --config configs/vqgan_f16_16384.py --config.run_dir=runs/f16 --config.data.path=IMAGES
Hyperparameters are those of Esser et al., 2021 (f16). Published result to match: reconstruction FID 4.98 on ImageNet
val. For LPIPS see vqgan_f8_8192.py.
"""

from configs import common


def get_config(arg: str = ''):
  arg = common.parse_arg(arg, source='folder', batch=64, steps=500_000)
  c = common.vqgan(arg)
  c.model = dict(variant='f16_16384', dtype='bfloat16')
  c.loss.update(disc_weight=0.8, beta=0.25)
  return c
