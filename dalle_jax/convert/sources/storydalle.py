"""The released StoryDALL-E (Maharana et al., 2022): a minDALL-E with story encoder, with or without a learnt prompt.

Files: a checkpoint (Model/49.pth, Model/last.ckpt) with vocab.json and merges.txt beside it, and the config.yaml of
minDALL-E, of which the checkpoint says nothing: beside it, in a folder above, or in 1.3B/ there.

Official files do not hold the cross-attention layers, as these were a plain list: neither trained nor saved. They start
at zero here, unless the checkpoint or a file of the name cross_attention.pt has them.
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

EXPECTED = 'a checkpoint of StoryDALL-E (Model/*.pth or *.ckpt) with vocab.json and merges.txt beside it'
NAMES = {  # what a data set added to the vocabulary of minDALL-E, by a part of the path
  'pororo': ('pororo', 'loopy', 'eddy', 'harry', 'poby', 'tongtong', 'crong', 'rody', 'petty'),
  'flintstones': ('fred', 'barney', 'wilma', 'betty', 'pebbles', 'dino', 'slate'),
}
EVERY = 3  # the blocks that look at the source


def _scaled(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """A linear map that reads what its LayerNorm has not scaled yet."""
  return (weight * scale).T


def _shifted(weight: np.ndarray, shift: np.ndarray, bias: np.ndarray) -> np.ndarray:
  return weight @ shift + bias


def cross_rows(layers: int) -> list[Row]:
  """Theirs have a LayerNorm of the source each, ours one for all: scale and bias of theirs go into keys and values."""
  one = 'cross_attention_layers.{i}.'
  table = [row('norm_scale', f'{one}ln1.weight'), row('norm_bias', f'{one}ln1.bias')]
  for ours, theirs in (('query', 'query'), ('out', 'proj')):
    table += [row(f'{ours}_kernel', f'{one}attn.{theirs}.weight', linear)]
    table += [row(f'{ours}_bias', f'{one}attn.{theirs}.bias', missing=0.0)]
  for name in ('key', 'value'):
    weight, bias = f'{one}attn.{name}.weight', f'{one}attn.{name}.bias'
    table.append(row(f'{name}_kernel', (weight, f'{one}ln2.weight'), lambda w, s: _scaled(w, s)))
    table.append(row(f'{name}_bias', (weight, f'{one}ln2.bias', bias), lambda w, s, b: _shifted(w, s, b)))
  return stacked(table, layers)


def fresh(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
  """Cross-attention that adds nothing yet: only its output is zero."""
  if name.endswith(('query_kernel', 'key_kernel', 'value_kernel')):
    return rng.normal(0, shape[1] ** -0.5, shape).astype(np.float32)
  return np.full(shape, float(name.endswith('norm_scale')), np.float32)


def read(path: Path, *, config: str = '', cross: str = '', **options: Any) -> Imported:
  """Both networks, their VQGAN and tokenizer; `config` and `cross` are files that are not where they usually are.

  Raises ValueError and OSError of one line.
  """
  weights = files.find(path, '*.pth', '*.ckpt', 'Model/*.pth', 'Model/*.ckpt', expected=EXPECTED)
  description = Path(config) if config else _beside(weights, 'config.yaml', '1.3B/config.yaml')
  if description is None or not description.is_file():
    raise FileNotFoundError(
      f'there is no config.yaml of minDALL-E beside {weights} or above it; give it with --config FILE.'
    )
  theirs, base = files.state_dict(weights), files.config(description)
  words, names = _words(weights, theirs)
  stage1 = files.fields(description, base, 'stage1.embed_dim', 'stage1.n_embed', 'stage1.hparams')
  stage2 = files.fields(description, base, 'stage2')['stage2']
  sizes = taming.fields(description, stage1['hparams'], stage1['embed_dim'], stage1['n_embed'])
  model, lengths = mindalle.model_fields(description, stage2)
  if model['depth'] % EVERY:
    raise ValueError(f'{description} has {model["depth"]} layers, of which every third cannot look at a source.')
  source, pad = str(weights), words.token_to_id(mindalle.PADDING)
  for name in ('stage2.tok_emb_img.weight', 'story_linear.weight'):
    if name not in theirs:
      raise ValueError(f'{weights} has no {name}; expected {EXPECTED}.')
  codes = theirs['stage2.tok_emb_img.weight'].shape[0]
  vqgan = taming.tokenizer(source, sizes, files.under(theirs, 'stage1.'))
  ours = mindalle.network(model, words.get_vocab_size(), pad, codes, lengths)
  rows = mindalle.rows(model['depth'], model['period'])
  params = named('dalle', convert(source, rows, files.under(theirs, 'stage2.'), ours.shapes))
  axes = named('dalle', ours.axes)

  # What is added
  args = _beside(weights, 'story_args.json')
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
  own = {k: v for k, v in shapes.items() if not k.startswith(('cross/', 'norm_source/'))}
  params |= named('story', convert(source, table, extra, own))
  looking = {k.removeprefix('cross/'): v for k, v in shapes.items() if k.startswith('cross/')}
  notes: tuple[str, ...] = ()
  layers = _cross(weights, cross, theirs)
  if layers:
    found = convert(source, cross_rows(model['depth'] // EVERY), layers, looking)
  else:
    rng = np.random.default_rng(0)
    found = {k: fresh(k, v.shape, rng) for k, v in looking.items()}
    notes = (
      f'{weights} has no cross-attention layers (official files have none: they were never trained), so the model does '
      'not look at the source frame until it is fine-tuned: they start at zero',
    )
  params |= named('story/cross', found)
  params |= {'story/norm_source/scale': np.ones(model['d_model'], np.float32)}
  params |= {'story/norm_source/bias': np.zeros(model['d_model'], np.float32)}
  axes |= {k: v for k, v in whole.axes.items() if k.startswith('story/')}
  tokenizer = {'vocab_size': words.get_vocab_size(), 'length': text, 'pad': pad, 'new_tokens': list(names)}
  settings = {
    'objective': 'story_dalle',
    'model': model | additions,
    'data': {'image_size': sizes['image_size']},
    'tokenizer': tokenizer,
  }
  return Imported(settings, params, axes, words.to_str(), {'vqgan': vqgan}, notes)


def _beside(path: Path, *names: str) -> Path | None:
  """The first of these files in the folder of `path` or one of three above."""
  folders = [path.absolute().parent, *path.absolute().parent.parents][:4]
  return next((f / name for f in folders for name in names if (f / name).is_file()), None)


def _words(weights: Path, theirs: Mapping[str, Any]) -> tuple[Any, tuple[str, ...]]:
  """The tokenizer, grown by the names that the embedding has grown by, and these."""
  table = theirs.get('stage2.tok_emb_txt.weight')
  if table is None:
    raise ValueError(f'{weights} has no stage2.tok_emb_txt.weight; expected {EXPECTED}.')
  base = mindalle.tokenizer(weights.parent).get_vocab_size()
  grown = table.shape[0] - base
  fitting = {data: names for data, names in NAMES.items() if len(names) == grown}
  named_so = {data: names for data, names in fitting.items() if data in str(weights)} or fitting
  if grown and not named_so:
    raise ValueError(
      f'{weights} knows {table.shape[0]} words, the vocabulary beside it {base}; expected as many, or 9 more (Pororo) '
      'or 7 more (Flintstones).'
    )
  names = next(iter(named_so.values())) if grown else ()
  return mindalle.tokenizer(weights.parent, names), names


def _cross(weights: Path, cross: str, theirs: Mapping[str, Any]) -> dict[str, Any]:
  """Tensors of the cross-attention layers, or none."""
  prefix = 'cross_attention_layers.'
  file = Path(cross) if cross else weights.parent / 'cross_attention.pt'
  if cross or file.is_file():
    theirs = files.state_dict(files.find(file, expected='cross-attention layers'))
  return {k: v for k, v in theirs.items() if k.startswith(prefix)}
