"""RoBERTa in the format of the transformers library (Liu et al., 2019).

Files: config.json, model.safetensors or pytorch_model.bin, vocab.json and merges.txt, in one folder.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dalle_jax.convert import files
from dalle_jax.convert.engine import Imported, ModuleSpec, Row, convert, dense, named, norm, row, stacked
from dalle_jax.convert.sources.clip import ACTIVATIONS
from dalle_jax.models import roberta

EXPECTED = 'the folder of a RoBERTa from transformers with config.json, model.safetensors, vocab.json and merges.txt'
IGNORED = (r'lm_head\..*', r'.*position_ids', r'classifier\..*')
START, PADDING, END, UNKNOWN, MASK = '<s>', '<pad>', '</s>', '<unk>', '<mask>'


def rows(layers: int) -> list[Row]:
  one, ours = 'encoder.layer.{i}.', 'encoder/blocks/{block}/'
  block = [*norm(f'{ours}norm_1', f'{one}attention.output.LayerNorm'), *norm(f'{ours}norm_2', f'{one}output.LayerNorm')]
  for name in ('query', 'key', 'value'):
    block += dense(f'{ours}attention/{name}', f'{one}attention.self.{name}')
  block += dense(f'{ours}attention/out', f'{one}attention.output.dense')
  block += [*dense(f'{ours}mlp_in', f'{one}intermediate.dense'), *dense(f'{ours}mlp_out', f'{one}output.dense')]
  pooler = [
    row('pooler/kernel', 'pooler.dense.weight', lambda x: x.T, 0.0),
    row('pooler/bias', 'pooler.dense.bias', None, 0.0),
  ]
  return [
    row('embed/embedding', 'embeddings.word_embeddings.weight'),
    row('positions', 'embeddings.position_embeddings.weight'),
    row('type_embed', 'embeddings.token_type_embeddings.weight', lambda x: x[0]),
    *norm('norm_in', 'embeddings.LayerNorm'),
    *pooler,  # zero in models with another head, which have no pooler
    *stacked(block, layers),
  ]


def tokenizer(folder: Path) -> Tokenizer:
  """Reads the byte-level BPE, as in GPT-2. Raises ValueError or OSError with a one-line message."""
  vocab_file = files.find(folder, 'vocab.json', expected='the vocabulary of the tokenizer')
  merges = files.find(folder, 'merges.txt', expected='the merges of the tokenizer')
  vocab, pairs = files.vocabulary(vocab_file), files.merges(merges)
  if missing := [w for w in (START, PADDING, END) if w not in vocab]:
    raise ValueError(f'{vocab_file} has no {missing[0]}; expected the vocabulary of a RoBERTa.')
  try:
    bpe = Tokenizer(models.BPE(vocab, pairs, unk_token=UNKNOWN if UNKNOWN in vocab else None))
  except Exception as e:  # the library raises bare Exception for merges that the vocabulary lacks
    raise ValueError(
      f'{vocab_file} and {merges.name} do not belong together ({" ".join(str(e).split())[:200]}).'
    ) from e
  bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = decoders.ByteLevel()
  bpe.add_special_tokens([w for w in (START, PADDING, END, UNKNOWN) if w in vocab])
  if MASK in vocab:
    bpe.add_special_tokens([AddedToken(MASK, lstrip=True)])
  return bpe


def read(path: Path) -> Imported:
  """Reads a RoBERTa and its tokenizer. Raises ValueError or OSError with a one-line message."""
  file = files.find(Path(path).expanduser(), 'config.json', expected=EXPECTED)
  folder, config = file.parent, files.config(file)
  weights = files.find(folder, 'model.safetensors', 'pytorch_model.bin', expected=EXPECTED)
  if config.get('model_type') != 'roberta':
    raise ValueError(f"{file} has model_type {config.get('model_type')!r}; expected 'roberta'.")
  sizes = ('hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads', 'vocab_size')
  known = files.fields(file, config, *sizes, 'max_position_embeddings')
  activation, pad = config.get('hidden_act', 'gelu'), config.get('pad_token_id', 1)
  if activation not in ACTIVATIONS:
    raise ValueError(f'{file} has hidden_act {activation!r}; expected one of {", ".join(ACTIVATIONS)}.')
  length = known['max_position_embeddings'] - pad - 1
  model = dict(
    variant='base',
    vocab_size=known['vocab_size'],
    length=length,
    width=known['hidden_size'],
    layers=known['num_hidden_layers'],
    heads=known['num_attention_heads'],
    mlp=known['intermediate_size'],
    pad=pad,
    activation=ACTIVATIONS[activation],
    eps=float(config.get('layer_norm_eps', 1e-12)),
  )
  ours = ModuleSpec.of(roberta.build(**model), jax.ShapeDtypeStruct((1, length), jnp.int32))
  theirs = files.state_dict(weights)
  theirs = {k.removeprefix('roberta.'): v for k, v in theirs.items()}
  params = convert(str(weights), rows(model['layers']), theirs, ours.shapes, IGNORED)
  bpe = tokenizer(folder)
  special = {name: bpe.token_to_id(w) for name, w in (('start', START), ('end', END), ('pad', PADDING))}
  settings = {
    'objective': 'roberta',
    'model': model,
    'tokenizer': {'vocab_size': known['vocab_size'], 'length': length, **special},
  }
  return Imported(settings, named('roberta', params), named('roberta', ours.axes), bpe.to_str())
