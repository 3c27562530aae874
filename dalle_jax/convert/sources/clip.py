"""CLIP as the transformers library lays it out: openai/clip-vit-base-patch32 and its kin (Radford et al., 2021).

Files: config.json, model.safetensors or pytorch_model.bin, vocab.json and merges.txt, in one folder. Where there is a
preprocessor_config.json, its mean and deviation of pixels are taken. Our towers read pixels in [-1, 1]: the scaling of
pixels goes into the first convolution and its shift into the positions of the patches.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from dalle_jax.convert import files
from dalle_jax.convert.engine import Imported, Network, Row, conv, convert, dense, linear, named, norm, row, stacked
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


def rows(layers: int, text_layers: int, mean: np.ndarray, std: np.ndarray) -> list[Row]:
  """Their pixels are (x - mean) / std of x in [0, 1], ours 2 x - 1."""
  patch, vision, text = 'vision_model.embeddings.patch_embedding.weight', 'vision_model.', 'text_model.'

  def shifted(positions: np.ndarray, weight: np.ndarray) -> np.ndarray:
    shift = np.einsum('oihw,i->o', weight, (0.5 - mean) / std)
    return np.concatenate([positions[:1], positions[1:] + shift])

  within = lambda tower, table: [Row(f'{tower}/{r.ours}', r.theirs, r.op, r.stacked, r.missing) for r in table]
  image = [
    row('stem/kernel', patch, lambda w: conv(w * (0.5 / std)[:, None, None])),
    row('class_token', f'{vision}embeddings.class_embedding'),
    row('positions', (f'{vision}embeddings.position_embedding.weight', patch), shifted),
    *norm('norm_in', f'{vision}pre_layrnorm'),
    *norm('norm_out', f'{vision}post_layernorm'),
    row('proj/kernel', 'visual_projection.weight', linear),
    *stacked(block(f'{vision}encoder.layers.{{i}}.'), layers),
  ]
  words = [
    row('embed/embedding', f'{text}embeddings.token_embedding.weight'),
    row('positions', f'{text}embeddings.position_embedding.weight'),
    *norm('norm_out', f'{text}final_layer_norm'),
    row('proj/kernel', 'text_projection.weight', linear),
    *stacked(block(f'{text}encoder.layers.{{i}}.'), text_layers),
  ]
  return [row('logit_scale', 'logit_scale'), *within('image', image), *within('text', words)]


def model_fields(file: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], int, int]:
  """Fields of our CLIP, and the numbers of text ids and positions."""
  sizes = ('hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads')
  image = files.fields(file, config, *(f'vision_config.{k}' for k in (*sizes, 'image_size', 'patch_size')))
  text = files.fields(file, config, *(f'text_config.{k}' for k in (*sizes, 'vocab_size', 'max_position_embeddings')))
  both = [config[tower] for tower in ('vision_config', 'text_config')]
  acts, eps = {t.get('hidden_act', 'quick_gelu') for t in both}, {t.get('layer_norm_eps', 1e-5) for t in both}
  if len(acts) > 1 or not acts <= set(ACTIVATIONS) or len(eps) > 1:
    raise ValueError(
      f'{file} has the activations {", ".join(sorted(acts))} and eps {sorted(eps)}; expected one of each.'
    )
  end = config['text_config'].get('eos_token_id', 2)
  model = dict(
    variant='vit_b32',
    image_size=image['image_size'],
    patch=image['patch_size'],
    width=image['hidden_size'],
    layers=image['num_hidden_layers'],
    heads=image['num_attention_heads'],
    mlp=image['intermediate_size'],
    text_width=text['hidden_size'],
    text_layers=text['num_hidden_layers'],
    text_heads=text['num_attention_heads'],
    text_mlp=text['intermediate_size'],
    embed_dim=files.fields(file, config, 'projection_dim')['projection_dim'],
    activation=ACTIVATIONS[acts.pop()],
    eps=float(eps.pop()),
    text_pool='max_id' if end == 2 else 'end',  # 2 stands in old configs for the highest id
    end=-1 if end == 2 else end,
  )
  return model, text['vocab_size'], text['max_position_embeddings']


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
  model, words, length = model_fields(file, config)
  preprocessor = folder / 'preprocessor_config.json'
  pixels = files.config(preprocessor) if preprocessor.is_file() else {}
  mean, std = (np.array(pixels.get(k, v), np.float32) for k, v in (('image_mean', MEAN), ('image_std', STD)))
  module = clip.build(**model, vocab_size=words, text_length=length)
  size = model['image_size']
  ours = Network.of(module, (1, size, size, 3), jax.ShapeDtypeStruct((1, length), jnp.int32))
  table = rows(model['layers'], model['text_layers'], mean, std)
  params = convert(str(weights), table, files.state_dict(weights), ours.shapes, [r'.*position_ids'])
  bpe = tokenizer(folder)
  start, end = (bpe.token_to_id(w) for w in (START, END))
  settings = {
    'objective': 'clip',
    'model': model,
    'data': {'image_size': size},
    'tokenizer': {'vocab_size': words, 'length': length, 'start': start, 'end': end, 'pad': _padding(folder, bpe)},
  }
  return Imported(settings, named('clip', params), named('clip', ours.axes), bpe.to_str())


def _padding(folder: Path, bpe: Tokenizer) -> int:
  """The id of the padding: that of special_tokens_map.json, else the end of text, as OpenAI's."""
  file = folder / 'special_tokens_map.json'
  token = files.config(file).get('pad_token', END) if file.is_file() else END
  found = bpe.token_to_id(token['content'] if isinstance(token, dict) else token)
  if found is None:
    raise ValueError(f'{file} names the padding {token!r}, which the vocabulary does not have.')
  return found
