"""DALL-E mini and mega in the layout of dalle-mini itself (Dayma et al., 2021, borisdayma/dalle-mini).

Files: flax_model.msgpack, config.json and tokenizer.json, in one folder. The VQGAN is published separately: convert it
with --from vqgan_jax and give its run with --vqgan.

Only what the published models consist of is read: LayerNorms as in NormFormer, gated MLPs, no biases. Layers may be
stacked (use_scan) or not.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, normalizers

from dalle_jax.convert import files
from dalle_jax.convert.engine import Imported
from dalle_jax.convert.sources import min_dalle

EXPECTED = 'flax_model.msgpack, config.json and tokenizer.json of a DALL-E mini'
CODES = 16_384  # of the published VQGAN; embeddings may have more rows, none of which are codes
READ = {  # the only value of a field of config.json that can be read
  'ln_type': 'layernorm', 'ln_positions': 'normformer', 'use_final_ln_encoder': True, 'use_final_ln_decoder': True,
  'activation_function': 'gelu', 'use_glu': True, 'use_bias': False, 'use_cosine_attention': False,
  'use_head_scale': False, 'head_scale': False, 'use_alibi': False, 'use_deepnet_scaling': False,
  'use_swin_position_embeddings': False, 'use_absolute_position_embeddings': True, 'scale_embedding': False,
  'tie_word_embeddings': False, 'sinkhorn_iters': 1,
}  # fmt: skip
SAME = ('layers', 'attention_heads', 'ffn_dim')  # of encoder and decoder
LAYER = {  # modules of a layer; names of min-dalle
  'LayerNorm_0': 'pre_self_attn_layer_norm',
  'FlaxBartAttention_0': 'self_attn',
  'LayerNorm_1': 'self_attn_layer_norm',
  'LayerNorm_2': 'pre_encoder_attn_layer_norm',
  'FlaxBartAttention_1': 'encoder_attn',
  'LayerNorm_3': 'encoder_attn_layer_norm',
  'GLU_0': 'glu',
}
GLU = {'LayerNorm_0': 'ln0', 'Dense_0': 'fc0', 'Dense_1': 'fc1', 'LayerNorm_1': 'ln1', 'Dense_2': 'fc2'}
SPELLED = {  # patterns in captions, and what they become
  r'<[^<]+?>': '',
  r'\s+': ' ',
  '[\u2010-\u2013]': '-',
  '[\u2014\u2015]': '--',
  '[\u2018\u2019]': "'",
  '[\u201c\u201d]': '"',
  '\u00df': 'ss',
  '[\u00d8\u00f8]': 'o',
  '[\u00c6\u00e6]': 'ae',
  '[\u0141\u0142]': 'l',
}
FINAL = {'encoder': 'LayerNorm_2', 'decoder': 'LayerNorm_4'}  # the last norm, in the last layer where none are stacked


def renamed(path: Path, theirs: Mapping[str, np.ndarray], depth: int) -> dict[str, np.ndarray]:
  """The tensors of `path` as min-dalle names and orients them. Names that are unknown stay as they are.

  Raises ValueError if two of them would have the same name, or if a stack does not have `depth` layers.
  """
  found: dict[str, np.ndarray] = {}
  put = lambda x, *names: files.add(path, found, '.'.join(names), x)
  for name, x in theirs.items():
    *parts, leaf = name.removeprefix('model.').split('.')
    leaf = files.FLAX_LEAVES.get(leaf, leaf)
    x = x.swapaxes(-1, -2) if name.endswith('.kernel') and x.ndim > 1 else x
    of_layer = len(parts) > 3 and parts[1] == 'layers'
    layer = re.fullmatch(r'\w*FlaxBart(?:En|De)coderLayer(?:s|_(\d+))', parts[2]) if of_layer else None
    if parts == ['lm_head']:
      put(x, 'decoder', *parts, leaf)
    elif layer is None:
      put(x, *parts, leaf)
    elif layer[1] == str(depth - 1) and parts[3:] == [FINAL.get(parts[0])]:
      put(x, parts[0], 'final_ln', leaf)
    else:
      if not layer[1] and x.shape[:1] != (depth,):
        raise ValueError(f'{path}: {name} has the shape {list(x.shape)}; expected {depth} layers.')
      stack, module, *inner = parts[0], *parts[3:]
      inner = [GLU.get(part, part) for part in inner] if module == 'GLU_0' else inner
      for i, own in [(layer[1], x)] if layer[1] else enumerate(x):
        put(own, stack, 'layers', str(i), LAYER.get(module, module), *inner, leaf)
  return found


def tokenizer(folder: Path, words: int, normalize: bool) -> Tokenizer:
  """Reads the BPE, without the ids that an embedding of this many words lacks, such as that of <mask>.

  It recognises no special tokens in a text. With `normalize`, captions become lower-case ASCII and begin with a space;
  dalle-mini does more to them, such as to punctuation. Raises ValueError or OSError with a one-line message.
  """
  path, settings = files.find(folder, 'tokenizer.json', expected=EXPECTED), folder / 'tokenizer_config.json'
  files.tokenizer(path)  # refuses what is no tokenizer
  value = files.config(path)
  vocab = value['model'].get('vocab')
  if not isinstance(vocab, dict):
    raise ValueError(f'{path} is no BPE; expected the tokenizer of a DALL-E mini.')
  vocab = vocab | {token['content']: token['id'] for token in value.get('added_tokens') or ()}
  value['model']['vocab'] = {word: i for word, i in vocab.items() if i < words}
  value |= {'added_tokens': [], 'post_processor': None}
  pieces = value.get('pre_tokenizer') or {}
  if 'add_prefix_space' in pieces:  # transformers goes by the other file
    written = settings.is_file() and files.config(settings).get('add_prefix_space')
    pieces['add_prefix_space'] = normalize or bool(written)
  bpe = files.tokenizer(path, json.dumps(value))
  if missing := [w for w in (min_dalle.START, min_dalle.PADDING, min_dalle.END) if bpe.token_to_id(w) is None]:
    raise ValueError(f'{path} has no {missing[0]}; expected the tokenizer of a DALL-E mini.')
  if normalize:
    spelled = [normalizers.Replace(Regex(pattern), text) for pattern, text in SPELLED.items()]
    accents = [normalizers.NFKD(), normalizers.StripAccents()]
    bpe.normalizer = normalizers.Sequence([*spelled, *accents, *min_dalle.plain_text()])
  return bpe


def read(path: Path) -> Imported:
  """Reads transformer and tokenizer. Raises ValueError or OSError with a one-line message."""
  weights = files.find(path, 'flax_model.msgpack', expected=EXPECTED)
  description = files.find(weights.parent, 'config.json', expected=EXPECTED)
  config = files.config(description)
  for name, value in READ.items():
    if config.get(name, value) not in (value, None):
      raise ValueError(f'{description} has {name} {config[name]!r}; only models with {value!r} can be read.')
  pairs = {name: [f'{stack}_{name}' for stack in ('encoder', 'decoder')] for name in SAME}
  numbers = files.integers(description, config, *(name for pair in pairs.values() for name in pair))
  for one, two in pairs.values():
    if numbers[one] != numbers[two]:
      raise ValueError(f'{description} has {one} {numbers[one]} and {two} {numbers[two]}; expected the same number.')
  normalize = config.get('normalize_text') or False
  if not isinstance(normalize, bool):
    raise ValueError(f'{description} has normalize_text {normalize!r}; expected true or false.')
  theirs = renamed(weights, files.msgpack(weights), numbers['encoder_layers'])
  known = min_dalle.sizes(weights, theirs, EXPECTED)
  heads = numbers['encoder_attention_heads']
  if not heads or known.width % heads:
    raise ValueError(f'{description} has {heads} attention heads, which do not divide a width of {known.width}.')
  defaults = {'decoder_start_token_id': known.codes - 1}
  start = files.integers(description, defaults | config, 'decoder_start_token_id')['decoder_start_token_id']
  return min_dalle.transformer(
    weights,
    theirs,
    known,
    tokenizer(weights.parent, known.words, normalize),
    heads=heads,
    codes=min(known.codes - 1, CODES),
    start_token=start,
    image_size=16 * known.side,
  )
