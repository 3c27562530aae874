"""The import of a DALL-E mini: what may be absent or laid out in another way, and messages for what is wrong."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from dalle_jax.convert import __main__ as command
from dalle_jax.convert import files
from dalle_jax.convert.sources import min_dalle
from dalle_jax.models import vqgan
from dalle_jax.pipelines import generator
from tests import runs

FOLDER = Path(__file__).parent / 'fixtures' / 'min_dalle'


@pytest.fixture(scope='module')
def imported():
  return min_dalle.read(FOLDER)


def test_an_imported_run_draws(imported, tmp_path, monkeypatch):
  """The last of 256 codes, as the parity test draws all of them."""
  monkeypatch.setattr(command, 'read', lambda *_, **__: imported)
  assert runs.call(command, '--from=min_dalle', f'--path={FOLDER}', f'--out={tmp_path}/run') == 0
  model = generator.load(tmp_path / 'run')
  monkeypatch.setattr(model.vqgan.network.__class__, 'decode_codes', lambda self, codes: codes[..., None] / 32.0 - 1)
  monkeypatch.setattr(model, '_prefix', lambda *_: np.arange(240)[None] % 64)
  (drawn,) = model.sample(['a small dog'], seed=3, top_k=8, guidance=4.0)
  jax.clear_caches()  # the compiled program outlives the patch of its decoder
  assert drawn.tokens.shape == (1, 256) and len(np.unique(drawn.tokens[0, 240:])) > 4
  with pytest.raises(ValueError, match='has only a decoder, so it cannot encode images'):
    model.encode(np.zeros((1, 256, 256, 3), np.uint8))


def test_other_layouts_of_the_same_weights(imported, monkeypatch):
  """As they may be published: norms without scales, half precision, projections as 1 x 1 convolutions."""
  whole = files.state_dict

  def published(path):
    tensors = {k: v.numpy().astype(np.float16) for k, v in whole(path).items()}
    if path.name == 'detoker.pt':
      return tensors
    tensors = {k: v[..., None, None] if '_proj' in k else v for k, v in tensors.items()}
    return {k: v for k, v in tensors.items() if not k.endswith(('glu.ln0.weight', 'glu.ln1.weight', 'final_ln.weight'))}

  monkeypatch.setattr(files, 'state_dict', published)
  other = min_dalle.read(FOLDER)
  assert set(other.params) == set(imported.params)
  for name, value in other.params.items():
    if name.endswith(('norm_2/scale', 'norm_mlp/scale', 'norm_text_out/scale', 'norm_image_out/scale')):
      assert (value == 1).all(), name
    else:
      np.testing.assert_allclose(value, imported.params[name], atol=2e-3, err_msg=name)


def test_the_files_as_they_are_published(imported, tmp_path, monkeypatch):
  shutil.copy(FOLDER / 'vqgan' / 'detoker.pt', tmp_path)
  for path in (FOLDER / 'dalle_bart_mini').iterdir():
    shutil.copy(path, tmp_path / f'{path.stem}_mini{path.suffix}')
  monkeypatch.chdir(FOLDER / 'dalle_bart_mini')
  found = [min_dalle.read(tmp_path, heads=4), min_dalle.read(Path('.'))]
  assert found[0].config == found[1].config == imported.config and found[0].tokenizer == imported.tokenizer
  shutil.copy(FOLDER / 'dalle_bart_mini' / 'encoder.pt', tmp_path)  # that of mega
  with pytest.raises(ValueError, match='has mini and mega; choose one with --version'):
    min_dalle.read(tmp_path)


def test_an_embedding_may_have_more_or_fewer_rows_than_there_are_ids(monkeypatch):
  whole, merges = files.vocabulary, files.merges
  for change, spare in ((lambda v: {k: i for k, i in v.items() if i < 417}, 3), (lambda v: v | {'<more>': 420}, 0)):
    monkeypatch.setattr(files, 'vocabulary', lambda path, change=change: change(whole(path)))
    monkeypatch.setattr(files, 'merges', lambda path, spare=spare: merges(path)[: -spare or None])
    found = min_dalle.read(FOLDER)
    assert found.config['model']['text_spare'] == spare
    assert found.config['tokenizer']['vocab_size'] == 420 - spare


CONV = 'decoder.up.0.block.0.conv1.weight'


def replace(monkeypatch, file, name, shape):
  """Files are read with zeros of this shape as one of the tensors."""
  whole = files.state_dict
  other = lambda path: {name: np.zeros(shape)} if path.stem == file else {}
  monkeypatch.setattr(files, 'state_dict', lambda path: whole(path) | other(path))


@pytest.mark.parametrize(
  'file, name, shape, message',
  [
    ('detoker', 'embedding.weight', (66, 16), 'embeddings of 65 image tokens, the detokenizer 66; do the files belong'),
    ('detoker', CONV, (9999, 32, 3, 3), f'detoker.pt: {CONV} gives 9999 channels; expected a multiple of 32'),
    ('decoder', 'embed_positions.weight', (250, 32), 'has 250 image positions; expected a square number'),
  ],
)
def test_sizes_that_do_not_fit_are_refused(file, name, shape, message, monkeypatch):
  replace(monkeypatch, file, name, shape)
  with pytest.raises(ValueError, match=message):
    min_dalle.read(FOLDER)


@pytest.mark.parametrize(
  'file, name, shape, axes',
  [
    ('encoder', 'embed_tokens.weight', (420,), 2),
    ('encoder', 'layers.0.glu.fc0.weight', (), 2),
    ('decoder', 'embed_positions.weight', (256, 1, 32), 2),
    ('detoker', 'embedding.weight', (64,), 2),
    ('detoker', 'decoder.conv_in.weight', (32,), 4),
    ('detoker', CONV, (), 4),
    ('detoker', CONV, (0, 32, 3, 3), 4),
  ],
)
def test_a_tensor_with_other_axes_is_named(file, name, shape, axes, monkeypatch):
  replace(monkeypatch, file, name, shape)
  place = f'{file}.pt: ' if file == 'detoker' else f'dalle_bart_mini: {file}.'
  message = f'{place}{name} has the shape {list(shape)}; expected {axes} axes, none of them empty.'
  with pytest.raises(ValueError, match=re.escape(message)):
    min_dalle.read(FOLDER)


def test_a_detokenizer_without_levels_is_refused(monkeypatch):
  whole = files.state_dict
  monkeypatch.setattr(files, 'state_dict', lambda path: {k: v for k, v in whole(path).items() if '.up.' not in k})
  with pytest.raises(ValueError, match=f'detoker.pt has no tensor {CONV}; expected the files of min-dalle'):
    min_dalle.read(FOLDER)


def test_a_whole_vqgan_replaces_the_decoder(imported, tmp_path):
  """It is used with the pixel range of the decoder, and other codes are noticed."""
  own = json.loads(json.dumps(imported.frozen['vqgan'].config['model']))  # with lists for tuples, as in a run
  fields = {**own, 'pixels': 'signed', 'decoder_only': False}
  for name, change in (('other', {}), ('fewer', {'num_codes': 32})):
    model = {**fields, **change}
    config = {'model': model, 'data': {'image_size': 256}}
    runs.write(tmp_path / name, 'vqgan', vqgan.build(**model), config, np.zeros((1, 256, 256, 3), np.float32))
  read = lambda name: command._with_vqgan(imported, str(tmp_path / name))
  found = read('other')
  assert found.frozen['vqgan'].config['model'] == {**fields, 'pixels': 'unit'}
  assert (
    'vqgan/encoder/conv_in/kernel' in found.frozen['vqgan'].params and 'are not those of the model' in found.notes[0]
  )
  with pytest.raises(ValueError, match='fewer has 16 x 16 tokens of 32 codes for images of 256 pixels; the model'):
    read('fewer')


def cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
  'change, arguments, message',
  [
    (lambda at: (at / 'vqgan' / 'detoker.pt').unlink(), [], 'vqgan has no detoker.pt; expected the files of min-dalle'),
    (
      lambda at: shutil.rmtree(at / 'dalle_bart_mini'),
      [],
      'does not have a DALL-E mini or mega; expected',
    ),
    (lambda at: (at / 'dalle_bart_mini' / 'merges.txt').unlink(), [], 'has no merges.txt; expected the tokenizer'),
    (
      lambda at: shutil.copytree(at / 'dalle_bart_mini', at / 'dalle_bart_mega'),
      [],
      'has mini and mega; choose one with --version',
    ),
    (lambda at: (at / 'sizes.json').unlink(), [], 'nothing gives the number of attention heads for a width of 32'),
    (
      lambda at: (at / 'sizes.json').write_text('{"attention_head_count": "4"}'),
      [],
      "sizes.json: attention_head_count is '4'; expected a whole number of 1 or more, or give --heads",
    ),
    (
      lambda at: (at / 'dalle_bart_mini' / 'vocab.json').write_text('{"a": -1}'),
      [],
      "vocab.json has the id -1 for 'a'; expected 0 or more",
    ),
    (lambda at: None, ['--heads=5'], 'a width of 32 is not divisible by 5 attention heads'),
    (lambda at: None, ['--version=mega'], 'does not have a DALL-E mega; expected'),
    (lambda at: cut(at / 'dalle_bart_mini' / 'decoder.pt'), [], 'decoder.pt cannot be read'),
    (lambda at: cut(at / 'vqgan' / 'detoker.pt'), [], 'detoker.pt cannot be read'),
    (
      lambda at: shutil.copy(at / 'dalle_bart_mini' / 'encoder.pt', at / 'vqgan' / 'detoker.pt'),
      [],
      'detoker.pt has no tensor embedding.weight; expected the files of min-dalle',
    ),
    (
      lambda at: shutil.copy(at / 'dalle_bart_mini' / 'encoder.pt', at / 'dalle_bart_mini' / 'decoder.pt'),
      [],
      'missing decoder.layers.0.encoder_attn.k_proj.weight',
    ),
  ],
)
def test_wrong_files_are_one_line(change, arguments, message, tmp_path, capsys):
  folder = tmp_path / 'pretrained'
  shutil.copytree(FOLDER, folder)
  change(folder)
  found = runs.call(command, '--from=min_dalle', f'--path={folder}', f'--out={tmp_path}/run', *arguments)
  err = capsys.readouterr().err
  assert found == 2 and message in err and len(err.splitlines()) == 1, err
  assert not (tmp_path / 'run').exists()
