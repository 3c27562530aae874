"""minDALL-E (Kakao Brain, 2021): a VQGAN, a transformer over 64 + 256 tokens and a tokenizer.

Files: the folder of the release with config.yaml, stage1_last.ckpt, stage2_last.ckpt and tokenizer/.
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
  """A transformer block; the models may be without biases."""
  rows = [*norm(f'{ours}/norm_1', f'{theirs}.ln1'), *norm(f'{ours}/norm_2', f'{theirs}.ln2')]
  names = {'attention/query': 'attn.query', 'attention/key': 'attn.key', 'attention/value': 'attn.value'}
  names |= {'attention/out': 'attn.proj', 'mlp_in': 'mlp.0', 'mlp_out': 'mlp.2'}
  for our, their in names.items():
    rows += dense(f'{ours}/{our}', f'{theirs}.{their}', missing=0.0)
  return rows


def rows(depth: int, period: int) -> list[Row]:
  """Of the transformer."""
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
  """Fields of our DALLE, and the numbers of image tokens and text tokens."""
  known = files.fields(path, stage2, *(f'hparams.{k}' for k in ('embed_dim', 'n_layers', 'n_heads')))
  lengths = files.fields(path, stage2, 'hparams.ctx_len_img', 'hparams.ctx_len_txt')
  if math.isqrt(lengths['ctx_len_img']) ** 2 != lengths['ctx_len_img']:
    raise ValueError(f'{path}: {lengths["ctx_len_img"]} image tokens make no square.')
  model = dict(
    variant='mindalle',
    d_model=known['embed_dim'],
    depth=known['n_layers'],
    heads=known['n_heads'],
    activation='quick_gelu' if stage2['hparams'].get('gelu_use_approx') else 'gelu',
    # Blocks 3, 6, ... may look at a source: the same tree with and without that.
    period=3 if known['n_layers'] % 3 == 0 else 1,
  )
  return model, lengths


def network(model: Mapping[str, Any], words: int, pad: int, codes: int, lengths: Mapping[str, int]) -> ModuleSpec:
  side, text = math.isqrt(lengths['ctx_len_img']), lengths['ctx_len_txt']
  module = dalle.build(**model, text_vocab=words, text_length=text, image_vocab=codes, grid=(side, side), pad=pad)
  return ModuleSpec.of(module, *(jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (text, side * side)))


def tokenizer(folder: Path, new: tuple[str, ...] = ()) -> CharBPETokenizer:
  """The tokenizer of a folder, with `new` words at its end. Raises ValueError and OSError of one line."""
  expected = 'the vocabulary and merges of the tokenizer'
  words = files.find(folder, 'bpe-16k-vocab.json', '*vocab.json', expected=expected)
  merges = files.find(folder, 'bpe-16k-merges.txt', '*merges.txt', expected=expected)
  vocab, pairs = files.vocabulary(words), files.merges(merges)
  if UNKNOWN not in vocab:
    raise ValueError(f'{words} has no {UNKNOWN}; expected the vocabulary of minDALL-E.')
  try:
    made = CharBPETokenizer(vocab, pairs, unk_token=UNKNOWN, lowercase=True)
  except Exception as e:  # the library raises bare Exception for merges that the vocabulary lacks
    raise ValueError(f'{words} and {merges.name} do not belong together ({" ".join(str(e).split())[:200]}).') from e
  made.add_special_tokens([PADDING])
  made.add_tokens(list(new))
  return made


def read(path: Path, **options: Any) -> Imported:
  """Both stages and the tokenizer. Raises ValueError and OSError of one line."""
  folder = Path(path).expanduser()
  description = files.find(folder, 'config.yaml', expected=EXPECTED)
  folder, config = description.parent, files.config(description)
  first, second = (files.find(folder, f'stage{i}_last.ckpt', f'stage{i}*', expected=EXPECTED) for i in (1, 2))
  stage1 = files.fields(description, config, 'stage1.embed_dim', 'stage1.n_embed', 'stage1.hparams')
  words = tokenizer(folder / 'tokenizer')
  known = files.fields(description, config, 'stage2', 'stage2.vocab_size_txt', 'stage2.vocab_size_img')
  if words.get_vocab_size() != known['vocab_size_txt']:
    raise ValueError(
      f'{folder}/tokenizer has {words.get_vocab_size()} words, config.yaml says {known["vocab_size_txt"]}; expected '
      'the tokenizer of this model.'
    )
  model, lengths = model_fields(description, known['stage2'])
  sizes = taming.fields(description, stage1['hparams'], stage1['embed_dim'], stage1['n_embed'])
  vqgan = taming.tokenizer(str(first), sizes, files.state_dict(first))
  pad = words.token_to_id(PADDING)
  ours = network(model, known['vocab_size_txt'], pad, known['vocab_size_img'], lengths)
  params = convert(str(second), rows(model['depth'], model['period']), files.state_dict(second), ours.shapes)
  return Imported(
    {
      'objective': 'dalle',
      'model': model,
      'data': {'image_size': sizes['image_size']},
      'tokenizer': {'vocab_size': words.get_vocab_size(), 'length': lengths['ctx_len_txt'], 'pad': pad},
    },
    named('dalle', params),
    named('dalle', ours.axes),
    words.to_str(),
    {'vqgan': vqgan},
  )
