"""ru-DALLE (Sber, 2021): Malevich, Kandinsky, Emojich; a transformer with row, column and convolutional masks.

Files: a state_dict (pytorch_model*.bin), preferably with its sizes in model_params.json or config.json next to it, and
the tokenizer bpe.model (YouTokenToMe). The image tokenizer is a VQGAN of taming-transformers: convert it separately and
give the run with --vqgan.

There are two versions with the same tensors. 'v3' reads text and image. 'v2' (Malevich_v2, Emojich) puts a start token
in front, but its masks are built as if there were none, and the window of its convolutional attention wraps around at
the edges of the image. The attention kinds follow from the number of layers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from dalle_jax.convert import files
from dalle_jax.convert.engine import Imported, ModuleSpec, Row, convert, dense, linear, named, norm, part, row, stacked
from dalle_jax.models import dalle

EXPECTED = 'a state_dict of ru-DALLE (pytorch_model*.bin)'
VERSIONS = {'v3': 'no_start', 'v2': 'shifted'}  # version -> layout of our DALLE
HEADS = {768: 12, 2048: 16, 3840: 60}  # by width, of the published models, small, Malevich and Kandinsky
START, END = 2, 3  # ids before and after a caption
IGNORED = (r'.*(row|col|conv)_mask',)


def kinds(depth: int, last: str) -> str:
  """The attention kind of each layer, joined by commas; `last`, that of the last layer, is convolutional."""

  def kind(i: int) -> str:
    if i % 4 == 1:
      return 'column'
    return last if i == depth - 1 else 'row'

  return ','.join(map(kind, range(depth)))


def rows(depth: int, text_vocab: int, sandwich: bool, start: bool) -> list[Row]:
  """Rows of the transformer; the first `text_vocab` ids of the joint head are those of text."""
  one, ours = 'transformer.layers.{i}.', 'blocks/blocks/{block}/'
  block = [*norm(f'{ours}norm_1', f'{one}input_layernorm'), *norm(f'{ours}norm_2', f'{one}post_attention_layernorm')]
  if sandwich:
    block += norm(f'{ours}norm_1_after', f'{one}before_first_addition_layernorm')
    block += norm(f'{ours}norm_2_after', f'{one}before_second_addition_layernorm')
  for i, name in enumerate(('query', 'key', 'value')):
    joint = f'{one}attention.query_key_value'
    block.append(row(f'{ours}attention/{name}/kernel', f'{joint}.weight', part(i, 3, linear)))
    block.append(row(f'{ours}attention/{name}/bias', f'{joint}.bias', part(i, 3)))
  block += dense(f'{ours}attention/out', f'{one}attention.dense')
  block += [*dense(f'{ours}mlp_in', f'{one}mlp.dense_h_to_4h'), *dense(f'{ours}mlp_out', f'{one}mlp.dense_4h_to_h')]
  table = [
    row('text_embed', 'text_embeddings.weight'),
    row('image_embed', 'image_embeddings.weight'),
    row('text_positions', 'text_pos_embeddings.weight', None if start else (lambda x: x[:-1])),
    row('row_positions', 'image_row_embeddings.weight'),
    row('column_positions', 'image_col_embeddings.weight'),
    *norm('norm_out', 'transformer.final_layernorm'),
    *norm('norm_head', 'to_logits.0'),
    *stacked(block, depth),
  ]
  for leaf, their in (('head', 'weight'), ('bias', 'bias')):
    table.append(row(f'text_{leaf}', f'to_logits.1.{their}', lambda x: x[:text_vocab]))
    table.append(row(f'image_{leaf}', f'to_logits.1.{their}', lambda x: x[text_vocab:]))
  return [*table, row('start', 'text_embeddings.weight', lambda x: x[START])] if start else table


def settings(weights: Path, version: str) -> tuple[Mapping[str, Any], str]:
  """The sizes in the config next to the weights, and the version by `version` or the file name; '' if neither says.

  Raises ValueError with a one-line message, also if the two differ.
  """
  file = next((p for n in ('model_params.json', 'config.json') if (p := weights.parent / n).is_file()), None)
  known = files.config(file) if file else {}
  several = {k: v for k, v in known.items() if isinstance(v, dict)}
  named = [v for v in VERSIONS if v in weights.stem]
  if version and named and version not in named:
    raise ValueError(f'{weights} has the weights of {named[0]} by its name; give them with --version {named[0]}.')
  version = version or next(iter(named), '')
  if several and version not in several:
    raise ValueError(f'{file} describes {", ".join(several)}; choose one with --version.')
  return (several[version] if several else known), version


def read(path: Path, *, version: str = '', heads: int = 0) -> Imported:
  """Reads the transformer and, if present, its tokenizer. Raises ValueError or OSError with a one-line message."""
  if version and version not in VERSIONS:
    raise ValueError(f'version {version!r} is unknown; there are {", ".join(VERSIONS)}.')
  first = [f'*{version}*.bin'] if version else []
  weights = files.find(path, *first, 'pytorch_model*.bin', '*.bin', '*.pt', '*.safetensors', expected=EXPECTED)
  theirs = files.state_dict(weights)
  known, version = settings(weights, version)
  tables = ('text_embeddings', 'image_embeddings', 'text_pos_embeddings', 'image_row_embeddings')
  if missing := [t for t in tables if f'{t}.weight' not in theirs]:
    raise ValueError(f'{weights} has no {missing[0]}.weight; expected {EXPECTED}.')
  (text_vocab, width), (codes, _), (positions, _), (side, _) = (theirs[f'{t}.weight'].shape for t in tables)
  depth, text = files.layers(theirs, r'transformer\.layers\.(\d+)\.'), positions - 1
  sandwich = any(k.endswith('before_first_addition_layernorm.weight') for k in theirs)
  heads = heads or known.get('num_attention_heads') or HEADS.get(width, 0)
  if not heads:
    raise ValueError(f'nothing gives the number of attention heads for a width of {width}; give it with --heads.')
  notes = []
  if not version:
    version = 'v3'
    notes.append(f'the name {weights.name} gives no version, so it was read as v3; for a v2 model give --version v2')
  model = dict(
    variant='rudalle',
    d_model=width,
    depth=depth,
    heads=heads,
    attention=kinds(depth, 'wrapped' if version == 'v2' else 'conv'),
    layout=VERSIONS[version],
    image_vocab=codes,
    grid=(side, side),
    norms='sandwich' if sandwich else 'pre',
  )
  start = version == 'v2'
  module = dalle.build(**model, text_vocab=text_vocab, text_length=text)
  ours = ModuleSpec.of(module, *(jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (text, side * side)))
  params = convert(str(weights), rows(depth, text_vocab, sandwich, start), theirs, ours.shapes, IGNORED)
  file = weights.parent / 'bpe.model'
  tokenizer = youtokentome(file) if file.is_file() else None
  if tokenizer is None:
    notes.append(f'{file} does not exist, so captions cannot be tokenized: put it there and convert again')
  elif tokenizer.get_vocab_size() != text_vocab - text:
    raise ValueError(
      f'{file} has {tokenizer.get_vocab_size()} tokens, the model {text_vocab - text}; expected its own tokenizer.'
    )
  config = {
    'objective': 'dalle',
    'model': model,
    'data': {'image_size': 8 * side},  # the VQGAN has f = 8
    'tokenizer': {'vocab_size': text_vocab - text, 'length': text, 'start': START, 'end': END},
  }
  text_json = tokenizer.to_str() if tokenizer else None
  return Imported(config, named('dalle', params), named('dalle', ours.axes), text_json, notes=tuple(notes))


def youtokentome(path: Path, lowercase: bool = True) -> Tokenizer:
  """Reads a YouTokenToMe model: counts, characters with ids, merges (left, right, new), special ids; all in decimal.

  Raises ValueError for any other file.
  """
  try:
    numbers = np.array(path.read_text(encoding='utf-8').split(), np.int64).tolist()
    characters, merges = numbers[:2]
    body = numbers[2:]
    ids = {body[2 * i + 1]: chr(body[2 * i]) for i in range(characters)}
    body = body[2 * characters :]
    pairs = []
    for i in range(merges):
      left, right, new = body[3 * i : 3 * i + 3]
      ids[new] = ids[left] + ids[right]
      pairs.append((ids[left], ids[right]))
    special = dict(zip(('<UNK>', '<PAD>', '<BOS>', '<EOS>'), body[3 * merges : 3 * merges + 4], strict=True))
  except (ValueError, LookupError, OverflowError) as e:
    raise ValueError(f'{path} cannot be read ({" ".join(str(e).split())[:100]}); expected a YouTokenToMe model.') from e
  vocab = {word: i for i, word in ids.items()} | special
  tokenizer = Tokenizer(models.BPE(vocab, pairs, unk_token='<UNK>', fuse_unk=True))
  spaces = [normalizers.Replace(Regex(r'\s+'), ' '), normalizers.Strip()]
  tokenizer.normalizer = normalizers.Sequence([*spaces, *([normalizers.Lowercase()] if lowercase else [])])
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='always')
  tokenizer.decoder = decoders.Metaspace(prepend_scheme='always')
  return tokenizer
