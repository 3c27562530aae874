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
  c = common.base()
  c.objective = 'dalle_mini'
  c.run_dir = 'runs/dalle_mini_finetuned'
  c.model = dict(variant='init')
  c.init.path = arg.base
  c.frozen = dict(vqgan=f'{arg.base}/frozen/vqgan')
  c.tokenizer.update(vocab_size=1, dropout=0.0)  # any number but 0; the tokenizer is that of the run
  c.loss = dict(caption_dropout=0.1, guidance=4.0)  # guidance contrasts a caption with the empty one
  c.data.update(source='folder', image_size=arg.size, augment='random_crop', batch_size=arg.batch, workers=8)
  c.optim.update(lr=arg.lr, b1=0.9, b2=0.95, weight_decay=1e-4, warmup=500, clip=4.0, schedule='cosine')
  c.train.update(steps=arg.steps, log_every=50, checkpoint_every=1_000, eval_every=1_000, pictures=4)
  c.mesh.update(common.MESHES['fsdp'])
  return c
