"""DALLE-pytorch (Phil Wang, 2021-22, version 1.6): what train_dalle.py and train_vae.py save.

Files: dalle.pt, with the hyperparameters, the weights and, if the image tokenizer is a DiscreteVAE, its sizes; or
vae.pt, the DiscreteVAE alone. Other image tokenizers (OpenAI's dVAE, a VQGAN) are inside of dalle.pt without their
config: convert them separately and give the run with --vqgan. The tokenizer of captions is in no checkpoint: give it
with --tokenizer.

Layers that share parameters (shared_attn_ids, shared_ff_ids) get a copy each. LayerScale is multiplied into the layer
before it.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from dalle_jax.convert import files, torch_file
from dalle_jax.convert.engine import (
  Imported,
  ModuleSpec,
  Op,
  Row,
  conv2d,
  convert,
  dense,
  linear,
  named,
  norm,
  part,
  row,
  same,
  stacked,
)  # fmt: skip
from dalle_jax.convert.sources import clip, rudalle
from dalle_jax.models import dalle, discrete_vae

EXPECTED = 'a checkpoint of DALLE-pytorch (dalle.pt or vae.pt)'
KINDS = {'full': 'full', 'axial_row': 'own_row', 'axial_col': 'column', 'conv_like': 'causal_conv'}
PRETRAINED_SIZE = 256  # image size of the pretrained tokenizers, OpenAI's dVAE and VQGANs
NORMALIZATION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # mean and standard deviation of pixels in [0, 1]
IGNORED = ('logits_mask', r'transformer\.pos_emb', r'(text|image)_emb\.linear\..*')
ANGLE = 1e-3  # accepted difference of rotary angles in radians; image tokens have large ones, rounded to float32


def scaled(op: Op = same) -> Op:
  """Applies `op`, then multiplies the last axis by the scale of LayerScale."""
  return lambda x, scale: op(x) * scale.ravel()


def conv_transposed(x: np.ndarray) -> np.ndarray:
  """[in, out, h, w] of a transposed convolution -> [h, w, in, out] of one over the dilated input."""
  return x.transpose(2, 3, 0, 1)[::-1, ::-1]


def block(sandwich: bool) -> list[Row]:
  """Rows of a transformer block, by the names that `plain` gives their tensors."""
  ours, rows = 'blocks/blocks/{block}/', []
  for i, name in enumerate(('query', 'key', 'value')):
    rows.append(row(f'{ours}attention/{name}/kernel', 'layers.{i}.0.to_qkv.weight', part(i, 3, linear)))
    rows.append(row(f'{ours}attention/{name}/bias', 'layers.{i}.0.to_qkv.bias', part(i, 3), missing=0.0))
  for i, name in enumerate(('mlp_in', 'mlp_gate')):
    rows.append(row(f'{ours}{name}/kernel', 'layers.{i}.1.net.0.weight', part(i, 2, linear)))
    rows.append(row(f'{ours}{name}/bias', 'layers.{i}.1.net.0.bias', part(i, 2)))
  for site, theirs, out in ((0, 'to_out.0', 'attention/out'), (1, 'net.3', 'mlp_out')):
    layer, norm_name = f'layers.{{i}}.{site}', f'{ours}norm_{site + 1}'
    rows += norm(norm_name, f'{layer}.norm')
    if sandwich:
      rows += dense(f'{ours}{out}', f'{layer}.{theirs}')
      last = ((f'{norm_name}_after/scale', 'norm_out.weight', same), (f'{norm_name}_after/bias', 'norm_out.bias', same))
    else:
      last = ((f'{ours}{out}/kernel', f'{theirs}.weight', linear), (f'{ours}{out}/bias', f'{theirs}.bias', same))
    rows += [row(name, [f'{layer}.{their}', f'{layer}.scale'], scaled(op)) for name, their, op in last]
  return rows


def rows(model: Mapping[str, Any], text_vocab: int) -> list[Row]:
  """Rows of the transformer; the first `text_vocab` ids of the joint head are those of text."""
  table = [
    *norm('norm_out', 'to_logits.0'),
    *stacked(block(model['norms'] == 'sandwich'), model['depth'], model['period']),
  ]
  tied = model['head'] == 'tied_bias'
  words = 'to_logits.1.weight' if tied else 'text_emb.weight'
  table.append(row('start', words, lambda x: x[0]))  # the padding id 0, which comes before every caption
  if not tied:
    table += [row('text_embed', words), row('image_embed', 'image_emb.weight')]
  for leaf, their in (('embed' if tied else 'head', 'weight'), ('bias', 'bias')):
    table.append(row(f'text_{leaf}', f'to_logits.1.{their}', lambda x: x[:text_vocab]))
    table.append(row(f'image_{leaf}', f'to_logits.1.{their}', lambda x: x[text_vocab:]))
  if model['image_positions'] == 'axial':
    table.append(row('text_positions', 'text_pos_emb.weight'))
    table += [row(f'{name}_positions', f'image_pos_emb.weights_{i}') for i, name in enumerate(('row', 'column'))]
  return table


def plain(theirs: Mapping[str, Any]) -> dict[str, Any]:
  """Their tensors, with names of layers that do not depend on what the layers are wrapped in.

  layers.3.0.norm.weight is that of the attention of layer 3, layers.3.1 its MLP.
  """

  def name(key: str) -> str:
    key = key.replace('image_pos_emb.weights.', 'image_pos_emb.weights_')  # by the version of a library
    key = re.sub(
      r'^transformer\.layers\.blocks\.(\d+)\.([fg])\.net\.', lambda m: f'layers.{m[1]}.{"fg".index(m[2])}.', key
    )
    key = re.sub(r'^transformer\.layers\.layers\.', 'layers.', key)
    return re.sub(r'(?<=\.)(fn\.)+', '', key) if key.startswith('layers.') else key

  return {name(key): tensor for key, tensor in theirs.items()}


def image_tokenizer(source: Path, sizes: Mapping[str, Any], theirs: Mapping[str, Any]) -> Imported:
  """The DiscreteVAE of a vae.pt, or of a dalle.pt, where its names begin with 'vae.'."""
  if not isinstance(sizes, Mapping):
    raise ValueError(f'{source} has no sizes of a DiscreteVAE; expected {EXPECTED}.')
  default = dict(image_size=256, num_tokens=512, codebook_dim=512, num_layers=3, num_resnet_blocks=0, hidden_dim=64)
  known = files.integers(source, {**default, **sizes}, *default)
  if sizes.get('channels', 3) != 3 or sizes.get('normalization', NORMALIZATION) != NORMALIZATION:
    raise ValueError(f'{source} has a DiscreteVAE with other channels or another normalization; expected the default.')
  levels, blocks, size = known['num_layers'], known['num_resnet_blocks'], known['image_size']
  if not 1 <= levels <= 10 or size % 2**levels or not size:
    raise ValueError(f'{source} has image_size {size} and num_layers {levels}; expected a multiple of 2^num_layers.')
  model = dict(
    variant='dalle_pytorch',
    width=known['hidden_dim'],
    levels=levels,
    blocks=blocks,
    code_dim=known['codebook_dim'],
    num_codes=known['num_tokens'],
  )
  first = 1 if blocks else 0  # of the decoder's residual blocks
  table = [row('codebook', 'codebook.weight'), *conv2d('encoder_out', f'encoder.{levels + blocks}')]
  table += conv2d('decoder_in', 'decoder.0') if blocks else []
  table += conv2d('decoder_out', f'decoder.{first + blocks + levels}')
  for i in range(levels):
    table += conv2d(f'down_{i}', f'encoder.{i}.0')
    their = f'decoder.{first + blocks + i}.0'
    table += [row(f'up_{i}/kernel', f'{their}.weight', conv_transposed), row(f'up_{i}/bias', f'{their}.bias')]
  for i in range(blocks):
    for j in range(3):
      table += conv2d(f'encoder_blocks_{i}/conv_{j}', f'encoder.{levels + i}.net.{2 * j}')
      table += conv2d(f'decoder_blocks_{i}/conv_{j}', f'decoder.{first + i}.net.{2 * j}')
  module = discrete_vae.build(**model)
  ours = ModuleSpec.of(module, (1, 2**levels, 2**levels, 3))
  params = convert(str(source), table, theirs, ours.shapes)
  config = {'objective': 'discrete_vae', 'model': model, 'data': {'image_size': size}}
  return Imported(config, named('discrete_vae', params), named('discrete_vae', ours.axes))


def captions(path: str, words: int) -> Tokenizer:
  """The tokenizer of `words` ids in `path`. Raises ValueError or OSError with a one-line message.

  It is a JSON file of Hugging Face's tokenizers, a model of YouTokenToMe, or a folder with the vocabulary of CLIP
  (vocab.json and merges.txt), which DALLE-pytorch takes by default.
  """
  file = Path(path).expanduser()
  if file.is_dir():
    bpe = clip.tokenizer(file)
  elif not file.is_file():
    raise FileNotFoundError(f'--tokenizer {file} does not exist; expected a JSON file, a .model, or a folder.')
  elif file.suffix == '.json':
    bpe = files.tokenizer(file)
  else:
    bpe = rudalle.youtokentome(file, lowercase=False)
  if bpe.get_vocab_size() != words:
    raise ValueError(f'{file} has {bpe.get_vocab_size()} tokens, the model {words}; expected its own tokenizer.')
  return bpe


def network(source: Path, hparams: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[dict[str, Any], ModuleSpec]:
  """The fields of our DALLE, and the network with its parameters' shapes."""
  options = {'heads': 8, 'dim_head': 64, **hparams}
  c = files.integers(source, options, 'num_text_tokens', 'text_seq_len', 'dim', 'depth', 'heads', 'dim_head')
  c |= files.fields(source, options, 'shift_tokens')
  types = hparams.get('attn_types') or ('full',)
  types = (types,) if isinstance(types, str) else types
  if unknown := [t for t in types if str(t) not in KINDS] if isinstance(types, (tuple, list)) else [types]:
    raise ValueError(f'{source} has attention of type {unknown[0]!r}; expected {", ".join(KINDS)}.')
  positions = 'axial' if 'text_pos_emb.weight' in theirs else 'rotary'
  needed = ['to_logits.1.weight', *(['transformer.pos_emb'] if positions == 'rotary' else ['image_pos_emb.weights_0'])]
  if missing := [name for name in needed if name not in theirs]:
    raise ValueError(f'{source} has no {missing[0]}; expected {EXPECTED}.')
  model = dict(
    variant='dalle_pytorch',
    d_model=c['dim'],
    depth=c['depth'],
    heads=c['heads'],
    head_dim=c['dim_head'],
    period=3 if c['depth'] % 3 == 0 else 1,  # StoryDALL-E adds cross-attention to every third block
    attention=','.join(KINDS[t] for t in types),
    image_positions=positions,
    shift_tokens=c['shift_tokens'],
    reversible=hparams.get('reversible', False),
    norms='sandwich' if hparams.get('sandwich_norm') else 'pre',
    divide_max=hparams.get('stable', False),
    head='tied_bias' if hparams.get('share_input_output_emb') else 'bias',
  )
  text, vocab = c['text_seq_len'], c['num_text_tokens'] + c['text_seq_len']
  for name, axes in zip(needed, (2, 3 if positions == 'rotary' else 4), strict=True):
    if len(theirs[name].shape) != axes:
      raise ValueError(f'{source} has {name} of shape {list(theirs[name].shape)}; expected {axes} axes.')
  at, ids = theirs[needed[1]], theirs[needed[0]].shape[0]
  tokens = max(0, at.shape[1] - text - 1) if positions == 'rotary' else at.shape[1] ** 2
  side, codes = math.isqrt(tokens), ids - vocab
  if codes < 1 or not side:
    raise ValueError(
      f'{source} has {codes} image codes and {tokens} image tokens by its hparams; do they belong to it?'
    )
  model |= dict(image_vocab=codes, grid=(side, side))
  module = dalle.build(**model, text_vocab=vocab, text_length=text)
  if positions == 'rotary':
    expected, found = module.rotary_angles(), np.asarray(theirs['transformer.pos_emb'].numpy())[0]
    if found.shape != expected.shape or np.abs(found - expected).max() > ANGLE:
      raise ValueError(f'{source} has other rotary positions (transformer.pos_emb) than DALLE-pytorch 1.6 makes.')
  return model, ModuleSpec.of(module, *(jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (text, module.image_length)))


