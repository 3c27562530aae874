"""Command-line flags of the scripts that load a generator and sample from it."""

from typing import Any

from absl import flags

from dalle_jax.pipelines import generator
from dalle_jax.training import checkpoint

SAMPLING = ('temperature', 'top_k', 'top_p', 'guidance')  # what every generator takes
DIFFUSION = (
  'prior_guidance',
  'steps',
  'prior_steps',
  'upsampler_steps',
  'priors',
  'eta',
)  # what unCLIP takes in addition
PARTS = ('prior', 'upsampler')


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags that `load` and `sampling` read."""
  integer = lambda name, default, text, low=0: flags.DEFINE_integer(name, default, text, low, flag_values=values)
  number = lambda name, default, text: flags.DEFINE_float(name, default, text, flag_values=values)
  integer('seed', 0, 'the same seed and caption give the same images')
  number('temperature', 1.0, '0: the most probable token; in a GAN, no noise')
  integer('top_k', 0, 'only the k most probable tokens; 0: all')
  number('top_p', 1.0, 'only the most probable tokens with this total probability')
  number('guidance', 1.0, 'classifier-free guidance scale; 1: none')
  integer('batch_size', None, 'images per call; by default 64, for an unCLIP 16, for a CLIP 256', 1)
  integer('step', 0, 'step of the checkpoint to load; 0: the newest')
  flags.DEFINE_bool('int8', False, 'weights in eight bits: less to read per token', flag_values=values)
  flags.DEFINE_string('prior', '', 'unCLIP: run directory of another prior', flag_values=values)
  text = 'unCLIP: run directory of another upsampler, or none; may be repeated, each enlarges the images of the last'
  flags.DEFINE_multi_string('upsampler', [], text, flag_values=values)
  number('prior_guidance', None, 'unCLIP: guidance of the prior; by default that of the decoder')
  integer('steps', 25, 'unCLIP: diffusion steps of the decoder', 2)
  integer('prior_steps', 25, 'unCLIP: diffusion steps of the prior', 2)
  integer('upsampler_steps', 7, 'unCLIP: diffusion steps of the upsamplers', 2)
  integer('priors', 2, 'unCLIP: embeddings sampled per image, of which the one nearest to the caption is used', 1)
  number('eta', None, 'unCLIP: DDIM steps of the decoder with this much noise, 0 to 1; by default ancestral sampling')


def changed(values: flags.FlagValues, *names: str) -> list[str]:
  """Those of the flags that do not have their default value."""
  return [name for name in names if values[name].value != values[name].default]


def load(values: flags.FlagValues, where: dict[str, Any]) -> Any:
  """The generator of --run, with the CLIP of --clip. Raises ValueError for flags that it has no use for."""
  kind = checkpoint.read_config(values.run).get('objective')
  given = changed(values, *PARTS, *DIFFUSION)
  if given and kind != 'unclip':
    raise ValueError(f'--{", --".join(given)} is for an unCLIP, but {values.run} is a run of {kind!r}; leave it out.')
  parts = {}
  if kind == 'unclip':
    upsamplers = values.upsampler or None  # None: those of the run
    if 'none' in values.upsampler and len(values.upsampler) > 1:
      raise ValueError('--upsampler none leaves out all upsamplers; give it without other upsamplers.')
    if upsamplers == ['none']:
      upsamplers = []
    parts = dict(prior=values.prior, upsampler=upsamplers)
  return generator.load(values.run, clip=values.clip, step=values.step or None, int8=values.int8, **parts, **where)


def sampling(values: flags.FlagValues, model: Any) -> dict[str, Any]:
  """The sampling flags as arguments of the generator's methods."""
  names = (*SAMPLING, *DIFFUSION) if model.OBJECTIVE == 'unclip' else SAMPLING
  return {name: values[name].value for name in names}


def sampling_arguments(values: flags.FlagValues, model: Any) -> dict[str, Any]:
  """The checkpoint and the flags that determine images, to be written down with them."""
  loaded = {'step': model.step, 'int8': values.int8} | {name: values[name].value for name in changed(values, *PARTS)}
  return loaded | sampling(values, model)
