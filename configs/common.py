"""What recipes share: all fields with their defaults, arguments of config files, presets of meshes and rules."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

# Sizes of the mesh axes; -1 takes the remaining devices.
MESHES = {
  'data': dict(data=-1, fsdp=1, tensor=1, sequence=1),  # the model is replicated on every device
  'fsdp': dict(data=1, fsdp=-1, tensor=1, sequence=1),  # parameters are sharded and gathered layer by layer
  # The same with one replica per 128 devices, as 256 does not divide a width of 3968.
  'fsdp128': dict(data=-1, fsdp=128, tensor=1, sequence=1),
  # Layers are split over the 8 devices of a host, with fsdp between hosts.
  'tensor8': dict(data=1, fsdp=-1, tensor=8, sequence=1),
  'sequence8': dict(data=1, fsdp=-1, tensor=1, sequence=8),  # sequences (or image rows) are split over a host
}

# Logical axis -> mesh axes, in order of precedence. An axis that does not divide or has no rule is replicated.
RULES = (
  ('batch', ('data', 'fsdp')),
  ('vocab', 'tensor'),
  ('heads', 'tensor'),
  ('mlp', 'tensor'),
  ('conv_out', 'tensor'),
  ('embed', 'fsdp'),
  ('conv_in', 'fsdp'),
  ('seq', 'sequence'),
  ('height', 'sequence'),
)

# For train.xla_options on TPUs: the parameters of a layer are gathered at once while the layer before computes, and not
# in pieces within the product, where each piece adds to the whole result. Gradients are scattered in pieces.
ON_TPU = dict(
  xla_enable_async_all_gather=True,
  xla_tpu_enable_async_collective_fusion=True,
  xla_tpu_enable_async_collective_fusion_fuse_all_gather=True,
  xla_tpu_enable_async_collective_fusion_multiple_steps=True,
  xla_tpu_overlap_compute_collective_tc=True,
  xla_tpu_enable_windowed_einsum_for_all_gather=False,
)

# Character names that become tokens of their own.
CHARACTERS = {
  'pororo': ('pororo', 'loopy', 'eddy', 'harry', 'poby', 'tongtong', 'crong', 'rody', 'petty'),
  'flintstones': ('fred', 'barney', 'wilma', 'betty', 'pebbles', 'dino', 'slate'),
}

BOOLS = {'': True, '1': True, 'true': True, 'yes': True, '0': False, 'false': False, 'no': False}


def base() -> ConfigDict:
  """Returns every field that the training code reads, with its default."""
  c = ConfigDict()
  c.run_dir = ''  # for config, metrics, images and checkpoints; an existing run is resumed
  c.seed = 0
  c.objective = ''  # dalle_jax/objectives/NAME.py
  c.model = ConfigDict()  # variant, and fields of the model
  c.loss = ConfigDict()  # fields of the objective
  c.frozen = ConfigDict()  # network -> run directory; copied into the run, which is then self-contained
  c.init = ConfigDict(dict(path='', new=''))  # fine-tuning: run to start from; regex of parameters it may lack
  c.root, c.stages = '', ()  # of a recipe with several runs: their common directory and order (see choose_stage)
  c.data = ConfigDict(
    dict(
      source='',  # dalle_jax/data/sources/KIND.py, or 'tfds:NAME'
      split='train',
      val_split='val',  # '': none
      path='',
      image_size=64,
      augment='',
      batch_size=64,  # global, over all devices and processes
      group=1,  # number of consecutive records that stay together when shuffled
      workers=0,
      seed=0,
      source_args=ConfigDict(),
    )
  )
  c.tokenizer = ConfigDict(
    dict(
      vocab_size=0,  # 0: no text
      length=64,
      dropout=0.1,
      path='',
      new_tokens=(),  # words that become single tokens, such as names
      pad=-1,  # padding id; -1: a separate one for each position
      start=-1,  # ids before and after a caption; -1: none
      end=-1,
      blank=-1,  # an id that is replaced by the padding of its position, as 0 by DALLE-pytorch; -1: none
    )
  )
  c.encode = ConfigDict(dict(enabled=False, batch_size=64, path=''))  # images to tokens once, before training
  c.optim = ConfigDict(
    dict(
      name='adamw',  # adam, adamw, adafactor, lion, sgd
      lr=1e-3,
      b1=0.9,
      b2=0.95,
      eps=1e-8,
      weight_decay=0.0,
      decay='kernel$|_head$',  # regex: names of the parameters that decay; *_head are DALL-E's
      schedule='cosine',  # constant, cosine, linear, rsqrt, halving
      half_life=0,  # schedule 'halving': the rate is halved every so many steps
      lr_end=0.0,  # final rate, as a fraction of lr
      warmup=0,
      clip=1.0,  # global norm; 0.0: off
      every=1,  # steps per update, for the players of a GAN
      groups=ConfigDict(),  # player -> any of these fields, or frozen=True
    )
  )
  c.train = ConfigDict(
    dict(
      steps=1000,
      accum=1,  # micro batches per update
      ema=0.0,  # decay of the average of the parameters; 0.0: off
      offload_optimizer=False,  # keep moments in host memory between updates: slower, saves device memory
      log_every=50,
      checkpoint_every=500,  # 0: only at the end
      eval_every=500,  # 0: never
      evals=('loss', 'pictures'),  # dalle_jax/evals/NAME.py
      eval_batches=8,
      pictures=16,  # images that the evaluator 'pictures' samples, at most those of a batch
      keep=3,  # number of newest checkpoints that are kept
      nan_guard=True,
      allow_cpu=False,  # allow training a large model on a CPU
      peak_flops=0.0,  # FLOP/s of one device; 0.0: from the table in training/metrics.py
      compilation_cache='',  # directory for compiled programs
      xla_options=ConfigDict(),  # compiler options for the step, e.g. {'xla_cpu_enable_fast_math': True}
    )
  )
  c.mesh = ConfigDict(MESHES['data'])
  c.rules = RULES
  return c


def vqgan(arg: ConfigDict) -> ConfigDict:
  """What the published VQGANs share (Esser et al., 2021); `arg` has source, batch and steps."""
  c = base()
  c.objective = 'vqgan'
  c.data.update(source=arg.source, image_size=256, batch_size=arg.batch, augment='random_crop,flip', workers=8)
  c.loss = dict(l1_weight=1.0, l2_weight=0.0, lpips_weight=1.0, disc_start=0.1)
  c.optim.update(name='adam', lr=4.5e-6 * arg.batch, b1=0.5, b2=0.9, schedule='constant', clip=0.0)
  c.train.update(steps=arg.steps, log_every=100, checkpoint_every=2_000, eval_every=2_000)
  return c


def finetune(objective: str, arg: ConfigDict, run_dir: str, **loss: float) -> ConfigDict:
  """Fine-tuning of the run `arg.base` on a folder of captioned images, with its architecture, tokenizer and VQGAN."""
  c = base()
  c.objective = objective
  c.run_dir = run_dir
  c.model = dict(variant='init')
  c.init.path = arg.base
  c.frozen = dict(vqgan=f'{arg.base}/frozen/vqgan')
  c.tokenizer.update(vocab_size=1, dropout=0.0)  # any number but 0; the tokenizer is that of the run
  c.loss = loss
  c.data.update(source='folder', image_size=arg.size, augment='random_crop', batch_size=arg.batch, workers=8)
  c.optim.update(lr=arg.lr, b1=0.9, b2=0.95, weight_decay=1e-4, warmup=500, clip=4.0, schedule='cosine')
  c.train.update(steps=arg.steps, log_every=50, checkpoint_every=1_000, eval_every=1_000, pictures=4)
  c.mesh.update(MESHES['fsdp'])
  return c


def story(
  source: str, arg: ConfigDict, *, stories: int, new_tokens: tuple[str, ...] = (), frames: int = 4
) -> ConfigDict:
  """What the published StoryDALL-E recipes share (Maharana et al., 2022, section 5); 50 epochs of `stories` stories.

  `arg` has adapt ('finetune' or 'prompt'), variant of the DALL-E, sentences, batch and lr.
  """
  if arg.adapt not in ('finetune', 'prompt'):
    raise ValueError(f'adapt {arg.adapt!r} is unknown; there are finetune and prompt.')
  c = base()
  c.objective = 'story_dalle'
  c.model = dict(variant=arg.variant, frames=frames, sentences=arg.sentences)
  if arg.sentences == 'data':
    c.model.sentence_dim = 512  # the sentence vectors that come with the data
  c.frozen = dict(vqgan='', clip='') if arg.sentences == 'clip' else dict(vqgan='')
  c.init.new = 'story/.*'
  c.tokenizer.update(vocab_size=16_384, length=64, dropout=0.0, new_tokens=new_tokens)
  c.data.update(source=source, image_size=256, augment='random_crop', batch_size=arg.batch, workers=8)
  c.optim.update(lr=arg.lr, b1=0.9, b2=0.99, weight_decay=4.5e-2, warmup=500, clip=4.0, schedule='cosine')
  c.train.update(steps=50 * stories // arg.batch, log_every=100, checkpoint_every=2_000, eval_every=2_000, pictures=4)
  c.mesh.update(MESHES['fsdp'])
  if arg.adapt == 'prompt':
    prompt_tuning(c)
  return c


def prompt_tuning(c: ConfigDict) -> None:
  """Freezes the DALL-E of a StoryDALL-E and puts a learned prompt of 32 vectors before its input."""
  c.model.prompt = 32
  c.optim.groups = dict(dalle=dict(frozen=True))


def storyganc(source: str, arg: ConfigDict, *, stories: int, labels: int = 0, frames: int = 4) -> ConfigDict:
  """What the published StoryGANc and the other models of the StoryGAN family share: 120 epochs of `stories` stories.

  `arg` has variant, captions ('roberta', 'clip' or 'own'), size and batch; the rate is halved every 20 epochs. The
  image discriminator gets the frames of the stories in the batch, while that family samples separate ones for it.
  """
  if arg.captions not in ('own', 'clip', 'roberta') or arg.batch < 2:
    raise ValueError(f'captions {arg.captions!r}, batch {arg.batch}; expected own, clip or roberta, and at least 2.')
  c = base()
  c.objective = 'storyganc'
  c.model = dict(variant=arg.variant, captions=arg.captions, frames=frames, labels=labels)
  if arg.captions != 'own':
    c.frozen = {arg.captions: ''}
  c.tokenizer.update(vocab_size=4096, length=32, dropout=0.0)
  c.data.update(source=source, image_size=arg.size, augment='random_crop', batch_size=arg.batch, workers=8)
  c.optim.update(gan_optimizer(2e-4), schedule='halving', half_life=20 * stories // arg.batch)
  c.optim.groups = gan_groups(2e-4)
  c.train.update(
    steps=120 * stories // arg.batch, ema=0.999, log_every=100, checkpoint_every=2_000, eval_every=2_000, pictures=4
  )
  return c


def gan_optimizer(lr: float) -> dict[str, Any]:
  """Adam with the usual settings for GANs, for all players."""
  return dict(name='adam', lr=lr, b1=0.5, b2=0.999, clip=0.0)


def gan_groups(lr: float, every: int = 2) -> ConfigDict:
  """Settings of the discriminators of a StoryGANc: their rate, and one update per `every` steps of the generator."""
  return ConfigDict({f'{name}_discriminator': dict(lr=lr, every=every) for name in ('image', 'story')})


def parse_arg(arg: str, **defaults: Any) -> ConfigDict:
  """Parses the part after the colon of `--config file.py:size=448,small`.

  Values take the type of their default. A bare word sets the bool of that name, if there is one, and otherwise is the
  value of the first argument. Raises ValueError for a name that is not in `defaults`.
  """
  result = ConfigDict(defaults)
  for item in filter(None, (arg or '').split(',')):
    name, equals, value = item.partition('=')
    if not equals and not isinstance(defaults.get(name), bool) and defaults:
      name, value = next(iter(defaults)), item
    if name not in defaults:
      close = difflib.get_close_matches(name, defaults, 3) or list(defaults)
      raise ValueError(f'config argument {item!r} is unknown; there are {", ".join(close) or "none"}.')
    kind = type(defaults[name])
    try:
      result[name] = BOOLS[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError) as e:
      raise ValueError(f'config argument {name}={value!r} is not {kind.__name__}.') from e
  return result


def choose_stage(c: ConfigDict, stage: str, stages: Mapping[str, Callable[[ConfigDict], None]]) -> None:
  """Turns the config of a recipe with several runs into that of one stage, in the directory root/stage.

  `stages[stage]` sets the fields. If no stage is chosen, train.py runs all of `c.stages` in order.
  """
  if stage not in stages:
    raise ValueError(f'stage {stage!r} is unknown; there are {", ".join(stages)}.')
  c.stages = ()
  c.run_dir = c.get_ref('root') + '/' + stage
  stages[stage](c)
