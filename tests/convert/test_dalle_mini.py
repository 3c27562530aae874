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

# By the order in which dalle-mini's modules make them; written out, as a test of a table by itself tests nothing.
MODULES = {
  'pre_self_attn_layer_norm': 'LayerNorm_0', 'self_attn': 'FlaxBartAttention_0', 'self_attn_layer_norm': 'LayerNorm_1',
  'pre_encoder_attn_layer_norm': 'LayerNorm_2', 'encoder_attn': 'FlaxBartAttention_1',
  'encoder_attn_layer_norm': 'LayerNorm_3', 'glu': 'GLU_0',
}  # fmt: skip
OF_GLU = {'ln0': 'LayerNorm_0', 'fc0': 'Dense_0', 'fc1': 'Dense_1', 'ln1': 'LayerNorm_1', 'fc2': 'Dense_2'}
LAST_NORM = {'encoder': 'LayerNorm_2', 'decoder': 'LayerNorm_4'}


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
  for stack in STACKS:
    for name, x in files.state_dict(MIN_DALLE / 'dalle_bart_mini' / f'{stack}.pt').items():
      end, x = leaf(name, x.numpy())
      parts = name.split('.')[:-1]
      if parts == ['lm_head']:
        tree['lm_head', end] = x
      elif parts[0] != 'layers':
        last = ('layers', f'FlaxBart{stack.title()}Layer_1', LAST_NORM[stack])
        own = last if parts == ['final_ln'] and not stacked else tuple(parts)
        tree['model', stack, *own, end] = x
      else:
        _, i, module, *rest = parts
        where = MODULES[module], *(OF_GLU[part] if module == 'glu' else part for part in rest), end
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


def test_the_names_are_those_of_the_published_mini():
  """Which were printed by its users; only some norms have no scale there."""
  names = {('lm_head', 'kernel')}
  for stack, attentions in (('encoder', 1), ('decoder', 2)):
    outer = ['embed_positions.embedding', 'embed_tokens.embedding', 'final_ln.bias']
    outer += [f'layernorm_embedding.{leaf}' for leaf in ('bias', 'scale')]
    layer = [f'GLU_0.Dense_{i}.kernel' for i in range(3)] + [f'GLU_0.LayerNorm_{i}.bias' for i in range(2)]
    for i in range(attentions):
      layer += [f'FlaxBartAttention_{i}.{part}_proj.kernel' for part in ('q', 'k', 'v', 'out')]
      layer += [f'LayerNorm_{2 * i}.bias', f'LayerNorm_{2 * i + 1}.bias', f'LayerNorm_{2 * i + 1}.scale']
    layer = [f'layers.FlaxBart{stack.title()}Layers.{name}' for name in layer]
    names |= {('model', stack, *name.split('.')) for name in outer + layer}
  ours = set(published(stacked=True))
  assert names <= ours and {name[-1] for name in ours - names} <= {'scale'}


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
  """And begin with a space, whatever the tokenizer does by itself."""
  ids = lambda bpe, text: Tokenizer.from_str(bpe).encode(text).ids
  text, settings = 'a small dog on the table', folder / 'tokenizer_config.json'
  known = ids(expected.tokenizer, text)
  assert len(known) > 6
  for spaced in ('true', 'false', None):
    settings.write_text(f'{{"add_prefix_space": {spaced}}}') if spaced else settings.unlink()
    found = dalle_mini.tokenizer(folder, 420, True).to_str()
    assert ids(found, text) == ids(found, ' A  Small <b>D\u00f4g\ton\u200b the \u2603table\n') == known
    assert ids(found, 'a\u2014b \u00f8') == ids(found, 'a--b o')
    plain = dalle_mini.tokenizer(folder, 420, False).to_str()
    assert (ids(plain, text) == known) == (spaced == 'true') and ids(plain, text.upper()) != ids(plain, text)
  for word in ('<pad>', '</s>', '<mask>'):  # no caption may have these tokens
    assert not {0, 1, 2, 420} & set(ids(plain, f'a {word} dog')) and Tokenizer.from_str(plain).token_to_id('<pad>') == 1


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
  for change, message in (
    ({'give_pre_end': True}, 'has give_pre_end or resamp_with_conv=false'),
    ({'ch_mult': None}, 'has ch_mult None; expected a list of whole numbers'),
    ({'ch_mult': []}, 'has a size of 0 or no ch_mult'),
    ({'attn_resolutions': 8}, 'has attn_resolutions 8; expected a list of whole numbers'),
    ({'z_channels': 0}, 'has a size of 0'),
    ({'resolution': 'x'}, "has resolution 'x'; expected a whole number"),
  ):
    write(tmp_path / 'vqgan', tree, described['ddconfig'] | sizes | change)
    with pytest.raises(ValueError, match=message):
      vqgan_jax.read(tmp_path / 'vqgan')
  twice = tree | {('decoder', 'up', '0', 'block', '0', 'conv1', 'bias'): np.ones(3)}
  with pytest.raises(ValueError, match=r'two tensors for decoder[.]up[.]0[.]block'):
    vqgan_jax.read(write(tmp_path / 'vqgan', twice, described['ddconfig'] | sizes))


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
    ({'use_final_ln_decoder': False}, 'has use_final_ln_decoder False; only models with True'),
    ({'normalize_text': 'no'}, "has normalize_text 'no'; expected true or false"),
    ({f'{stack}_layers': 3 for stack in STACKS}, r'FlaxBart\S+ has the shape .2, .*; expected 3 layers'),
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
    ('tokenizer.json', b'{}', "expected a JSON file of Hugging Face's tokenizers"),
    (
      'tokenizer.json',
      b'{"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": null}',
      'tokenizer',
    ),
    ('tokenizer.json', Tokenizer(models.WordLevel({'<s>': 0}, '<s>')).to_str().encode(), 'has no <pad>; expected the'),
    ('tokenizer.json', Tokenizer(models.Unigram()).to_str().encode(), 'is no BPE; expected the tokenizer'),
    ('tokenizer_config.json', b'[]', 'tokenizer_config.json holds list'),
  ],
)
def test_damaged_files_are_one_line(folder, name, content, message):
  (folder / name).write_bytes(content)
  with pytest.raises(ValueError, match=message) as e:
    dalle_mini.read(folder)
  assert '\n' not in str(e.value)


