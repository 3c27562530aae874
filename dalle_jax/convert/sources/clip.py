"""CLIP in the format of the transformers library: openai/clip-vit-base-patch32 and similar (Radford et al., 2021).

Files: config.json, model.safetensors or pytorch_model.bin, vocab.json and merges.txt, in one folder. If there is a
preprocessor_config.json, it gives the mean and standard deviation of pixels. Our towers read pixels in [-1, 1], so the
scaling of pixels is folded into the first convolution and the shift into the position embeddings of the patches.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from dalle_jax.convert import files
from dalle_jax.convert.engine import Imported, ModuleSpec, Row, conv, convert, dense, linear, named, norm, row, stacked
from dalle_jax.models import clip

EXPECTED = 'the folder of a CLIP from transformers with config.json, model.safetensors, vocab.json and merges.txt'
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's pixel statistics
ACTIVATIONS = {
  'quick_gelu': 'quick_gelu', 'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'relu': 'relu',
}  # fmt: skip
START, END = '<|startoftext|>', '<|endoftext|>'
PRETOKENS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def block(theirs: str) -> list[Row]:
  ours = 'encoder/blocks/{block}/'
  table = [*norm(f'{ours}norm_1', f'{theirs}layer_norm1'), *norm(f'{ours}norm_2', f'{theirs}layer_norm2')]
  names = {'query': 'q_proj', 'key': 'k_proj', 'value': 'v_proj', 'out': 'out_proj'}
  for our, their in names.items():
    table += dense(f'{ours}attention/{our}', f'{theirs}self_attn.{their}')
  return [*table, *dense(f'{ours}mlp_in', f'{theirs}mlp.fc1'), *dense(f'{ours}mlp_out', f'{theirs}mlp.fc2')]


def within(part: str, table: Iterable[Row]) -> list[Row]:
  """Prefixes our names with the part of the network that they belong to."""
  return [Row(f'{part}/{r.ours}', r.theirs, r.op, r.stacked, r.missing) for r in table]


def image_rows(layers: int, mean: np.ndarray, std: np.ndarray) -> list[Row]:
  """Rows of the image tower; for x in [0, 1] it was trained on (x - mean) / std, ours reads 2 x - 1."""
  patch, vision = 'vision_model.embeddings.patch_embedding.weight', 'vision_model.'

  def shifted(positions: np.ndarray, weight: np.ndarray) -> np.ndarray:
    shift = np.einsum('oihw,i->o', weight, (0.5 - mean) / std)
    return np.concatenate([positions[:1], positions[1:] + shift])

  table = [
    row('stem/kernel', patch, lambda w: conv(w * (0.5 / std)[:, None, None])),
    row('class_token', f'{vision}embeddings.class_embedding'),
    row('positions', (f'{vision}embeddings.position_embedding.weight', patch), shifted),
    *norm('norm_in', f'{vision}pre_layrnorm'),
    *norm('norm_out', f'{vision}post_layernorm'),
    row('proj/kernel', 'visual_projection.weight', linear),
    *stacked(block(f'{vision}encoder.layers.{{i}}.'), layers),
  ]
  return within('image', table)


def text_rows(layers: int) -> list[Row]:
  text = 'text_model.'
  table = [
    row('embed/embedding', f'{text}embeddings.token_embedding.weight'),
    row('positions', f'{text}embeddings.position_embedding.weight'),
    *norm('norm_out', f'{text}final_layer_norm'),
    row('proj/kernel', 'text_projection.weight', linear),
    *stacked(block(f'{text}encoder.layers.{{i}}.'), layers),
  ]
  return within('text', table)


SIZES = ('hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads')


def image_fields(file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of our CLIP that the config of the image tower gives."""
  c = files.fields(file, config, *SIZES, 'image_size', 'patch_size')
  return dict(
    image_size=c['image_size'],
    patch=c['patch_size'],
    width=c['hidden_size'],
    layers=c['num_hidden_layers'],
    heads=c['num_attention_heads'],
    mlp=c['intermediate_size'],
    activation=_activation(file, config),
    eps=float(config.get('layer_norm_eps', 1e-5)),
  )


def text_fields(file: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], int, int]:
  """The fields of our CLIP that the config of the text tower gives, the vocabulary size and the number of positions."""
  c, end = files.fields(file, config, *SIZES, 'vocab_size', 'max_position_embeddings'), config.get('eos_token_id', 2)
  model = dict(
    text_width=c['hidden_size'],
    text_layers=c['num_hidden_layers'],
    text_heads=c['num_attention_heads'],
    text_mlp=c['intermediate_size'],
    text_activation=_activation(file, config),
    eps=float(config.get('layer_norm_eps', 1e-5)),
    text_pool='max_id' if end == 2 else 'end',  # in old configs 2 means the highest id
    end=-1 if end == 2 else end,
  )
  return model, c['vocab_size'], c['max_position_embeddings']


