"""Karlo, Kakao Brain's public unCLIP in the format of diffusers: kakaobrain/karlo-v1-alpha and -image-variations.

Files: a folder with model_index.json and a folder for each part: prior, text_proj, decoder, super_res_first,
super_res_last, their schedulers, text_encoder, tokenizer; the second repository has image_encoder instead of the prior.
The result is a run of the decoder, with its CLIP, prior and upsampler as frozen runs. With `image_encoder`, the folder
of that name in the second repository, the run can also make variations of images.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.convert import files
from dalle_jax.convert.engine import (
  Imported,
  ModuleSpec,
  Row,
  conv2d,
  convert,
  dense,
  linear,
  named,
  norm,
  row,
  stacked,
)  # fmt: skip
from dalle_jax.convert.sources import clip as clip_source
from dalle_jax.convert.sources.clip import within
from dalle_jax.models import clip, prior, unclip, upsampler
from dalle_jax.models.clip_reader import Caption, ClipReader

EXPECTED = 'a diffusers folder with model_index.json, decoder/, text_proj/, super_res_first/, text_encoder/, ...'
PIPELINES = ('UnCLIPPipeline', 'UnCLIPImageVariationPipeline')
WEIGHTS = ('diffusion_pytorch_model', 'model', 'pytorch_model')  # .safetensors or .bin
DOWN = {'ResnetDownsampleBlock2D': False, 'SimpleCrossAttnDownBlock2D': True}  # whether the block has attention
SHIFTS = {'default': 'add', 'scale_shift': 'scale'}


def read(path: Path, *, image_encoder: str = '') -> Imported:
  """Reads all parts that the folder has. Raises ValueError or OSError with a one-line message."""
  path = Path(path).expanduser()
  index = files.find(path, 'model_index.json', expected=EXPECTED)
  if (kind := files.config(index).get('_class_name')) not in PIPELINES:
    raise ValueError(f'{index} has _class_name {kind!r}; expected one of {", ".join(PIPELINES)}.')
  image_tower = Path(image_encoder).expanduser() if image_encoder else path
  if image_tower.name != 'image_encoder':
    image_tower /= 'image_encoder'
  if image_encoder and not image_tower.is_dir():
    raise FileNotFoundError(
      f'{image_tower} does not exist; expected the image_encoder folder of the second repository.'
    )
  parts = {'clip': of_clip(path, image_tower if image_tower.is_dir() else None)}
  notes = []
  reader = ClipReader.of_run(parts['clip'].config, raw=True)
  if (path / 'prior').is_dir():
    parts['prior'] = of_prior(path, reader)
  else:
    notes.append(f'{path} has no prior, so this run makes variations of images and cannot sample from captions')
  if not image_tower.is_dir():
    notes.append(
      f'{path} has no image_encoder, so this run makes no variations of images; give that of the other repository'
    )
  parts['upsampler'] = of_upsampler(path)
  low = parts['upsampler'].config['model']['low_size']
  return of_decoder(path, reader, low, parts, tuple(notes))


# --- Parts


def _part(path: Path, name: str) -> tuple[Path, dict[str, Any], str, dict[str, Any]]:
  """Reads a part: the path of its config, the config, the name of the weights file and its tensors."""
  file = files.find(path / name, 'config.json', expected=EXPECTED)
  patterns = [f'{stem}.{kind}' for kind in ('safetensors', 'bin') for stem in WEIGHTS]
  weights = files.find(path / name, *patterns, expected=f'the weights of {name}')
  return file, files.config(file), str(weights), files.state_dict(weights)


def _diffusion(path: Path, name: str, **expected: Any) -> tuple[Path, dict[str, Any]]:
  """Reads the config of a scheduler over the defaults of its class. Raises ValueError if it differs from `expected`."""
  file = files.find(path / name, 'scheduler_config.json', expected=EXPECTED)
  defaults = dict(
    num_train_timesteps=1000, variance_type='fixed_small_log', clip_sample=True, clip_sample_range=1.0,
    prediction_type='epsilon', beta_schedule='squaredcos_cap_v2',
  )  # fmt: skip
  config = defaults | files.config(file)
  for key, value in (dict(beta_schedule='squaredcos_cap_v2', clip_sample=True) | expected).items():
    if config[key] != value:
      raise ValueError(f'{file} has {key} {config[key]!r}; only {value!r} can be read.')
  for key in ('num_train_timesteps', 'clip_sample_range'):
    if not isinstance(config[key], (int, float)):
      raise ValueError(f'{file} has {key} {config[key]!r}; expected a number.')
  return file, config


def _only(file: Path, config: Mapping[str, Any], **expected: Any) -> None:
  """Raises ValueError if a field has another value than the only one that our network supports."""
  for key, value in expected.items():
    if config.get(key, value) != value:
      raise ValueError(f'{file} has {key} {config[key]!r}; only {value!r} can be read.')


def of_clip(path: Path, image_tower: Path | None) -> Imported:
  """The CLIP: its text tower, and its image tower if the folder is given."""
  file, config, weights, theirs = _part(path, 'text_encoder')
  fields, vocab_size, length = clip_source.text_fields(file, config)
  embed_dim = files.fields(file, config, 'projection_dim')['projection_dim']
  table, image, text = clip_source.text_rows(fields['text_layers']), {}, jax.ShapeDtypeStruct((1, length), jnp.int32)
  if image_tower:
    image_file, image_config, image_weights, more = _part(image_tower.parent, image_tower.name)
    image = clip_source.image_fields(image_file, image_config)
    mean, std = clip_source.pixels(image_tower.parent / 'feature_extractor' / 'preprocessor_config.json')
    table, theirs = table + clip_source.image_rows(image['layers'], mean, std), {**theirs, **more}
    weights = f'{weights} and {image_weights}'
    if image_config.get('projection_dim') != embed_dim:
      raise ValueError(
        f'{image_file} has projection_dim {image_config.get("projection_dim")}, {file} {embed_dim}; they must be equal.'
      )
  model = clip_source.both(file, image, fields, embed_dim)
  model.setdefault('image_size', 0)  # no image tower
  module = clip.build(**model, vocab_size=vocab_size, text_length=length)
  if image_tower:
    size = model['image_size']
    ours = ModuleSpec.of(module, (1, size, size, 3), text)
  else:
    ours = ModuleSpec.of(module, text, method='encode_text')
  shapes = {k: v for k, v in ours.shapes.items() if k != 'logit_scale'}
  params = convert(weights, table, theirs, shapes, [r'.*position_ids'])
  params['logit_scale'] = np.zeros((), np.float32)  # the files have none, and nothing reads it
  params, axes = named('clip', params), named('clip', ours.axes)
  return clip_source.imported(model, vocab_size, length, path / 'tokenizer', params, axes)


def of_prior(path: Path, reader: ClipReader) -> Imported:
  file, config, weights, theirs = _part(path, 'prior')
  known = dict(added_emb_type='prd', embedding_proj_norm_type=None, encoder_hid_proj_type='linear', norm_in_type=None)
  _only(file, config, **known, additional_embeddings=prior.ADDED, time_embed_act_fn='silu')
  c = files.fields(file, config, 'num_attention_heads', 'attention_head_dim', 'num_layers', 'num_embeddings')
  _, schedule = _diffusion(path, 'prior_scheduler', prediction_type='sample', variance_type='fixed_small_log')
  width = c['num_attention_heads'] * c['attention_head_dim']
  _only(file, config, time_embed_dim=None, clip_embed_dim=None, embedding_dim=reader.model.embed_dim)
  if c['num_embeddings'] != reader.model.text_length:
    raise ValueError(
      f'{file} has {c["num_embeddings"]} text tokens, the text encoder {reader.model.text_length}; expected the same.'
    )
  fields = dict(variant='karlo', width=width, depth=c['num_layers'], heads=c['num_attention_heads'], raw=True)
  fields |= dict(steps=schedule['num_train_timesteps'], clip=float(schedule['clip_sample_range']))
  module = prior.build(**fields, **reader.sizes)
  ours = _network(module, reader, (1, reader.model.embed_dim))
  one = 'transformer_blocks.{i}.'
  block = [*norm('norm_1', f'{one}norm1'), *norm('norm_2', f'{one}norm3')]
  for our, their in dict(query='to_q', key='to_k', value='to_v', out='to_out.0').items():
    block += dense(f'attention/{our}', f'{one}attn1.{their}')
  block += [*dense('mlp_in', f'{one}ff.net.0.proj'), *dense('mlp_out', f'{one}ff.net.2')]
  names = dict(text_in='encoder_hidden_states_proj', caption_in='embedding_proj', image_in='proj_in')
  names |= {f'time/{our}': f'time_embedding.linear_{i + 1}' for i, our in enumerate(('in', 'out'))}
  names |= dict(out='proj_to_clip_embeddings')
  table = [r for our, their in names.items() for r in dense(our, their)]
  table += [row('positions', 'positional_embedding'), row('query', 'prd_embedding'), *norm('norm_out', 'norm_out')]
  table += [row('mean', 'clip_mean'), row('std', 'clip_std')]
  table += stacked(within('blocks/blocks/{block}', block), c['num_layers'])
  return _imported('prior', fields, convert(weights, table, theirs, ours.shapes), ours, reader.model.image_size)


def of_upsampler(path: Path) -> Imported:
  file, config, weights, theirs = _part(path, 'super_res_first')
  _, other, last_weights, last = _part(path, 'super_res_last')
  changed = [k for k in config if not k.startswith('_') and config[k] != other.get(k)]
  if changed:
    raise ValueError(
      f'{file.parent} and super_res_last differ in {", ".join(changed)}; expected the same architecture.'
    )
  fields, attention = _unet_fields(file, config)
  if attention:
    raise ValueError(f'{file} has attention; expected an upsampler with convolutions only.')
  del fields['attention'], fields['head_dim']
  noise = dict(prediction_type='epsilon', variance_type='fixed_small_log', clip_sample_range=1.0)
  _, schedule = _diffusion(path, 'super_res_scheduler', **noise)
  size = files.fields(file, config, 'sample_size')['sample_size']
  decoder = files.find(path / 'decoder', 'config.json', expected=EXPECTED)
  low = files.fields(decoder, files.config(decoder), 'sample_size')
  fields |= dict(variant='karlo', image_size=size, low_size=low['sample_size'])
  fields['steps'] = schedule['num_train_timesteps']
  _only(file, config, in_channels=6, out_channels=3)
  module = upsampler.build(**fields)
  image = lambda size: (1, size, size, 3)
  ours = ModuleSpec.of(module, image(size), _steps(), image(fields['low_size']))
  table = within('unet', unet_rows(fields, ()))
  params = named('upsampler', convert(weights, table, theirs, ours.shapes))
  params |= named('last', convert(last_weights, table, last, ours.shapes))
  axes = {**named('upsampler', ours.axes), **named('last', ours.axes)}
  settings = {'objective': 'upsampler', 'model': fields, 'data': {'image_size': size}, 'tokenizer': {}}
  return Imported(settings, params, axes)


def of_decoder(
  path: Path, reader: ClipReader, size: int, parts: dict[str, Imported], notes: tuple[str, ...]
) -> Imported:
  file, config, weights, theirs = _part(path, 'decoder')
  text_file, text, text_weights, more = _part(path, 'text_proj')
  _only(file, config, in_channels=3, out_channels=6, class_embed_type='identity', time_embedding_dim=None)
  noise = dict(prediction_type='epsilon', variance_type='learned_range', clip_sample_range=1.0)
  _, schedule = _diffusion(path, 'decoder_scheduler', **noise)
  fields, attention = _unet_fields(file, config)
  tokens = text.get('clip_extra_context_tokens', 4)
  wide = files.fields(text_file, text, 'cross_attention_dim')['cross_attention_dim']
  made = more.get('clip_extra_context_tokens_proj.bias')
  if made is not None and made.shape != (tokens * wide,):
    raise ValueError(
      f'{text_file} has {tokens} tokens of {wide} numbers, but its weights produce {made.shape[0]} numbers.'
    )
  fields |= dict(variant='karlo', image_size=size, extra_tokens=tokens, context_dim=wide, raw=True)
  fields['steps'] = schedule['num_train_timesteps']
  module = unclip.build(**fields, **reader.sizes)
  embed = (1, reader.model.embed_dim)
  ours = _network(module, reader, (1, size, size, 3), embed)
  names = dict(
    image_time='clip_image_embeddings_project_to_time_embeddings',
    caption_time='embedding_proj',
    text_in='encoder_hidden_states_proj',
  )
  table = [r for our, their in names.items() for r in dense(our, their)]
  table += [*norm('text_norm', 'text_encoder_hidden_states_norm')]
  table += [row('no_image', 'learned_classifier_free_guidance_embeddings')]
  # Theirs produce [context_dim, tokens], ours [tokens, context_dim].
  by_token = lambda x: np.moveaxis(x.reshape(wide, tokens, -1), 1, 0).reshape(x.shape)
  tokens_proj = 'clip_extra_context_tokens_proj'
  table += [row('image_tokens/kernel', f'{tokens_proj}.weight', lambda w: linear(by_token(w)))]
  table += [row('image_tokens/bias', f'{tokens_proj}.bias', lambda b: by_token(b))]
  within_unet = {k: v for k, v in ours.shapes.items() if k.startswith('unet/')}
  outside_unet = {k: v for k, v in ours.shapes.items() if k not in within_unet}
  params = convert(text_weights, table, more, outside_unet)
  params |= convert(weights, within('unet', unet_rows(fields, attention)), theirs, within_unet)
  made = _imported('unclip', fields, params, ours, size)
  return Imported(made.config, made.params, made.axes, None, parts, notes)


# --- U-Nets


def _unet_fields(file: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[int, ...]]:
  """The fields of our `models.unet.UNet` and its levels with attention. Raises ValueError for other kinds of U-Net."""
  names = ('block_out_channels', 'layers_per_block', 'down_block_types', 'up_block_types', 'norm_num_groups')
  c = files.fields(file, config, *names)
  if wrong := [k for k in names if not isinstance(c[k], int if k in ('layers_per_block', 'norm_num_groups') else list)]:
    raise ValueError(f'{file} has {wrong[0]} {c[wrong[0]]!r}; expected the config of a diffusers U-Net.')
  if unknown := sorted(set(c['down_block_types']) - set(DOWN)):
    raise ValueError(f'{file} has down_block_types {", ".join(unknown)}; expected {", ".join(DOWN)}.')
  attention = tuple(i for i, kind in enumerate(c['down_block_types']) if DOWN[kind])
  up = ['SimpleCrossAttnUpBlock2D' if DOWN[k] else 'ResnetUpsampleBlock2D' for k in c['down_block_types'][::-1]]
  if list(c['up_block_types']) != up:
    raise ValueError(f'{file} has up_block_types {c["up_block_types"]}; expected {up}.')
  shift = config.get('resnet_time_scale_shift', 'default')
  if shift not in SHIFTS or (attention and shift != 'scale_shift'):
    raise ValueError(f"{file} has resnet_time_scale_shift {shift!r}; with attention only 'scale_shift' can be read.")
  same = dict(act_fn='silu', flip_sin_to_cos=True, freq_shift=0, norm_eps=1e-5, resnet_skip_time_act=False)
  same |= dict(only_cross_attention=False, cross_attention_norm=None, center_input_sample=False, add_attention=False)
  same |= dict(resnet_out_scale_factor=1.0, mid_block_scale_factor=1, downsample_padding=1, conv_in_kernel=3)
  if attention:
    del same['add_attention']
  _only(file, config, **same, mid_block_type='UNetMidBlock2DSimpleCrossAttn' if attention else 'UNetMidBlock2D')
  fields = dict(
    channels=tuple(c['block_out_channels']),
    num_res_blocks=c['layers_per_block'],
    attention=attention,
    head_dim=config.get('attention_head_dim') or 8,
    norm_groups=c['norm_num_groups'],
  )
  return (fields if attention else fields | dict(shift=SHIFTS[shift])), attention


def unet_rows(fields: Mapping[str, Any], attention: tuple[int, ...]) -> list[Row]:
  channels, count = fields['channels'], fields['num_res_blocks']

  def res(ours: str, theirs: str, wider: bool) -> list[Row]:
    table = [*norm(f'{ours}/norm1', f'{theirs}.norm1'), *norm(f'{ours}/norm2', f'{theirs}.norm2')]
    table += [*conv2d(f'{ours}/conv1', f'{theirs}.conv1'), *conv2d(f'{ours}/conv2', f'{theirs}.conv2')]
    table += dense(f'{ours}/time', f'{theirs}.time_emb_proj')
    return [*table, *conv2d(f'{ours}/nin_shortcut', f'{theirs}.conv_shortcut')] if wider else table

  def attn(ours: str, theirs: str) -> list[Row]:
    table = norm(f'{ours}/norm', f'{theirs}.group_norm')
    for our, their in dict(q='to_q', k='to_k', v='to_v', proj_out='to_out.0').items():
      table += dense(f'{ours}/{our}', f'{theirs}.{their}')  # ours are 1 x 1 convolutions
    for our, their in dict(k_context='add_k_proj', v_context='add_v_proj').items():
      table += dense(f'{ours}/{our}', f'{theirs}.{their}')
    return table

  table = [*conv2d('conv_in', 'conv_in'), *norm('norm_out', 'conv_norm_out'), *conv2d('conv_out', 'conv_out')]
  table += [*dense('time/in', 'time_embedding.linear_1'), *dense('time/out', 'time_embedding.linear_2')]
  last, before = len(channels) - 1, channels[0]
  for level, wide in enumerate(channels):
    down = f'down_blocks.{level}'
    for i in range(count):
      table += res(f'down_{level}_block_{i}', f'{down}.resnets.{i}', before != wide)
      table += attn(f'down_{level}_attn_{i}', f'{down}.attentions.{i}') if level in attention else []
      before = wide
    table += res(f'down_{level}_downsample', f'{down}.downsamplers.0', False) if level < last else []
    up = f'up_blocks.{last - level}'
    for i in range(count + 1):
      table += res(f'up_{level}_block_{i}', f'{up}.resnets.{i}', True)
      table += attn(f'up_{level}_attn_{i}', f'{up}.attentions.{i}') if level in attention else []
    table += res(f'up_{level}_upsample', f'{up}.upsamplers.0', False) if level else []
  for i in range(2):
    table += res(f'mid_block_{i}', f'mid_block.resnets.{i}', False)
  return table + (attn('mid_attn', 'mid_block.attentions.0') if attention else [])


# --- Building our modules


def _steps() -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((1,), jnp.int32)


def _network(module: Any, reader: ClipReader, *inputs: tuple[int, ...]) -> ModuleSpec:
  """Initialises a module whose inputs are a noisy array, its step, optionally an embedding, and a caption."""
  noisy, *more = inputs
  return ModuleSpec.of(module, noisy, _steps(), *more, Caption.blank(reader.sizes))


def _imported(
  kind: str, fields: dict[str, Any], params: dict[str, np.ndarray], ours: ModuleSpec, image_size: int
) -> Imported:
  settings = {'objective': kind, 'model': fields, 'data': {'image_size': image_size}, 'tokenizer': {}}
  return Imported(settings, named(kind, params), named(kind, ours.axes))
