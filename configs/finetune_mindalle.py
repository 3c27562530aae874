"""Fine-tuning of an imported minDALL-E, or any other DALL-E run, on a folder of captioned images.

  python -m dalle_jax.convert --from mindalle --path 1.3B/ --out runs/mindalle
  python train.py --config configs/finetune_mindalle.py --config.data.path=IMAGES --config.run_dir=runs/mine
Architecture, tokenizer and VQGAN are those of the run (`base=runs/mindalle`). 1.3e9 parameters with AdamW and gradients
in float32 take 21 GB without activations (calculated, not tried); `config.mesh` shards them over devices.
"""

from configs import common


def get_config(arg: str = ''):
  arg = common.parse_arg(arg, base='runs/mindalle', batch=4, steps=10_000, size=256, lr=1e-5)
  c = common.base()
  c.objective = 'dalle'
  c.run_dir = 'runs/mindalle_finetuned'
  c.model = dict(variant='init')
  c.init.path = arg.base
  c.frozen = dict(vqgan=f'{arg.base}/frozen/vqgan')
  c.tokenizer.update(vocab_size=1, dropout=0.0)  # any number but 0; the tokenizer is that of the run
  c.loss = dict(text_weight=0.5, image_weight=0.5)
  c.data.update(source='folder', image_size=arg.size, augment='random_crop', batch_size=arg.batch, workers=8)
  c.optim.update(lr=arg.lr, b1=0.9, b2=0.95, weight_decay=1e-4, warmup=500, clip=4.0, schedule='cosine')
  c.train.update(steps=arg.steps, log_every=50, checkpoint_every=1_000, eval_every=1_000, pictures=4)
  c.mesh.update(common.MESHES['fsdp'])
  return c
