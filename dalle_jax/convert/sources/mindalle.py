"""minDALL-E (Kakao Brain, 2021): a VQGAN, a transformer over 64 text and 256 image tokens, and a tokenizer.

Files: the folder of the release, with config.yaml, stage1_last.ckpt, stage2_last.ckpt and tokenizer/.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tokenizers import CharBPETokenizer

from dalle_jax.convert import files
from dalle_jax.convert.engine import Imported, ModuleSpec, Row, convert, dense, named, norm, row, stacked
from dalle_jax.convert.sources import taming
from dalle_jax.models import dalle

EXPECTED = 'the folder of minDALL-E with config.yaml, stage1_last.ckpt, stage2_last.ckpt and tokenizer/'
UNKNOWN, PADDING = '[UNK]', '[PAD]'


def block(ours: str, theirs: str) -> list[Row]:
  """Rows of a transformer block; biases that the model lacks are zero."""
  rows = [*norm(f'{ours}/norm_1', f'{theirs}.ln1'), *norm(f'{ours}/norm_2', f'{theirs}.ln2')]
  names = {'attention/query': 'attn.query', 'attention/key': 'attn.key', 'attention/value': 'attn.value'}
  names |= {'attention/out': 'attn.proj', 'mlp_in': 'mlp.0', 'mlp_out': 'mlp.2'}
  for our, their in names.items():
    rows += dense(f'{ours}/{our}', f'{theirs}.{their}', missing=0.0)
  return rows


def rows(depth: int, period: int) -> list[Row]:
  """Rows of the transformer."""
  tables = {
    'text_embed': 'tok_emb_txt', 'image_embed': 'tok_emb_img', 'text_positions': 'pos_emb_txt',
    'image_position': 'pos_emb_img', 'text_head': 'head_txt', 'image_head': 'head_img',
  }  # fmt: skip
  return [
    *(row(ours, f'{theirs}.weight') for ours, theirs in tables.items()),
    *norm('norm_out', 'ln_f'),
    *stacked(block('blocks/blocks/{block}', 'blocks.{i}'), depth, period),
  ]


def model_fields(path: Path, stage2: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
  """The fields of our DALLE except `image_vocab`, and the numbers of image and text tokens."""
  known = files.fields(path, stage2, *(f'hparams.{k}' for k in ('embed_dim', 'n_layers', 'n_heads')))
  lengths = files.fields(path, stage2, 'hparams.ctx_len_img', 'hparams.ctx_len_txt')
  side = math.isqrt(lengths['ctx_len_img'])
  if side**2 != lengths['ctx_len_img']:
    raise ValueError(f'{path} has ctx_len_img {lengths["ctx_len_img"]}; expected a square number.')
  model = dict(
    variant='mindalle',
    d_model=known['embed_dim'],
    depth=known['n_layers'],
    heads=known['n_heads'],
    activation='quick_gelu' if stage2['hparams'].get('gelu_use_approx') else 'gelu',
    # StoryDALL-E adds cross-attention to blocks 3, 6, ...; the tree is the same with and without it.
    period=3 if known['n_layers'] % 3 == 0 else 1,
    grid=(side, side),
  )
  return model, lengths


def network(model: Mapping[str, Any], vocab_size: int, pad: int, text_length: int) -> ModuleSpec:
  module = dalle.build(**model, text_vocab=vocab_size, text_length=text_length, pad=pad)
  return ModuleSpec.of(module, *(jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (text_length, module.image_length)))


def tokenizer(folder: Path, new: tuple[str, ...] = ()) -> CharBPETokenizer:
  """Reads the tokenizer of a folder and adds the tokens `new`. Raises ValueError or OSError with a one-line message."""
  expected = 'the vocabulary and merges of the tokenizer'
  vocab_file = files.find(folder, 'bpe-16k-vocab.json', '*vocab.json', expected=expected)
  merges = files.find(folder, 'bpe-16k-merges.txt', '*merges.txt', expected=expected)
  vocab, pairs = files.vocabulary(vocab_file), files.merges(merges)
  if UNKNOWN not in vocab:
    raise ValueError(f'{vocab_file} has no {UNKNOWN}; expected the vocabulary of minDALL-E.')
  try:
    bpe = CharBPETokenizer(vocab, pairs, unk_token=UNKNOWN, lowercase=True)
  except Exception as e:  # the library raises bare Exception for merges that the vocabulary lacks
    raise ValueError(
      f'{vocab_file} and {merges.name} do not belong together ({" ".join(str(e).split())[:200]}).'
    ) from e
  bpe.add_special_tokens([PADDING])
  bpe.add_tokens(list(new))
  return bpe


def read(path: Path) -> Imported:
  """Reads both stages and the tokenizer. Raises ValueError or OSError with a one-line message."""
  folder = Path(path).expanduser()
  description = files.find(folder, 'config.yaml', expected=EXPECTED)
  folder, config = description.parent, files.config(description)
  first, second = (files.find(folder, f'stage{i}_last.ckpt', f'stage{i}*', expected=EXPECTED) for i in (1, 2))
  stage1 = files.fields(description, config, 'stage1.embed_dim', 'stage1.n_embed', 'stage1.hparams')
  bpe = tokenizer(folder / 'tokenizer')
  known = files.fields(description, config, 'stage2', 'stage2.vocab_size_txt', 'stage2.vocab_size_img')
  if bpe.get_vocab_size() != known['vocab_size_txt']:
    raise ValueError(
      f'{folder}/tokenizer has {bpe.get_vocab_size()} tokens, config.yaml {known["vocab_size_txt"]}; expected the '
      'tokenizer of this model.'
    )
  model, lengths = model_fields(description, known['stage2'])
  sizes = taming.fields(description, stage1['hparams'], stage1['embed_dim'], stage1['n_embed'])
  vqgan = taming.tokenizer(str(first), sizes, files.state_dict(first))
  pad = bpe.token_to_id(PADDING)
  model['image_vocab'] = known['vocab_size_img']
  ours = network(model, known['vocab_size_txt'], pad, lengths['ctx_len_txt'])
  params = convert(str(second), rows(model['depth'], model['period']), files.state_dict(second), ours.shapes)
  return Imported(
    {
      'objective': 'dalle',
      'model': model,
      'data': {'image_size': sizes['image_size']},
      'tokenizer': {'vocab_size': bpe.get_vocab_size(), 'length': lengths['ctx_len_txt'], 'pad': pad},
    },
    named('dalle', params),
    named('dalle', ours.axes),
    bpe.to_str(),
    {'vqgan': vqgan},
  )