LAYERS = ('model', 'decoder', 'layers')


@pytest.mark.parametrize(
  ('name', 'x', 'message'),
  [
    (
      (*LAYERS, 'FlaxBartDecoderLayers', 'FlaxBartAttention_0', 'tau'),
      np.ones((2, 1, 4, 1, 1)),
      r'unexpected decoder\.layers\.0\.self_attn\.tau',
    ),
    ((*LAYERS, 'FlaxBartDecoderLayers', 'LayerNorm_0', 'bias'), np.ones(()), r'has the shape \[\]; expected 2 layers'),
    ((*LAYERS, 'FlaxBartDecoderLayers', 'bias'), np.ones(2), 'unexpected decoder.layers.FlaxBartDecoderLayers.bias'),
    ((*LAYERS, 'FlaxBartDecoderLayer_0', 'LayerNorm_0', 'bias'), np.ones(32), 'has two tensors for decoder.layers.0.p'),
    (
      (*LAYERS, 'FlaxBartDecoderLayer_0', 'LayerNorm_4', 'bias'),
      np.ones(32),
      'unexpected decoder.layers.0.LayerNorm',
    ),
    (('model', 'lm_head', 'kernel'), np.ones((32, 65)), 'has two tensors for decoder.lm_head.weight'),
    (('lm_head', 'kernel'), np.ones(65), 'image_head'),
    (('model', 'encoder', 'final_ln', 'bias'), None, 'missing encoder.final_ln.bias'),
  ],
)
def test_tensors_of_other_models_are_named(folder, name, x, message):
  tree = published(stacked=True) | {name: x}
  write(folder, {k: v for k, v in tree.items() if v is not None}, CONFIG)
  with pytest.raises(ValueError, match=message):
    dalle_mini.read(folder)
