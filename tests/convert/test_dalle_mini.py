"""DALL-E mini and its VQGAN in their own layout, made of the same weights in the layouts that have parity tests."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from flax import serialization, traverse_util
from tokenizers import Tokenizer, models, pre_tokenizers

from dalle_jax.convert import __main__ as command
from dalle_jax.convert import files
from dalle_jax.convert.sources import dalle_mini, min_dalle, taming, vqgan_jax
from dalle_jax.models import vqgan
from dalle_jax.training import checkpoint
from tests import runs

FIXTURES = Path(__file__).parent / 'fixtures'
MIN_DALLE, TAMING = FIXTURES / 'min_dalle', FIXTURES / 'taming_vqgan'
STACKS = ('encoder', 'decoder')
CONFIG = dict(
  {f'{stack}_{name}': n for stack in STACKS for name, n in (('layers', 2), ('attention_heads', 4), ('ffn_dim', 44))},
  decoder_start_token_id=64, image_vocab_size=64, ln_positions='normformer', use_glu=True, normalize_text=True,
)  # fmt: skip


def leaf(name, x):
  """The last name and the array of a tensor of PyTorch as Flax has them."""
  if 'embed_' in name:
    return 'embedding', x
  if name.endswith('.bias'):
    return 'bias', x
  return ('kernel', np.squeeze(x).T) if x.ndim > 1 else ('scale', x)


def published(stacked):
  """The tree of parameters of dalle-mini."""
  tree = {}
  names = {stack: {v: k for k, v in dalle_mini.LAYER.items()} for stack in STACKS}
  inner = {v: k for k, v in dalle_mini.GLU.items()}
  for stack in STACKS:
    for name, x in files.state_dict(MIN_DALLE / 'dalle_bart_mini' / f'{stack}.pt').items():
      end, x = leaf(name, x.numpy())
      parts = name.split('.')[:-1]
      if parts == ['lm_head']:
        tree['lm_head', end] = x
      elif parts[0] != 'layers':
        last = ('layers', f'FlaxBart{stack.title()}Layer_1', dalle_mini.FINAL[stack])
        own = last if parts == ['final_ln'] and not stacked else tuple(parts)
        tree['model', stack, *own, end] = x
      else:
        _, i, module, *rest = parts
        where = names[stack][module], *(inner[part] if module == 'glu' else part for part in rest), end
        if stacked:
          tree.setdefault(('model', stack, 'layers', f'FlaxBart{stack.title()}Layers', *where), []).append(x)
        else:
          tree['model', stack, 'layers', f'FlaxBart{stack.title()}Layer_{i}', *where] = x
  return {k: np.stack(v) if isinstance(v, list) else v for k, v in tree.items()}


def write(path, tree, config):
  path.mkdir(exist_ok=True)
  (path / 'flax_model.msgpack').write_bytes(serialization.msgpack_serialize(traverse_util.unflatten_dict(tree)))
  (path / 'config.json').write_text(json.dumps(config))
  return path


@pytest.fixture
def folder(tmp_path):
  """A DALL-E mini, whose tokenizer has one id more than its embedding has rows."""
  path, source = write(tmp_path / 'mini', published(stacked=True), CONFIG), MIN_DALLE / 'dalle_bart_mini'
  vocab = files.vocabulary(source / 'vocab.json')
  bpe = Tokenizer(models.BPE(vocab, files.merges(source / 'merges.txt'), unk_token='<unk>'))
  bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.add_special_tokens(['<mask>'])
  bpe.save(str(path / 'tokenizer.json'))
  (path / 'tokenizer_config.json').write_text('{"add_prefix_space": true}')
  return path


@pytest.fixture(scope='module')
def expected():
  return min_dalle.read(MIN_DALLE)


def test_the_weights_are_those_of_min_dalle(folder, expected):
  for stacked in (True, False):
    write(folder, published(stacked), CONFIG)
    found = dalle_mini.read(folder)
    assert set(found.params) == set(expected.params)
    for name, value in expected.params.items():
      np.testing.assert_array_equal(found.params[name], value, err_msg=name)
  ours, theirs = dict(found.config['model']), dict(expected.config['model'])
  assert ours.pop('start_token') == 64 and theirs.pop('start_token') == 63 and ours == theirs
  assert found.config['tokenizer'] == expected.config['tokenizer'] and found.config['data'] == expected.config['data']
  assert not found.frozen


def test_captions_become_plain_text(folder, expected):
  ids = lambda bpe, text: Tokenizer.from_str(bpe).encode(text, add_special_tokens=False).ids
  found = dalle_mini.read(folder).tokenizer
  text = 'a small dog on the table'
  assert ids(found, text) == ids(expected.tokenizer, text) and len(ids(found, text)) > 3
  assert ids(found, ' A  Small D\u00f4g on\u200b the \u2603table ') == ids(found, text)
  write(folder, published(True), CONFIG | {'normalize_text': False})
  assert ids(dalle_mini.read(folder).tokenizer, text.upper()) != ids(found, text)


def flax_names(theirs):
  """The names of vqgan-jax for those of taming."""
  for name, x in theirs.items():
    if not name.startswith('loss.'):
      end, x = 'bias' if name.endswith('.bias') else 'scale', x.numpy()
      if x.ndim == 4:
        end, x = 'kernel', x.transpose(2, 3, 1, 0)
      parent = re.sub(r'\.(up|down|block|attn)\.(\d+)', r'.\1_\2', name.rpartition('.')[0])
      yield (*parent.split('.'), 'embedding' if 'quantize' in name else end), x


def test_the_vqgan_is_that_of_taming(tmp_path):
  described = files.config(TAMING / 'model.yaml')['model']['params']
  sizes = {name: described[name] for name in ('embed_dim', 'n_embed')}
  tree = dict(flax_names(files.state_dict(TAMING / 'last.ckpt')))
  found = vqgan_jax.read(write(tmp_path / 'vqgan', tree, described['ddconfig'] | sizes))
  expected = taming.read(TAMING)
  assert found.config['model'] == expected.config['model']
  kept = {k for k in expected.params if k.startswith('vqgan/')}
  assert set(found.params) == kept
  for name in kept:
    np.testing.assert_array_equal(found.params[name], expected.params[name], err_msg=name)
  write(tmp_path / 'vqgan', tree, described['ddconfig'] | sizes | {'give_pre_end': True})
  with pytest.raises(ValueError, match='has give_pre_end or resamp_with_conv=false'):
    vqgan_jax.read(tmp_path / 'vqgan')


def test_the_command_gives_it_a_vqgan_with_pixels_from_0_to_1(folder, tmp_path):
  fields = runs.VQGAN | dict(image_size=256, patch=16, num_codes=64)
  picture = np.zeros((1, 256, 256, 3), np.float32)
  runs.write(tmp_path / 'vqgan', 'vqgan', vqgan.build(**fields), {'model': fields, 'data': {}}, picture)
  arguments = '--from=dalle_mini', f'--path={folder}', f'--out={tmp_path}/run', f'--vqgan={tmp_path}/vqgan'
  assert runs.call(command, *arguments) == 0
  assert checkpoint.load_run(tmp_path / 'run' / 'frozen' / 'vqgan').config['model']['pixels'] == 'unit'


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'ln_positions': 'swinv2'}, "config.json has ln_positions 'swinv2'; only models with 'normformer' can be read"),
    ({'decoder_layers': 3}, 'has encoder_layers 2 and decoder_layers 3; expected the same number'),
    ({f'{stack}_attention_heads': 5 for stack in STACKS}, 'has 5 attention heads, which do not divide a width of 32'),
    ({f'{stack}_attention_heads': 0 for stack in STACKS}, 'has 0 attention heads'),
    ({'decoder_start_token_id': 65}, 'start_token is 65; the image embedding has only 65 rows'),
    ({'encoder_ffn_dim': 'x'}, "has encoder_ffn_dim 'x'; expected a whole number"),
  ],
)
def test_configs_of_other_models_are_one_line(folder, change, message):
  (folder / 'config.json').write_text(json.dumps(CONFIG | change))
  with pytest.raises(ValueError, match=message) as e:
    dalle_mini.read(folder)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('flax_model.msgpack', b'version https://git-lfs.github.com/spec/v1', 'cannot be read .*saved by Flax. Is it comp'),
    ('flax_model.msgpack', b'', 'cannot be read'),
    ('flax_model.msgpack', serialization.msgpack_serialize({'a': 1}), 'has a, which is no array'),
    ('flax_model.msgpack', serialization.msgpack_serialize({'a': np.ones(2)}), 'has no tensor encoder.embed_tokens.w'),
    ('tokenizer.json', b'{}', 'has no field model.vocab'),
    ('tokenizer.json', b'{"model": {"vocab": {}}, "added_tokens": []}', 'tokenizer.json'),
    ('tokenizer_config.json', b'[]', 'tokenizer_config.json holds list'),
  ],
)
def test_damaged_files_are_one_line(folder, name, content, message):
  (folder / name).write_bytes(content)
  with pytest.raises(ValueError, match=message) as e:
    dalle_mini.read(folder)
  assert '\n' not in str(e.value)


def test_tensors_of_other_models_are_named(folder):
  tree = published(stacked=True)
  tree['model', 'decoder', 'layers', 'FlaxBartDecoderLayers', 'FlaxBartAttention_0', 'tau'] = np.ones((2, 1, 4, 1, 1))
  write(folder, tree, CONFIG)
  with pytest.raises(ValueError, match=r'unexpected decoder\.layers\.0\.self_attn\.tau'):
    dalle_mini.read(folder)
