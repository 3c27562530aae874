"""DALL-E mini and mega (Dayma et al., 2021) in the layout of kuprel/min-dalle.

Files, as min-dalle stores them: a folder with dalle_bart_mini/ or dalle_bart_mega/, which have encoder.pt, decoder.pt,
vocab.json and merges.txt, and vqgan/detoker.pt, the decoder of the VQGAN, whose pixel values are in [0, 1]. As they are
published: all in one folder, those of mini with names like encoder_mini.pt.

The sizes follow from the tensors, but for the number of heads. The norms before matrix products have no scale in the
JAX weights that these files were made from. As in min-dalle, the decoder starts with the last code (2 ** 14 - 1); the
original starts with the last row of the embedding, which is no code. GroupNorms have the eps of the VQGAN, 1e-6, where
min-dalle has 1e-5.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from dalle_jax.convert import files
from dalle_jax.convert.engine import Imported, ModuleSpec, Row, convert, linear, named, row, stacked
from dalle_jax.convert.sources import taming
from dalle_jax.models import dalle_mini, vqgan

EXPECTED = 'the files of min-dalle: dalle_bart_mini/ or dalle_bart_mega/, and vqgan/detoker.pt'
SUFFIXES = {'mini': '_mini', 'mega': ''}  # of the published files
ATTENTION_HEADS = {1024: 16, 2048: 32}  # by width, of the published models, mini and mega
START, PADDING, END, UNKNOWN = '<s>', '<pad>', '</s>', '<unk>'
SPACE = '\u0120'  # in front of every word


def layer_norm(ours: str, theirs: str) -> list[Row]:
  """Scale, which may be absent, and bias of a LayerNorm."""
  return [row(f'{ours}/scale', f'{theirs}.weight', None, 1.0), row(f'{ours}/bias', f'{theirs}.bias')]


def block(ours: str, theirs: str, cross: bool) -> list[Row]:
  """Rows of a block of the encoder, or of the decoder, which has cross-attention."""
  names = {'query': 'q_proj', 'key': 'k_proj', 'value': 'v_proj', 'out': 'out_proj'}
  table = []
  for our, their, place in (('attention', 'self_attn', 'norm_1'), ('cross', 'encoder_attn', 'norm_cross'))[: 1 + cross]:
    table += [row(f'{ours}/{our}/{a}/kernel', f'{theirs}.{their}.{b}.weight', linear) for a, b in names.items()]
    table += layer_norm(f'{ours}/{place}', f'{theirs}.pre_{their}_layer_norm')
    table += layer_norm(f'{ours}/{place}_after', f'{theirs}.{their}_layer_norm')
  # Self-attention of the original has no biases.
  table += [row(f'{ours}/attention/{a}/bias', f'{theirs}.self_attn.{b}.bias', None, 0.0) for a, b in names.items()]
  for a, b in (('mlp_gate', 'fc0'), ('mlp_in', 'fc1'), ('mlp_out', 'fc2')):
    table.append(row(f'{ours}/{a}/kernel', f'{theirs}.glu.{b}.weight', linear))
  table += layer_norm(f'{ours}/norm_2', f'{theirs}.glu.ln0')
  return [*table, *layer_norm(f'{ours}/norm_mlp', f'{theirs}.glu.ln1')]


def rows(depth: int) -> list[Row]:
  """Rows of the transformer, where the names of tensors begin with that of their file."""
  table = [row('image_head', 'decoder.lm_head.weight')]
  for kind, stack, file in (('text', 'encoder', 'encoder'), ('image', 'blocks', 'decoder')):
    table.append(row(f'{kind}_embed', f'{file}.embed_tokens.weight'))
    table.append(row(f'{kind}_positions', f'{file}.embed_positions.weight'))
    table += layer_norm(f'norm_{kind}_in', f'{file}.layernorm_embedding')
    table += layer_norm(f'norm_{kind}_out', f'{file}.final_ln')
    table += stacked(block(f'{stack}/blocks', f'{file}.layers.{{i}}', file == 'decoder'), depth)
  return table


def shape(path: Path, theirs: Mapping[str, Any], name: str, axes: int, expected: str = EXPECTED) -> tuple[int, ...]:
  """The shape of the tensor `name` of the file `path`. Raises ValueError if it is absent or has other axes."""
  if name not in theirs:
    raise ValueError(f'{path} has no tensor {name}; expected {expected}.')
  sizes = tuple(theirs[name].shape)
  if len(sizes) != axes or 0 in sizes:
    raise ValueError(f'{path}: {name} has the shape {list(sizes)}; expected {axes} axes, none of them empty.')
  return sizes


def plain_text() -> list[normalizers.Normalizer]:
  """Lower-case ASCII with single spaces."""
  replace = lambda pattern, text: normalizers.Replace(Regex(pattern), text)
  return [normalizers.Lowercase(), replace(r'[^\x00-\x7F]', ''), replace(' +', ' '), replace(r'\A | \z', '')]


def tokenizer(folder: Path, words: int, suffix: str = '') -> Tokenizer:
  """Reads the BPE, without the ids that an embedding of this many words lacks, such as that of <mask>.

  It lowercases, drops what is not ASCII and splits at spaces only; it recognises no special tokens in a text. min-dalle
  spells out emoji first, for which it needs another package; here they are dropped. Raises ValueError or OSError with a
  one-line message.
  """
  expected = 'the tokenizer of min-dalle, vocab.json and merges.txt'
  names = f'vocab{suffix}.json', f'merges{suffix}.txt'
  vocab_file, merges = (files.find(folder, name, expected=expected) for name in names)
  vocab, pairs = {w: i for w, i in files.vocabulary(vocab_file).items() if i < words}, files.merges(merges)
  if negative := [w for w, i in vocab.items() if i < 0]:
    raise ValueError(f'{vocab_file} has the id {vocab[negative[0]]} for {negative[0]!r}; expected 0 or more.')
  if missing := [w for w in (START, PADDING, END, UNKNOWN) if w not in vocab]:
    raise ValueError(f'{vocab_file} has no {missing[0]}; expected the vocabulary of a DALL-E mini.')
  try:
    bpe = Tokenizer(models.BPE(vocab, pairs, unk_token=UNKNOWN))
  except Exception as e:  # the library raises bare Exception for merges that the vocabulary lacks
    raise ValueError(
      f'{vocab_file} and {merges.name} do not belong together ({" ".join(str(e).split())[:200]}).'
    ) from e
  bpe.normalizer = normalizers.Sequence(plain_text())
  bpe.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme='always')
  bpe.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme='always')
  return bpe


def detokenizer(path: Path, side: int) -> Imported:
  """The run of a VQGAN without an encoder, for side x side codes. Raises ValueError with a one-line message."""
  theirs = files.state_dict(path)
  codes, code_dim = shape(path, theirs, 'embedding.weight', 2)
  z_channels = shape(path, theirs, 'decoder.conv_in.weight', 4)[1]
  levels = max(1, files.layers(theirs, r'decoder\.up\.(\d+)\.'))
  outputs = [f'decoder.up.{i}.block.0.conv1.weight' for i in range(levels)]
  channels = [shape(path, theirs, name, 4)[0] for name in outputs]
  for name, n in zip(outputs, channels, strict=True):
    if n % min(n, vqgan.VQGAN.norm_groups):
      raise ValueError(f'{path}: {name} gives {n} channels; expected a multiple of {vqgan.VQGAN.norm_groups}.')
  ch = math.gcd(*channels)
  size = side * 2 ** (levels - 1)
  model = dict(
    variant='f16_16384',
    image_size=size,
    ch=ch,
    ch_mult=tuple(n // ch for n in channels),
    num_res_blocks=files.layers(theirs, r'decoder\.up\.0\.block\.(\d+)\.') - 1,
    attn_resolutions=tuple(size // 2**i for i in range(levels) if f'decoder.up.{i}.attn.0.q.weight' in theirs),
    z_channels=z_channels,
    code_dim=code_dim,
    num_codes=codes,
    pixels='unit',
    decoder_only=True,
  )
  grid = jax.ShapeDtypeStruct((1, side, side), jnp.int32)
  ours = ModuleSpec.of(vqgan.build(**model), grid, method='decode_codes')
  table = [r for r in taming.rows(list(ours.shapes), gumbel=False) if r.ours != 'quantize/embedding']
  params = convert(str(path), [row('quantize/embedding', 'embedding.weight'), *table], theirs, ours.shapes)
  config = {'objective': 'vqgan', 'model': model, 'data': {'image_size': size}}
  return Imported(config, named('vqgan', params), named('vqgan', ours.axes))


def places(path: Path, version: str) -> tuple[Path, str, Path]:
  """The folder of the transformer, what its file names end with, and the folder of the detokenizer.

  Raises ValueError or OSError with a one-line message.
  """
  path = Path(os.path.abspath(path))  # '.' has no name
  if path.name.startswith('dalle_bart_'):
    path, version = path.parent, path.name.removeprefix('dalle_bart_')
  found = {}
  for name, suffix in SUFFIXES.items():
    if (path / f'dalle_bart_{name}').is_dir():
      found[name] = path / f'dalle_bart_{name}', '', path / 'vqgan'
    elif (path / f'encoder{suffix}.pt').is_file():
      found[name] = path, suffix, path
  if version:
    found = {name: place for name, place in found.items() if name == version}
  if not found:
    there = ', '.join(sorted(p.name for p in path.iterdir())[:12]) if path.is_dir() else ''
    wanted = f'a DALL-E {version or "mini or mega"}'
    raise FileNotFoundError(f'{path} does not have {wanted}; expected {EXPECTED}, found {there or "nothing"}.')
  if len(found) > 1:
    raise ValueError(f'{path} has {" and ".join(found)}; choose one with --version.')
  return next(iter(found.values()))


def head_count(folder: Path, width: int, heads: int) -> int:
  """The number of attention heads: `heads`, that of a sizes.json next to `folder`, or that published for this width."""
  sizes, field = folder.parent / 'sizes.json', 'attention_head_count'
  if not heads and sizes.is_file():
    heads = files.fields(sizes, files.config(sizes), field)[field]
    if type(heads) is not int or heads < 1:
      raise ValueError(f'{sizes}: {field} is {heads!r}; expected a whole number of 1 or more, or give --heads.')
  heads = heads or ATTENTION_HEADS.get(width, 0)
  if not heads:
    raise ValueError(f'nothing gives the number of attention heads for a width of {width}; give it with --heads.')
  if width % heads:
    raise ValueError(f'a width of {width} is not divisible by {heads} attention heads; give their number with --heads.')
  return heads


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of a DALL-E mini: rows of the embeddings of text and codes, text and image tokens, and widths."""

  words: int
  length: int
  codes: int
  side: int
  width: int
  mlp: int


