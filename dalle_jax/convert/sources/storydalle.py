"""The released StoryDALL-E (Maharana et al., 2022): a minDALL-E with a story encoder, with or without a learned prompt.

Files: a checkpoint (Model/49.pth, Model/last.ckpt) with vocab.json and merges.txt next to it, and the config.yaml of
minDALL-E, as the checkpoint does not have those sizes: next to it, in a folder above, or in 1.3B/ of one of these.

Official files lack the cross-attention layers: they were in a plain Python list, and neither trained nor saved.
Here their output starts at zero, unless the checkpoint or a file named cross_attention.pt has them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.convert import files
from dalle_jax.convert.engine import Imported, ModuleSpec, Row, convert, dense, linear, named, row, stacked
from dalle_jax.convert.sources import mindalle, taming
from dalle_jax.models import story_dalle

EXPECTED = 'a checkpoint of StoryDALL-E (Model/*.pth or *.ckpt) with vocab.json and merges.txt next to it'
NAMES = {  # data set, a part of the path -> names that it added to the vocabulary of minDALL-E
  'pororo': ('pororo', 'loopy', 'eddy', 'harry', 'poby', 'tongtong', 'crong', 'rody', 'petty'),
  'flintstones': ('fred', 'barney', 'wilma', 'betty', 'pebbles', 'dino', 'slate'),
}
EVERY = 3  # every third block has cross-attention to the source


def _scaled(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """Folds the scale of a preceding LayerNorm into a linear map: [out, in] -> [in, out]."""
  return (weight * scale).T


def _shifted(weight: np.ndarray, shift: np.ndarray, bias: np.ndarray) -> np.ndarray:
  """Folds the shift of a preceding LayerNorm into the bias of a linear map."""
  return weight @ shift + bias


def cross_rows(layers: int) -> list[Row]:
  """Rows of the cross-attention layers.

  Each of theirs has its own LayerNorm of the source, ours share one, so their scale and bias are folded into the maps
  to keys and values.
  """
  one = 'cross_attention_layers.{i}.'
  table = [row('norm_scale', f'{one}ln1.weight'), row('norm_bias', f'{one}ln1.bias')]
  for ours, theirs in (('query', 'query'), ('out', 'proj')):
    table += [row(f'{ours}_kernel', f'{one}attn.{theirs}.weight', linear)]
    table += [row(f'{ours}_bias', f'{one}attn.{theirs}.bias', missing=0.0)]
  for name in ('key', 'value'):
    # Both read ln2 on purpose; a separate lambda for each keeps the engine from refusing it as used twice.
    weight, bias = f'{one}attn.{name}.weight', f'{one}attn.{name}.bias'
    table.append(row(f'{name}_kernel', (weight, f'{one}ln2.weight'), lambda w, s: _scaled(w, s)))
    table.append(row(f'{name}_bias', (weight, f'{one}ln2.bias', bias), lambda w, s, b: _shifted(w, s, b)))
  return stacked(table, layers)


def fresh(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
  """An initial value for a parameter of cross-attention whose output is zero."""
  if name.endswith(('query_kernel', 'key_kernel', 'value_kernel')):
    return rng.normal(0, shape[1] ** -0.5, shape).astype(np.float32)
  return np.full(shape, float(name.endswith('norm_scale')), np.float32)


def read(path: Path, *, config: str = '', cross: str = '') -> Imported:
  """Reads DALL-E, story encoder, VQGAN and tokenizer; `config` and `cross` are files that are not in their usual place.

  Raises ValueError or OSError with a one-line message.
  """
  weights = files.find(path, '*.pth', '*.ckpt', 'Model/*.pth', 'Model/*.ckpt', expected=EXPECTED)
  if config:
    description = files.find(Path(config), 'config.yaml', expected='the config.yaml of minDALL-E')
  elif (description := _nearby(weights, 'config.yaml', '1.3B/config.yaml')) is None:
    raise FileNotFoundError(
      f'there is no config.yaml of minDALL-E next to {weights} or above it; give it with --config FILE.'
    )
  theirs, base = files.state_dict(weights), files.config(description)
  tokenizer, names = _tokenizer(weights, theirs)
  stage1 = files.fields(description, base, 'stage1.embed_dim', 'stage1.n_embed', 'stage1.hparams')
  stage2 = files.fields(description, base, 'stage2')['stage2']
  sizes = taming.fields(description, stage1['hparams'], stage1['embed_dim'], stage1['n_embed'])
  model, lengths = mindalle.model_fields(description, stage2)
  if model['depth'] % EVERY:
    raise ValueError(
      f'{description} has {model["depth"]} layers; expected a multiple of {EVERY}, as every third has cross-attention.'
    )
  source, pad = str(weights), tokenizer.token_to_id(mindalle.PADDING)
  for name in ('stage2.tok_emb_img.weight', 'story_linear.weight'):
    if name not in theirs:
      raise ValueError(f'{weights} has no {name}; expected {EXPECTED}.')
  model['image_vocab'] = theirs['stage2.tok_emb_img.weight'].shape[0]
  vqgan = taming.tokenizer(source, sizes, files.under(theirs, 'stage1.'))
  ours = mindalle.network(model, tokenizer.get_vocab_size(), pad, lengths['ctx_len_txt'])
  rows = mindalle.rows(model['depth'], model['period'])
  params = named('dalle', convert(source, rows, files.under(theirs, 'stage2.'), ours.shapes))
  axes = named('dalle', ours.axes)

  # What StoryDALL-E adds
  args = _nearby(weights, 'story_args.json')
  frames = files.config(args).get('story_len', 4) if args else 4
  additions = dict(
    retro=EVERY,
    story_encoder='released',
    prompt=theirs['wte.weight'].shape[0] if 'wte.weight' in theirs else 0,
    sentences='data',
    sentence_dim=theirs['story_linear.weight'].shape[1],
    frames=int(frames),
  )
  side, text = ours.module.grid, ours.module.text_length
  module = story_dalle.StoryDALLE(dalle=ours.module, **additions)
  tokens = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  image = tokens(1, 1, side[0] * side[1])
  sentences = jax.ShapeDtypeStruct((1, 1, additions['sentence_dim']), jnp.float32)
  whole = ModuleSpec.of(module, tokens(1, 1, text), image, tokens(1, image.shape[2]), sentences)
  shapes = {k.removeprefix('story/'): v for k, v in whole.shapes.items() if k.startswith('story/')}
  extra = {k: v for k, v in theirs.items() if not k.startswith(('stage1.', 'stage2.', 'cross_attention_layers.'))}
  table = [*dense('encoder/linear', 'story_linear'), *mindalle.block('encoder/block', 'story_block')]
  if additions['prompt']:
    table += [row('prompt/embedding', 'wte.weight')]
    table += [*dense('prompt/in', 'control_trans.0'), *dense('prompt/out', 'control_trans.2')]
  encoder = {k: v for k, v in shapes.items() if not k.startswith(('cross/', 'norm_source/'))}
  params |= named('story', convert(source, table, extra, encoder))
  cross_shapes = {k.removeprefix('cross/'): v for k, v in shapes.items() if k.startswith('cross/')}
  notes: tuple[str, ...] = ()
  layers = _cross(weights, cross, theirs)
  if layers:
    cross_params = convert(source, cross_rows(model['depth'] // EVERY), layers, cross_shapes)
  else:
    rng = np.random.default_rng(0)
    cross_params = {k: fresh(k, v.shape, rng) for k, v in cross_shapes.items()}
    notes = (
      f'{weights} has no cross-attention layers (official files never do: they were not trained), so their output '
      'starts at zero, and the model ignores the source frame until it is fine-tuned',
    )
  params |= named('story/cross', cross_params)
  params |= {'story/norm_source/scale': np.ones(model['d_model'], np.float32)}
  params |= {'story/norm_source/bias': np.zeros(model['d_model'], np.float32)}
  axes |= {k: v for k, v in whole.axes.items() if k.startswith('story/')}
  settings = {
    'objective': 'story_dalle',
    'model': model | additions,
    'data': {'image_size': sizes['image_size']},
    'tokenizer': {
      'vocab_size': tokenizer.get_vocab_size(),
      'length': text,
      'pad': pad,
      'new_tokens': list(names),
    },
  }
  return Imported(settings, params, axes, tokenizer.to_str(), {'vqgan': vqgan}, notes)


def _nearby(path: Path, *names: str) -> Path | None:
  """The first of these files that exists in the folder of `path` or in one of the three folders above it."""
  folders = [path.absolute().parent, *path.absolute().parent.parents][:4]
  return next((f / name for f in folders for name in names if (f / name).is_file()), None)


def _tokenizer(weights: Path, theirs: Mapping[str, Any]) -> tuple[Any, tuple[str, ...]]:
  """The tokenizer with the names that were added to the embedding, and these names."""
  table = theirs.get('stage2.tok_emb_txt.weight')
  if table is None:
    raise ValueError(f'{weights} has no stage2.tok_emb_txt.weight; expected {EXPECTED}.')
  base = mindalle.tokenizer(weights.parent).get_vocab_size()
  grown = table.shape[0] - base
  candidates = {data: names for data, names in NAMES.items() if len(names) == grown}
  candidates = {data: names for data, names in candidates.items() if data in str(weights)} or candidates
  if grown and not candidates:
    raise ValueError(
      f'{weights} embeds {table.shape[0]} tokens, the vocabulary next to it has {base}; expected as many, or 9 more '
      '(Pororo) or 7 more (Flintstones).'
    )
  names = next(iter(candidates.values())) if grown else ()
  return mindalle.tokenizer(weights.parent, names), names


def _cross(weights: Path, cross: str, theirs: Mapping[str, Any]) -> dict[str, Any]:
  """The tensors of the cross-attention layers; an empty dict if there are none."""
  prefix = 'cross_attention_layers.'
  file = Path(cross) if cross else weights.parent / 'cross_attention.pt'
  if cross or file.is_file():
    theirs = files.state_dict(files.find(file, expected='cross-attention layers'))
  return {k: v for k, v in theirs.items() if k.startswith(prefix)}
