"""Fine-tuning of an imported DALL-E mini or mega on a folder of captioned images.

  python -m dalle_jax.convert --from vqgan_jax --path vqgan_imagenet_f16_16384/ --out runs/vqgan
  python -m dalle_jax.convert --from dalle_mini --path dalle-mini/ --vqgan runs/vqgan --out runs/dalle_mini
  python train.py --config configs/finetune_dalle_mini.py --config.data.path=IMAGES --config.run_dir=runs/mine
Architecture, tokenizer and VQGAN are those of the run (`base=runs/dalle_mini`). Encoding images takes the whole VQGAN;
the files of min-dalle have only its decoder. 4.4e8 parameters (mega: 2.6e9) with AdamW and gradients in float32 take
7 GB (mega: 41 GB) without activations (calculated, not tried); `config.mesh` shards them over devices.
"""

from configs import common


def get_config(arg: str = ''):
  arg = common.parse_arg(arg, base='runs/dalle_mini', batch=16, steps=10_000, size=256, lr=1e-5)
  # guidance contrasts a caption with the empty one
  return common.finetune('dalle_mini', arg, 'runs/dalle_mini_finetuned', caption_dropout=0.1, guidance=4.0)
