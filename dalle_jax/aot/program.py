"""The training step and the sampler of a config, compiled for devices that need not be present."""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dalle_jax.aot import costs
from dalle_jax.functional import decoding
from dalle_jax.models import clip, decode_params, image_tokenizer, vqgan
from dalle_jax.training import checkpoint, sharding
from dalle_jax.training import config as config_lib
from dalle_jax.training.plan import Plan, place
from dalle_jax.training.step import make_step

VQGAN = 'f8_8192'  # where nothing says which one


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program: memory per device in bytes, and the costs of one run.

  If the program is too large for the device, `needs` is the memory that its compiler reports, and nothing else is set.
  """

  name: str
  seconds: float  # of compilation
  arguments: int = 0
  temporaries: int = 0
  code: int = 0
  regions: tuple[costs.Region, ...] = ()
  needs: str = ''

  @property
  def bytes(self) -> int:
    return self.arguments + self.temporaries + self.code


def complete(config: ConfigDict) -> str:
  """Completes a config that starts from a run, as training does; returns the variant of its VQGAN, '' for frozen.vqgan.

  Without that run here, a DALL-E takes the vocabulary of its variant, and the VQGAN with as many codes. Raises
  ValueError if it has no variant of its own.
  """
  path, text = config.init.path, config.tokenizer
  if not path:
    return VQGAN
  try:
    known = checkpoint.read_config(path)
  except OSError as e:
    if config.model.get('variant') == 'init':
      names = config_lib.module_named('models', config.objective, 'config.objective').VARIANTS
      raise ValueError(
        f'the run to start from, {path}, cannot be read, so the sizes of the model are unknown; pass '
        f'--config.model.variant=NAME, one of {", ".join(names)}.'
      ) from e
  else:
    config_lib.inherit(config, known)
    if text.vocab_size and known.get('tokenizer'):
      text.vocab_size = known['tokenizer']['vocab_size'] + len(text.new_tokens)
    return '' if config.frozen.get('vqgan') else VQGAN
  if config.objective not in ('dalle', 'dalle_mini', 'story_dalle'):
    return VQGAN
  model = config_lib.module_named('models', config.objective, 'config.objective').build(**config.model)
  model = getattr(model, 'dalle', model)  # that of a StoryDALL-E
  ids = dict(pad=model.pad, start=getattr(model, 'bos', -1), end=getattr(model, 'eos', -1))
  text.update(vocab_size=model.words + len(text.new_tokens), length=model.text_length, **ids)
  return next((name for name in vqgan.VARIANTS if vqgan.build(name).num_codes == model.image_vocab), VQGAN)


class Programs(Plan):
  """The plan of a config with its frozen networks, and its programs of training and sampling.

  Attributes, beside those of a plan:
    model: the module that the objective trains.
    frozen: the parameters of the frozen networks that the step reads.
  """

  def __init__(
    self, config: ConfigDict, mesh: Mesh, *, vqgan_variant: str = '', clip_variant: str = '', batch_per_chip: int = 0
  ):
    """Plans a config with the variants `vqgan_variant` ('': see `complete`) and `clip_variant` as frozen networks.

    With a `batch_per_chip` of 0 the batch is that of the config. Raises ValueError for a config that needs other frozen
    networks, or a batch that the mesh does not divide.
    """
    config = config.copy_and_resolve_references()
    fitting = complete(config)
    module = config_lib.module_named('objectives', config.objective, 'config.objective')
    unread = set(module.FROZEN) - set(getattr(module, 'READS', module.FROZEN))  # those that only sampling needs
    if others := sorted(set(config.frozen) - unread - {'vqgan', 'clip'}):
      raise ValueError(
        f'config.frozen has {", ".join(others)}; only a VQGAN and a CLIP can be replaced by their shapes.'
      )
    self.known: dict[str, dict[str, Any]] = {}
    if 'vqgan' in config.frozen:
      variant = vqgan_variant or fitting
      of_variant = {'objective': 'vqgan', 'model': {'variant': variant}}
      self.known['vqgan'] = of_variant if variant else checkpoint.read_config(config.frozen.vqgan)
    if 'clip' in config.frozen:
      self.known['clip'] = clip_run(clip_variant)
    objective = module.from_config(config, self.known)
    self.model = objective.model
    batch = _batch(config, self.model, self.known, batch_per_chip * mesh.size or config.data.batch_size)
    super().__init__(config, objective, batch, mesh)
    self.frozen = {name: self._network(name, run) for name, run in self.known.items()}

  @property
  def replicated(self) -> float:
    """The fraction of the parameters that every device holds whole, as the mesh does not split them."""
    leaves = jax.tree.leaves(self.state.params)
    replicated = sum(math.prod(x.shape) for x in leaves if x.sharding.is_fully_replicated)
    return replicated / sum(math.prod(x.shape) for x in leaves)

  def step(self) -> Program:
    """The update of the training loop, exactly as the loop runs it."""
    return self._compiled('step', make_step(self), self.state, self.frozen, self.batch)

  def sampler(self, rows: int) -> Program:
    """The program that the pipeline's `sample` runs, VQGAN included, for `rows` captions a device, one image each."""
    pipeline = config_lib.module_named('pipelines', self.config.objective, 'sampling: config.objective')
    model, vqgan = self.model, image_tokenizer.of_run(self.known['vqgan'])
    count = rows * self.mesh.size
    count -= count % sharding.batch_shards(self.mesh)
    batch = {
      'text': jax.ShapeDtypeStruct((count, model.text_length), jnp.int32),
      'image': jax.ShapeDtypeStruct((count, 0), jnp.int32),
      'name': jax.ShapeDtypeStruct((count,), jnp.uint32),
      'number': jax.ShapeDtypeStruct((count, 1), jnp.int32),
    }
    stored, replicated = self.state.params['dalle'], NamedSharding(self.mesh, PartitionSpec())
    cast = jax.eval_shape(lambda params: decode_params.compute_params(params, model.dtype), stored)
    cast = decode_params.by_layer(jax.tree.map(lambda x, y: place(x, y.sharding), cast, stored), _layer)
    params = {'dalle': cast, 'vqgan': self.frozen['vqgan']}
    inputs = params, self._put(batch), place(jax.ShapeDtypeStruct((), jnp.uint32), replicated), decoding.Sampling()
    draw = jax.jit(functools.partial(pipeline.draw, model, vqgan))
    return self._compiled('sampler', draw, *inputs)

  def _network(self, name: str, run: Mapping[str, Any]) -> Any:
    """The parameters of a frozen network, sharded as if its run had been loaded."""
    image = lambda size: jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    ids = lambda *shape: jax.ShapeDtypeStruct((1, *shape), jnp.int32)
    model: Any = clip.of_run(run) if name == 'clip' else image_tokenizer.of_run(run)
    size, method = self.config.data.image_size, '__call__'
    if name == 'clip':
      inputs = [image(model.side), ids(model.text_length)]
    elif getattr(model, 'decoder_only', False):
      inputs, method = [ids(*model.grid(size))], 'decode_codes'
    else:
      inputs = [image(size)]
    boxed = jax.eval_shape(lambda *inputs: model.init(jax.random.key(0), *inputs, method=method)['params'], *inputs)
    params = sharding.unbox(boxed)
    where = sharding.shardings(params, sharding.logical_axes(boxed), self.mesh, self.config.rules)
    return jax.tree.map(place, params, where)

  def _put(self, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: place(x, sharding.batch_sharding(self.mesh)) for name, x in shapes.items()}

  def _compiled(self, name: str, function: Any, *inputs: Any) -> Program:
    start = time.monotonic()
    lowered = function.lower(*inputs)
    try:
      compiled = _compile(lowered)
    except jax.errors.JaxRuntimeError as e:
      sizes = re.findall(r'\b\d[\d.]*[MGT]\b', str(e))
      if 'ran out of memory' not in str(e).lower() or len(sizes) < 2:
        raise
      return Program(name, time.monotonic() - start, needs=f'{sizes[0]} of {sizes[1]}')
    seconds = time.monotonic() - start
    memory = compiled.memory_analysis()
    return Program(
      name,
      seconds,
      memory.argument_size_in_bytes,
      memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
      memory.generated_code_size_in_bytes,
      tuple(costs.regions(compiled.as_text(), self.mesh.size)),
    )


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
  """Compiles, with cuBLAS if XLA finds no tiles: that of jaxlib 0.10 cannot try any on a GPU that is not present."""
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    if 'output tile sizes' not in str(e):
      raise
  return lowered.compile(compiler_options={'xla_gpu_enable_triton_gemm': False})