def _activation(file: Path, config: Mapping[str, Any]) -> str:
  name = config.get('hidden_act', 'quick_gelu')
  if name not in ACTIVATIONS:
    raise ValueError(f'{file} has hidden_act {name!r}; expected one of {", ".join(ACTIVATIONS)}.')
  return ACTIVATIONS[name]


def both(file: Path, image: Mapping[str, Any], text: Mapping[str, Any], embed_dim: int) -> dict[str, Any]:
  """All fields of our CLIP. Raises ValueError if the towers differ in a field that ours has only once."""
  if image and image['eps'] != text['eps']:
    raise ValueError(
      f'{file} has eps {image["eps"]} for images and {text["eps"]} for text; expected the same for both towers.'
    )
  return dict(variant='vit_b32', embed_dim=embed_dim) | dict(image) | dict(text)


def tokenizer(folder: Path) -> Tokenizer:
  """OpenAI's byte-level BPE with an end-of-word suffix. Raises ValueError or OSError with a one-line message."""
  vocab_file = files.find(folder, 'vocab.json', expected='the vocabulary of the tokenizer')
  merges = files.find(folder, 'merges.txt', expected='the merges of the tokenizer')
  vocab, pairs = files.vocabulary(vocab_file), files.merges(merges)
  if missing := [w for w in (START, END) if w not in vocab]:
    raise ValueError(f'{vocab_file} has no {missing[0]}; expected the vocabulary of a CLIP.')
  try:
    bpe = Tokenizer(models.BPE(vocab, pairs, end_of_word_suffix='</w>', unk_token=END))
  except Exception as e:  # the library raises bare Exception for merges that the vocabulary lacks
    raise ValueError(
      f'{vocab_file} and {merges.name} do not belong together ({" ".join(str(e).split())[:200]}).'
    ) from e
  spaces = normalizers.Replace(Regex(r'\s+'), ' ')
  bpe.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
  bpe.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(PRETOKENS), 'removed', invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
  )
  bpe.decoder = decoders.ByteLevel()
  return bpe


def read(path: Path) -> Imported:
  """Reads a CLIP and its tokenizer. Raises ValueError or OSError with a one-line message."""
  file = files.find(Path(path).expanduser(), 'config.json', expected=EXPECTED)
  folder, config = file.parent, files.config(file)
  weights = files.find(folder, 'model.safetensors', 'pytorch_model.bin', expected=EXPECTED)
  if config.get('model_type', 'clip') != 'clip':
    raise ValueError(f"{file} has model_type {config['model_type']!r}; expected 'clip'.")
  for part in ('vision_config', 'text_config'):
    files.fields(file, config, part)
  text, vocab_size, length = text_fields(file, config['text_config'])
  embed_dim = files.fields(file, config, 'projection_dim')['projection_dim']
  model = both(file, image_fields(file, config['vision_config']), text, embed_dim)
  mean, std = pixels(folder / 'preprocessor_config.json')
  size = model['image_size']
  module = clip.build(**model, vocab_size=vocab_size, text_length=length)
  ours = ModuleSpec.of(module, (1, size, size, 3), jax.ShapeDtypeStruct((1, length), jnp.int32))
  table = [row('logit_scale', 'logit_scale'), *image_rows(model['layers'], mean, std), *text_rows(model['text_layers'])]
  params = convert(str(weights), table, files.state_dict(weights), ours.shapes, [r'.*position_ids'])
  return imported(model, vocab_size, length, folder, named('clip', params), named('clip', ours.axes))


def imported(
  model: dict[str, Any], vocab_size: int, length: int, folder: Path, params: dict[str, Any], axes: dict[str, Any]
) -> Imported:
  """The run of a CLIP whose tokenizer is in `folder`."""
  bpe = tokenizer(folder)
  start, end = (bpe.token_to_id(w) for w in (START, END))
  settings = {
    'objective': 'clip',
    'model': model,
    'data': {'image_size': model['image_size']},
    'tokenizer': {'vocab_size': vocab_size, 'length': length, 'start': start, 'end': end, 'pad': _padding(folder, bpe)},
  }
  return Imported(settings, params, axes, bpe.to_str())


def pixels(preprocessor: Path) -> tuple[np.ndarray, np.ndarray]:
  """The mean and standard deviation of pixels in [0, 1]: from the file if it exists, otherwise OpenAI's."""
  config = files.config(preprocessor) if preprocessor.is_file() else {}
  mean, std = (np.array(config.get(k, v), np.float32) for k, v in (('image_mean', MEAN), ('image_std', STD)))
  return mean, std


def _padding(folder: Path, bpe: Tokenizer) -> int:
  """The padding id: from special_tokens_map.json if it exists, otherwise the end of text, as in OpenAI's."""
  file = folder / 'special_tokens_map.json'
  token = files.config(file).get('pad_token', END) if file.is_file() else END
  pad = bpe.token_to_id(token['content'] if isinstance(token, dict) else token)
  if pad is None:
    raise ValueError(f'{file} has pad_token {token!r}, which is not in the vocabulary.')
  return pad