def sizes(path: Path, theirs: Mapping[str, Any], expected: str = EXPECTED) -> Sizes:
  """The sizes of the transformer in `path`. Raises ValueError with a one-line message."""
  names = 'embed_tokens.weight', 'embed_positions.weight', 'layers.0.glu.fc0.weight'
  of = lambda stack: [shape(path, theirs, f'{stack}.{name}', 2, expected) for name in names]
  ((words, width), (length, _), (mlp, _)), ((codes, _), (positions, _), _) = of('encoder'), of('decoder')
  side = math.isqrt(positions)
  if side**2 != positions:
    raise ValueError(f'{path} has {positions} image positions; expected a square number.')
  return Sizes(words, length, codes, side, width, mlp)


def transformer(
  path: Path,
  theirs: Mapping[str, Any],
  known: Sizes,
  bpe: Tokenizer,
  *,
  heads: int,
  codes: int,
  start_token: int,
  image_size: int,
) -> Imported:
  """The run of the transformer in `path`, without its image tokenizer, which has this many `codes`.

  The names of the tensors begin with the stack, encoder or decoder. Raises ValueError with a one-line message.
  """
  words = bpe.get_vocab_size()
  model = dict(
    variant='mega' if known.width == 2048 else 'mini',
    d_model=known.width,
    depth=files.layers(theirs, r'encoder\.layers\.(\d+)\.'),
    heads=heads,
    mlp=known.mlp,
    text_spare=known.words - words,
    image_spare=known.codes - codes,
    start_token=start_token,
    image_vocab=codes,
    grid=(known.side, known.side),
  )
  special = {name: bpe.token_to_id(w) for name, w in (('pad', PADDING), ('start', START), ('end', END))}
  ids = dict(pad=special['pad'], bos=special['start'], eos=special['end'])
  module = dalle_mini.build(**model, **ids, text_vocab=words, text_length=known.length)
  ours = ModuleSpec.of(module, *(jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (known.length, known.side**2)))
  params = convert(str(path), rows(model['depth']), theirs, ours.shapes)
  text = {'vocab_size': words, 'length': known.length, **special}
  config = {'objective': 'dalle_mini', 'model': model, 'data': {'image_size': image_size}, 'tokenizer': text}
  return Imported(config, named('dalle', params), named('dalle', ours.axes), bpe.to_str())


def read(path: Path, *, version: str = '', heads: int = 0) -> Imported:
  """Reads transformer, tokenizer and detokenizer. Raises ValueError or OSError with a one-line message."""
  folder, suffix, of_images = places(path, version)
  theirs: dict[str, Any] = {}
  for name in ('encoder', 'decoder'):
    file = files.find(folder, f'{name}{suffix}.pt', expected=EXPECTED)
    theirs |= {f'{name}.{k}': v for k, v in files.state_dict(file).items()}
  known = sizes(folder, theirs)
  heads, bpe = head_count(folder, known.width, heads), tokenizer(folder, known.words, suffix)
  images = detokenizer(files.find(of_images, 'detoker.pt', expected=EXPECTED), known.side)
  codes = images.config['model']['num_codes']
  if known.codes < codes:
    raise ValueError(
      f'{folder} has embeddings of {known.codes} image tokens, the detokenizer {codes}; do the files belong together?'
    )
  size = images.config['data']['image_size']
  found = transformer(folder, theirs, known, bpe, heads=heads, codes=codes, start_token=codes - 1, image_size=size)
  return dataclasses.replace(found, frozen={'vqgan': images})
