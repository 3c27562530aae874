"""CLIP as the transformers library lays it out: openai/clip-vit-base-patch32 and its kin (Radford et al., 2021).

Files: config.json, model.safetensors or pytorch_model.bin, vocab.json and merges.txt, in one folder. Where there is a
preprocessor_config.json, its mean and deviation of pixels are taken. Our towers read pixels in [-1, 1]: the scaling of
pixels goes into the first convolution and its shift into the positions of the patches.
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

EXPECTED = 'a folder of a CLIP of transformers with config.json, model.safetensors, vocab.json and merges.txt'
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's pictures
ACTIVATIONS = {
  'quick_gelu': 'quick_gelu', 'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'relu': 'relu',
}  # fmt: skip
START, END = '<|startoftext|>', '<|endoftext|>'
WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def block(theirs: str) -> list[Row]:
  ours = 'encoder/blocks/{block}/'
  table = [*norm(f'{ours}norm_1', f'{theirs}layer_norm1'), *norm(f'{ours}norm_2', f'{theirs}layer_norm2')]
  names = {'query': 'q_proj', 'key': 'k_proj', 'value': 'v_proj', 'out': 'out_proj'}
  for our, their in names.items():
    table += dense(f'{ours}attention/{our}', f'{theirs}self_attn.{their}')
  return [*table, *dense(f'{ours}mlp_in', f'{theirs}mlp.fc1'), *dense(f'{ours}mlp_out', f'{theirs}mlp.fc2')]


def within(part: str, table: Iterable[Row]) -> list[Row]:
  """The rows with the name of a part of our network in front."""
  return [Row(f'{part}/{r.ours}', r.theirs, r.op, r.stacked, r.missing) for r in table]


def image_rows(layers: int, mean: np.ndarray, std: np.ndarray) -> list[Row]:
  """Their pixels are (x - mean) / std of x in [0, 1], ours 2 x - 1."""
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
  """Fields of our CLIP that follow from the config of its picture tower."""
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
  """Fields of our CLIP that follow from the config of its text tower, and the numbers of text ids and positions."""
  c, end = files.fields(file, config, *SIZES, 'vocab_size', 'max_position_embeddings'), config.get('eos_token_id', 2)
  model = dict(
    text_width=c['hidden_size'],
    text_layers=c['num_hidden_layers'],
    text_heads=c['num_attention_heads'],
    text_mlp=c['intermediate_size'],
    text_activation=_activation(file, config),
    eps=float(config.get('layer_norm_eps', 1e-5)),
    text_pool='max_id' if end == 2 else 'end',  # 2 stands in old configs for the highest id
    end=-1 if end == 2 else end,
  )
  return model, c['vocab_size'], c['max_position_embeddings']


def _activation(file: Path, config: Mapping[str, Any]) -> str:
  name = config.get('hidden_act', 'quick_gelu')
  if name not in ACTIVATIONS:
    raise ValueError(f'{file} has the activation {name!r}; expected one of {", ".join(ACTIVATIONS)}.')
  return ACTIVATIONS[name]


def both(file: Path, image: Mapping[str, Any], text: Mapping[str, Any], embed_dim: int) -> dict[str, Any]:
  """The fields of our CLIP. Raises ValueError where the towers differ in what ours has for both."""
  if image and image['eps'] != text['eps']:
    raise ValueError(f'{file} has the eps {image["eps"]} and {text["eps"]}; expected one for both towers.')
  return dict(variant='vit_b32', embed_dim=embed_dim) | dict(image) | dict(text)


def tokenizer(folder: Path) -> Tokenizer:
  """The byte-level BPE with ends of words of OpenAI's CLIP. Raises ValueError and OSError of one line."""
  words = files.find(folder, 'vocab.json', expected='the vocabulary of the tokenizer')
  merges = files.find(folder, 'merges.txt', expected='the merges of the tokenizer')
  vocab, pairs = files.vocabulary(words), files.merges(merges)
  if missing := [w for w in (START, END) if w not in vocab]:
    raise ValueError(f'{words} has no {missing[0]}; expected the vocabulary of a CLIP.')
  try:
    made = Tokenizer(models.BPE(vocab, pairs, end_of_word_suffix='</w>', unk_token=END))
  except Exception as e:  # the library raises bare Exception for merges that the vocabulary lacks
    raise ValueError(f'{words} and {merges.name} do not belong together ({" ".join(str(e).split())[:200]}).') from e
  spaces = normalizers.Replace(Regex(r'\s+'), ' ')
  made.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
  made.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(WORDS), 'removed', invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
  )
  made.decoder = decoders.ByteLevel()
  return made


def read(path: Path, **options: Any) -> Imported:
  """Raises ValueError and OSError of one line."""
  file = files.find(Path(path).expanduser(), 'config.json', expected=EXPECTED)
  folder, config = file.parent, files.config(file)
  weights = files.find(folder, 'model.safetensors', 'pytorch_model.bin', expected=EXPECTED)
  if config.get('model_type', 'clip') != 'clip':
    raise ValueError(f'{file} describes a {config["model_type"]}; expected a clip.')
  for part in ('vision_config', 'text_config'):
    files.fields(file, config, part)
  of_text, words, length = text_fields(file, config['text_config'])
  embed_dim = files.fields(file, config, 'projection_dim')['projection_dim']
  model = both(file, image_fields(file, config['vision_config']), of_text, embed_dim)
  mean, std = pixels(folder / 'preprocessor_config.json')
  size = model['image_size']
  module = clip.build(**model, vocab_size=words, text_length=length)
  ours = ModuleSpec.of(module, (1, size, size, 3), jax.ShapeDtypeStruct((1, length), jnp.int32))
  table = [row('logit_scale', 'logit_scale'), *image_rows(model['layers'], mean, std), *text_rows(model['text_layers'])]
  params = convert(str(weights), table, files.state_dict(weights), ours.shapes, [r'.*position_ids'])
  return imported(model, words, length, folder, named('clip', params), named('clip', ours.axes))


def imported(
  model: dict[str, Any], words: int, length: int, folder: Path, params: dict[str, Any], axes: dict[str, Any]
) -> Imported:
  """The run of a CLIP whose tokenizer lies in `folder`."""
  bpe = tokenizer(folder)
  start, end = (bpe.token_to_id(w) for w in (START, END))
  settings = {
    'objective': 'clip',
    'model': model,
    'data': {'image_size': model['image_size']},
    'tokenizer': {'vocab_size': words, 'length': length, 'start': start, 'end': end, 'pad': _padding(folder, bpe)},
  }
  return Imported(settings, params, axes, bpe.to_str())


def pixels(preprocessor: Path) -> tuple[np.ndarray, np.ndarray]:
  """Mean and deviation of pixels in [0, 1], of the file or OpenAI's."""
  found = files.config(preprocessor) if preprocessor.is_file() else {}
  mean, std = (np.array(found.get(k, v), np.float32) for k, v in (('image_mean', MEAN), ('image_std', STD)))
  return mean, std


def _padding(folder: Path, bpe: Tokenizer) -> int:
  """The id of the padding: that of special_tokens_map.json, else the end of text, as OpenAI's."""
  file = folder / 'special_tokens_map.json'
  token = files.config(file).get('pad_token', END) if file.is_file() else END
  found = bpe.token_to_id(token['content'] if isinstance(token, dict) else token)
  if found is None:
    raise ValueError(f'{file} names the padding {token!r}, which the vocabulary does not have.')
  return found