def _batch(
  c: ConfigDict, model: Any, known: Mapping[str, dict[str, Any]], size: int
) -> dict[str, jax.ShapeDtypeStruct]:
  """The batch that the data pipeline produces for this config."""
  frames = (c.model.get('frames', 4),) if c.objective.startswith('story') else ()
  images = tuple(t + 1 for t in frames)  # with the source frame
  shapes = {}
  if c.tokenizer.vocab_size:
    shapes['text'] = jax.ShapeDtypeStruct((size, *frames, c.tokenizer.length), jnp.int32)
  if c.encode.enabled or c.data.source == 'tokens':
    length = math.prod(image_tokenizer.of_run(known['vqgan']).grid(c.data.image_size))
    shapes['tokens'] = jax.ShapeDtypeStruct((size, *images, length), jnp.int32)
  else:
    shapes['image'] = jax.ShapeDtypeStruct((size, *images, c.data.image_size, c.data.image_size, 3), jnp.uint8)
  if 'clip' in known:
    shapes['clip_text'] = jax.ShapeDtypeStruct((size, *frames, known['clip']['tokenizer']['length']), jnp.int32)
  if labels := getattr(model, 'labels', 0):
    shapes['labels'] = jax.ShapeDtypeStruct((size, *images, labels), jnp.bool_)
  if getattr(model, 'sentences', '') == 'data':
    shapes['vectors'] = jax.ShapeDtypeStruct((size, *frames, model.sentence_dim), jnp.float32)
  return shapes


def clip_run(variant: str) -> dict[str, Any]:
  """The config of a CLIP with the vocabulary of OpenAI's."""
  m = clip.build(variant)
  start, end = m.vocab_size - 2, m.vocab_size - 1
  tokenizer = dict(vocab_size=m.vocab_size, length=m.text_length, start=start, end=end, pad=end)
  model = dict(variant=variant)
  return {'objective': 'clip', 'model': model, 'data': {'image_size': m.image_size}, 'tokenizer': tokenizer}


def _layer(x: jax.ShapeDtypeStruct, _: int) -> jax.ShapeDtypeStruct:
  """One layer of the stacked array x, with its sharding."""
  where = NamedSharding(x.sharding.mesh, PartitionSpec(*x.sharding.spec[1:]))
  return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=where)