def read(path: Path, *, tokenizer: str = '') -> Imported:
  """Reads a dalle.pt or vae.pt. Raises ValueError or OSError with a one-line message."""
  file = files.find(path, 'dalle.pt', 'vae.pt', expected=EXPECTED)
  whole = torch_file.load(file)
  if not isinstance(whole, Mapping) or not all(isinstance(whole.get(k), Mapping) for k in ('weights', 'hparams')):
    raise ValueError(f'{file} has no hparams and weights; expected {EXPECTED}, of DeepSpeed a consolidated one.')
  theirs, hparams = torch_file.flat(whole['weights']), whole['hparams']
  if 'vae_params' not in whole:
    if tokenizer:
      raise ValueError(f'{file} is an image tokenizer, which has no captions; leave out --tokenizer.')
    return image_tokenizer(file, hparams, theirs)
  inner, theirs = files.under(theirs, 'vae.'), plain({k: v for k, v in theirs.items() if not k.startswith('vae.')})
  model, ours = network(file, hparams, theirs)
  words, text = hparams['num_text_tokens'], hparams['text_seq_len']
  notes, frozen, size = [], {}, PRETRAINED_SIZE
  version = str(whole.get('version') or '1.6')[:20]
  if not version.startswith('1.6'):
    if KINDS['conv_like'] in model['attention'].split(','):  # the window of older ones is centred
      raise ValueError(f'{file} is of version {version!r} and has conv_like attention; expected version 1.6 for that.')
    notes.append(f'it is of version {version!r} of DALLE-pytorch; only 1.6 was compared with the original')
  params = convert(str(file), rows(model, ours.module.text_vocab), theirs, ours.shapes, IGNORED)
  if whole['vae_params']:
    frozen['vqgan'] = image_tokenizer(file, whole['vae_params'], inner)
    size = frozen['vqgan'].config['data']['image_size']
  else:
    name = whole.get('vae_class_name', 'a pretrained one')
    notes.append(f'its image tokenizer is {name}: convert that separately, if not done yet, and give it with --vqgan')
  bpe = captions(tokenizer, words) if tokenizer else None
  if bpe is None:
    notes.append('captions cannot be tokenized: convert again with --tokenizer')
  config = {
    'objective': 'dalle',
    'model': model,
    'data': {'image_size': size},
    'tokenizer': {'vocab_size': words, 'length': text, 'blank': 0},
  }
  text_json = bpe.to_str() if bpe else None
  return Imported(config, named('dalle', params), named('dalle', ours.axes), text_json, frozen, tuple(notes))
