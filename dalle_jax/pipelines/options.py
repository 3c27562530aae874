"""The flags by which command lines choose a generator and how it draws."""

from typing import Any

from absl import flags

from dalle_jax.pipelines import generator
from dalle_jax.training import checkpoint

SAMPLING = ('temperature', 'top_k', 'top_p', 'guidance')  # what every generator takes
DIFFUSION = ('prior_guidance', 'steps', 'prior_steps', 'upsampler_steps', 'priors')  # what unCLIP takes beside it
PARTS = ('prior', 'upsampler')


def define_flags(values: flags.FlagValues) -> None:
  """What `load` and `sampling` read."""
  integer = lambda name, default, text, low=0: flags.DEFINE_integer(name, default, text, low, flag_values=values)
  number = lambda name, default, text: flags.DEFINE_float(name, default, text, flag_values=values)
  integer('seed', 0, 'same seed and caption, same pictures')
  number('temperature', 1.0, '0: the most probable token, no noise in a GAN')
  integer('top_k', 0, 'only the k most probable tokens; 0: all')
  number('top_p', 1.0, 'only the most probable tokens of this mass')
  number('guidance', 1.0, 'classifier-free guidance scale; 1: none')
  integer('batch_size', None, 'pictures at once; by default 64, by an unCLIP 16', 1)
  integer('step', 0, 'a checkpoint other than the newest')
  flags.DEFINE_bool('int8', False, 'weights in eight bits: less to read a token', flag_values=values)
  flags.DEFINE_string('prior', '', 'unCLIP: run directory of another prior', flag_values=values)
  text = 'unCLIP: run directory of another upsampler, or none; may be repeated, each takes up where the one before ends'
  flags.DEFINE_multi_string('upsampler', [], text, flag_values=values)
  number('prior_guidance', None, 'unCLIP: guidance of the prior, if not that of the decoder')
  integer('steps', 25, 'unCLIP: steps of diffusion of the decoder', 2)
  integer('prior_steps', 25, 'unCLIP: of the prior', 2)
  integer('upsampler_steps', 7, 'unCLIP: of upsamplers', 2)
  integer('priors', 2, 'unCLIP: embeddings drawn for a picture, of which the one nearest to the caption is taken', 1)


def changed(values: flags.FlagValues, *names: str) -> list[str]:
  """Which of these flags are not as they are by default."""
  return [name for name in names if values[name].value != values[name].default]


def load(values: flags.FlagValues, where: dict[str, Any]) -> Any:
  """The generator of --run, with the CLIP of --clip. Raises ValueError for flags that it has no use for."""
  kind = checkpoint.read_config(values.run).get('objective')
  given = changed(values, *PARTS, *DIFFUSION)
  if given and kind != 'unclip':
    raise ValueError(f'--{", --".join(given)} is for an unCLIP, and {values.run} is a run of {kind!r}; leave it out.')
  parts = {}
  if kind == 'unclip':
    chain = [] if values.upsampler == ['none'] else values.upsampler or None
    parts = dict(prior=values.prior, upsampler=chain)
  return generator.load(values.run, clip=values.clip, step=values.step or None, int8=values.int8, **parts, **where)


def sampling(values: flags.FlagValues, model: Any) -> dict[str, Any]:
  """How the generator is to draw, as arguments of its methods."""
  names = (*SAMPLING, *DIFFUSION) if model.OBJECTIVE == 'unclip' else SAMPLING
  return {name: values[name].value for name in names}


def sampling_arguments(values: flags.FlagValues, model: Any) -> dict[str, Any]:
  """What to write down beside pictures of how they were drawn."""
  return sampling(values, model) | {name: values[name].value for name in changed(values, *PARTS)}
