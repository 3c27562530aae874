"""Fine-tuning of an imported minDALL-E, or any other DALL-E run, on a folder of captioned images.

  python -m dalle_jax.convert --from mindalle --path 1.3B/ --out runs/mindalle
  python train.py --config configs/finetune_mindalle.py --config.data.path=IMAGES --config.run_dir=runs/mine
Architecture, tokenizer and VQGAN are those of the run (`base=runs/mindalle`). 1.3e9 parameters with AdamW and gradients
in float32 take 21 GB without activations (calculated, not tried); `config.mesh` shards them over devices.
"""

from configs import common


def get_config(arg: str = ''):
  arg = common.parse_arg(arg, base='runs/mindalle', batch=4, steps=10_000, size=256, lr=1e-5)
  return common.finetune('dalle', arg, 'runs/mindalle_finetuned', text_weight=0.5, image_weight=0.5)
