"""The import command: what it writes, and its one-line messages for everything that can go wrong."""

import io
import json
import pickle
import random
import shutil
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from tokenizers import Tokenizer, models, pre_tokenizers

import sample
import train
from dalle_jax.convert import __main__ as command
from dalle_jax.convert import engine, files, torch_file
from dalle_jax.convert.sources import dalle_pytorch, rudalle
from dalle_jax.pipelines.dalle import DallE
from dalle_jax.pipelines.image_tokenizer import ImageTokenizer
from dalle_jax.training import checkpoint
from tests import runs

FIXTURES = Path(__file__).parent / 'fixtures'


QUICKLY = ['--config.train.ema=0', '--config.train.eval_every=0', '--config.optim.name=sgd', '--config.data.workers=0']


def convert(*arguments, capsys=None):
  status = runs.call(command, *arguments)
  return status, capsys.readouterr() if capsys else None


@pytest.fixture(scope='module')
def mindalle(tmp_path_factory):
  """An imported minDALL-E."""
  out = tmp_path_factory.mktemp('runs') / 'mindalle'
  assert convert('--from=mindalle', f'--path={FIXTURES}/mindalle/1.3B', f'--out={out}')[0] == 0
  return out


def test_an_imported_run_draws_and_is_fine_tuned_into_a_storyteller(mindalle, tmp_path, capsys):
  drawn = DallE.load(mindalle).sample(['a red circle'], seed=3, top_k=8)[0]
  assert drawn.images.shape == (1, 32, 32, 3) and len(np.unique(drawn.tokens)) > 8
  arguments = [
    *QUICKLY, '--config.train.steps=2', '--config.train.log_every=1', '--config.data.batch_size=2',
    '--config.data.source_args.count=16', f'--config.run_dir={tmp_path}/story',
  ]  # fmt: skip
  config = f'configs/finetune_storydalle.py:shapes,base={mindalle},size=32'
  with runs.fine_tuning():
    assert train.main(['train.py', f'--config={config}', *arguments]) == 0
  said = capsys.readouterr().out
  assert 'step 2/2' in said and 'story:' in said
  run = checkpoint.load_run(tmp_path / 'story')
  assert run.config['model']['retro'] == 3 and run.config['tokenizer']['pad'] == 0
  story = tmp_path / 'story.json'
  story.write_text('{"captions": ["pip moves to the top", "now at night pip grows"]}')
  from PIL import Image

  Image.new('RGB', (32, 32), 'red').save(tmp_path / 'frame.png')
  out = ['--source', tmp_path / 'frame.png', '--n', 1, '--out', tmp_path / 'drawn']
  assert runs.call(sample, '--run', tmp_path / 'story', '--story', story, *out) == 0
  assert (tmp_path / 'drawn' / 'storyboard.png').is_file()


@pytest.fixture
def words(tmp_path):
  """A tokenizer of 60 ids, as those of the small DALLE-pytorch models have."""
  file = tmp_path / 'words.json'
  vocabulary = {'[UNK]': 0, 'a': 1, 'red': 2, 'circle': 3, **{f'word{i}': i for i in range(4, 60)}}
  bpe = Tokenizer(models.WordLevel(vocabulary, '[UNK]'))
  bpe.pre_tokenizer = pre_tokenizers.Whitespace()
  bpe.save(str(file))
  return file


def test_a_dalle_of_dalle_pytorch_draws_and_is_fine_tuned(words, tmp_path, capsys):
  source, out = FIXTURES / 'dalle_pytorch' / 's4_shared', tmp_path / 'run'
  status, said = convert(
    '--from=dalle_pytorch', f'--path={source}', f'--tokenizer={words}', f'--out={out}', capsys=capsys
  )
  assert status == 0 and 'dalle, vqgan' in said.out and 'note' not in said.out
  model = DallE.load(out)
  assert model.encode_text('a zebra red').tolist() == [1, 61, 2, *range(63, 72)]  # what is unknown is padding, too
  drawn = model.sample(['a red circle'], n=2, guidance=2.0)[0]
  assert drawn.images.shape == (2, 32, 32, 3) and len(np.unique(drawn.tokens)) > 8
  again = model.sample(['a red circle'], n=2, first=1, guidance=2.0)[0]
  np.testing.assert_array_equal(again.tokens[0], drawn.tokens[1])
  arguments = [
    f'--config=configs/finetune_mindalle.py:base={out},size=32,batch=2,steps=2', '--config.data.source=shapes',
    *QUICKLY, f'--config.run_dir={tmp_path}/tuned',
  ]  # fmt: skip
  with runs.fine_tuning():
    assert train.main(['train.py', *arguments]) == 0
  tuned, before = (checkpoint.load_run(path).params['dalle'] for path in (tmp_path / 'tuned', out))
  assert 0 < np.abs(np.subtract(tuned['text_embed'], before['text_embed'])).max() < 0.01 < before['text_embed'].std()
  assert DallE.load(tmp_path / 'tuned').sample(['a circle'], n=2, guidance=2.0)[0].images.shape == (2, 32, 32, 3)


def test_a_dalle_of_dalle_pytorch_says_what_it_lacks(words, tmp_path, capsys):
  source = f'--path={FIXTURES}/dalle_pytorch/s1_full/dalle.pt'
  assert convert('--from=dalle_pytorch', source, f'--out={tmp_path}/run', capsys=capsys)[1].out.count('note:') == 1
  with pytest.raises(ValueError, match='has no tokenizer, which sampling needs'):
    DallE.load(tmp_path / 'run')
  bad = json.loads(words.read_text())
  del bad['model']['vocab']['word59']
  (tmp_path / 'few.json').write_text(json.dumps(bad))
  (tmp_path / 'broken.json').write_text('{')
  for name, message in (
    ('few.json', 'has 59 tokens, the model 60; expected its own tokenizer'),
    ('broken.json', "expected a JSON file of Hugging Face's tokenizers"),
    ('none.json', 'does not exist; expected a JSON file, a .model, or a folder'),
  ):
    arguments = ['--from=dalle_pytorch', source, f'--tokenizer={tmp_path}/{name}', f'--out={tmp_path}/other']
    status, said = convert(*arguments, capsys=capsys)
    assert status == 2 and message in said.err and not (tmp_path / 'other').exists()


def test_a_dalle_of_dalle_pytorch_with_other_parts_is_refused(monkeypatch, tmp_path):
  whole = torch_file.load(FIXTURES / 'dalle_pytorch' / 's2_sparse' / 'dalle.pt')
  (tmp_path / 'dalle.pt').touch()

  def refused(message, **changed):
    monkeypatch.setattr(torch_file, 'load', lambda path: {**whole, **changed})
    with pytest.raises(ValueError, match=message):
      dalle_pytorch.read(tmp_path)

  hparams = whole['hparams']
  refused("attention of type 'mlp'; expected full, axial_row", hparams={**hparams, 'attn_types': ('mlp',)})
  refused('attention of type 3; expected', hparams={**hparams, 'attn_types': 3})
  refused(r"attention of type \['full'\]; expected", hparams={**hparams, 'attn_types': [['full']]})
  refused('has no hparams and weights', hparams=[1])
  flat = {**whole['weights'], 'to_logits.1.weight': whole['weights']['to_logits.1.bias']}
  refused(r'has to_logits.1.weight of shape \[112\]; expected 2 axes', weights=flat)
  refused("has dim '32'; expected a whole number", hparams={**hparams, 'dim': '32'})
  refused('has -12 image codes and 64 image tokens', hparams={**hparams, 'num_text_tokens': 112})
  refused('has no sizes of a DiscreteVAE', vae_params=[1])
  refused('has image_size 33 and num_layers 2', vae_params={**whole['vae_params'], 'image_size': 33})
  refused('other rotary positions', hparams={**hparams, 'dim_head': 24})
  refused(r"version '1\.5\.2' and has conv_like attention; expected version 1\.6", version='1.5.2')
  refused('has no field dim; is it', hparams={k: v for k, v in hparams.items() if k != 'dim'})
  refused('has no hparams and weights', weights='see the wiki of DeepSpeed')
  refused('another normalization', vae_params={**whole['vae_params'], 'normalization': None})
  monkeypatch.setattr(torch_file, 'load', lambda path: {**whole, 'vae_params': None, 'vae_class_name': 'VQGanVAE'})
  imported = dalle_pytorch.read(tmp_path)
  assert imported.config['data'] == {'image_size': 256} and 'VQGanVAE' in imported.notes[0] and not imported.frozen


@pytest.mark.parametrize('version, noted', [('1.5.2', True), ('1.6.0', False), (None, False)])
def test_a_dalle_of_another_version_of_dalle_pytorch_gets_a_note(version, noted, monkeypatch):
  path = FIXTURES / 'dalle_pytorch' / 's1_full' / 'dalle.pt'
  whole = {**torch_file.load(path), 'version': version}
  monkeypatch.setattr(torch_file, 'load', lambda path: whole)
  assert any("of version '1.5.2' of DALLE-pytorch" in note for note in dalle_pytorch.read(path).notes) == noted


def test_an_image_tokenizer_must_fit_the_model(tmp_path, capsys):
  source = f'--path={FIXTURES}/dalle_pytorch/s1_full'
  assert convert('--from=openai_dvae', f'--path={FIXTURES}/openai_dvae', f'--out={tmp_path}/dvae')[0] == 0
  capsys.readouterr()
  refused = lambda *arguments: convert(*arguments, f'--out={tmp_path}/run', capsys=capsys)
  message = 'has 4 x 4 tokens of 64 codes for images of 32 pixels; the model needs 8 x 8 tokens of 40 codes'
  for arguments, expected in (
    (['--from=dalle_pytorch', source, f'--vqgan={tmp_path}/dvae'], message),
    (
      ['--from=openai_dvae', f'--path={FIXTURES}/openai_dvae', f'--vqgan={tmp_path}/dvae'],
      'a dvae needs no image token',
    ),
    (['--from=openai_dvae', f'--path={FIXTURES}/openai_dvae', '--heads=3'], '--from openai_dvae takes no --heads'),
  ):
    status, said = refused(*arguments)
    assert status == 2 and expected in said.err and said.err.count('\n') == 1 and not (tmp_path / 'run').exists()


def test_a_run_with_another_grid_is_refused(words, tmp_path):
  out = tmp_path / 'run'
  source = f'--path={FIXTURES}/dalle_pytorch/s4_shared'
  assert convert('--from=dalle_pytorch', source, f'--tokenizer={words}', f'--out={out}')[0] == 0
  run = checkpoint.load_run(out)
  frozen = {'vqgan': checkpoint.load_run(run.frozen['vqgan'])}
  run.config['data']['image_size'] = 64
  with pytest.raises(ValueError, match=r'model.grid is .8, 8., but the tokenizers and images of 64 pixels give .16'):
    DallE(run, frozen)


def test_a_discrete_vae_alone_is_an_image_tokenizer(monkeypatch, tmp_path):
  whole = torch_file.load(FIXTURES / 'dalle_pytorch' / 's1_full' / 'dalle.pt')
  alone = {k.removeprefix('vae.'): v for k, v in whole['weights'].items() if k.startswith('vae.')}
  (tmp_path / 'vae.pt').touch()
  monkeypatch.setattr(torch_file, 'load', lambda path: {'hparams': whole['vae_params'], 'weights': alone})
  assert convert('--from=dalle_pytorch', f'--path={tmp_path}', f'--out={tmp_path}/vae')[0] == 0
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
  tokens = ImageTokenizer.load(tmp_path / 'vae').encode(images)
  assert tokens.shape == (2, 64) and len(np.unique(tokens)) > 8


def test_an_imported_dvae_encodes_and_decodes(tmp_path):
  assert convert('--from=openai_dvae', f'--path={FIXTURES}/openai_dvae', f'--out={tmp_path}/dvae')[0] == 0
  dvae = ImageTokenizer.load(tmp_path / 'dvae', image_size=64)
  images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
  tokens = dvae.encode(images, 2)
  assert tokens.shape == (3, 64) and 0 <= tokens.min() <= tokens.max() < dvae.num_codes
  assert dvae.decode(tokens).shape == images.shape


def test_the_inception_of_torchvision_is_not_taken_for_that_of_fids(tmp_path, capsys):
  path = tmp_path / 'inception_v3.safetensors'
  safetensors.numpy.save_file({'fc.weight': np.zeros((1000, 8), np.float32)}, path)
  status, said = convert('--from=inception', f'--path={path}', f'--out={tmp_path}/out', capsys=capsys)
  assert status == 2 and 'has 1000 classes, like that of torchvision; FID needs pt_inception' in said.err
  status, said = convert('--from=inception', f'--path={tmp_path}', f'--out={tmp_path}/out', capsys=capsys)
  assert status == 2 and 'has no pt_inception*.pth or weights-inception*.pth' in said.err


def test_a_gumbel_vqgan_without_kl_weight_has_that_of_its_class(tmp_path):
  folder = FIXTURES / 'taming_gumbel_vqgan'
  shutil.copy(folder / 'last.ckpt', tmp_path)
  (tmp_path / 'model.yaml').write_text((folder / 'model.yaml').read_text().replace('kl_weight: 1.0e-08', ''))
  assert command.read('taming', tmp_path).config['loss']['kl_weight'] == 1e-8


def test_an_imported_vqgan_is_fine_tuned_with_its_discriminator_and_lpips(tmp_path, capsys):
  base, run, logs = tmp_path / 'f4', tmp_path / 'mine', tmp_path / 'logs'
  for name, folder in (('last.ckpt', 'checkpoints'), ('model.yaml', 'configs')):  # as their training leaves them
    (logs / folder).mkdir(parents=True)
    shutil.copy(FIXTURES / 'taming_vqgan' / name, logs / folder)
  assert convert('--from=taming', f'--path={logs}', f'--out={base}')[0] == 0
  arguments = [
    *QUICKLY, '--config.data.source=shapes', '--config.data.augment=', '--config.data.batch_size=2',
    '--config.train.steps=1', '--config.train.log_every=1', f'--config.run_dir={run}',
  ]  # fmt: skip
  config = f'configs/finetune_vqgan.py:base={base},size=64'
  with runs.fine_tuning():
    assert train.main(['train.py', f'--config={config}', *arguments]) == 0
  said = capsys.readouterr().out
  assert 'lpips: ' in said and 'discriminator: ' in said and 'adaptive_weight' in said
  before, after = (checkpoint.load_run(path).network('discriminator') for path in (base, run))
  assert (before['norm_1']['mean'] == after['norm_1']['mean']).all()
  assert 0 < np.abs(np.subtract(before['norm_1']['scale'], after['norm_1']['scale'])).max() < 0.01


@pytest.mark.parametrize(
  'source, names, listed',
  [
    ('storydalle', [f'Model/{i}.pth' for i in range(50)], 'Model/0.pth, Model/1.pth, Model/10.pth, .* and 46 more;'),
    ('taming', [f'checkpoints/epoch={i:06}.ckpt' for i in (2, 10)], 'checkpoints/epoch=000002.ckpt, .*000010.ckpt;'),
    ('rudalle', ['pytorch_model.bin', 'pytorch_model_v2.bin'], 'pytorch_model.bin, pytorch_model_v2.bin;'),
  ],
)
def test_of_several_checkpoints_none_is_chosen(source, names, listed, tmp_path):
  for name in names:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
  with pytest.raises(ValueError, match=f'has {listed} expected one: give it as --path'):
    command.read(source, tmp_path)
  assert files.find(tmp_path / names[-1], expected='') == tmp_path / names[-1]


def test_a_rudalle_file_that_does_not_name_its_version_gets_a_note(tmp_path):
  sizes = json.loads((FIXTURES / 'rudalle' / 'model_params.json').read_text())
  weights = tmp_path / 'pytorch_model.bin'
  shutil.copy(FIXTURES / 'rudalle' / 'pytorch_model_v2.bin', weights)
  (tmp_path / 'config.json').write_text(json.dumps(sizes['v2']))
  for version, noted in (('', True), ('v2', False)):
    imported = rudalle.read(weights, version=version)
    assert any('gives no version, so it was read as v3' in note for note in imported.notes) == noted
    assert imported.config['model']['layout'] == ('no_start' if noted else 'shifted')


def test_the_version_of_a_rudalle_chooses_its_file(tmp_path):
  for name in ('model_params.json', 'pytorch_model_v2.bin', 'pytorch_model_v3.bin'):
    shutil.copy(FIXTURES / 'rudalle' / name, tmp_path)
  for version, width in (('v3', 32), ('v2', 24)):
    model = rudalle.read(tmp_path, version=version).config['model']
    assert (model['layout'], model['d_model']) == (rudalle.VERSIONS[version], width)
  (tmp_path / 'pytorch_model_v3.bin').unlink()
  with pytest.raises(ValueError, match=r'pytorch_model_v2.bin has the weights of v2 by its name; .* --version v2'):
    rudalle.read(tmp_path, version='v3')
  with pytest.raises(ValueError, match="version 'v4' is unknown; there are v3, v2"):
    rudalle.read(tmp_path, version='v4')


def test_the_heads_of_a_rudalle_are_given_or_those_of_a_published_model(monkeypatch, tmp_path):
  weights = tmp_path / 'pytorch_model_v3.bin'
  shutil.copy(FIXTURES / 'rudalle' / weights.name, weights)
  heads = lambda **given: rudalle.read(weights, **given).config['model']['heads']
  with pytest.raises(ValueError, match=r'nothing gives the number of attention heads for a width of 32; .* --heads'):
    heads()
  monkeypatch.setitem(rudalle.HEADS, 32, 8)
  assert (heads(), heads(heads=2)) == (8, 2)
  shutil.copy(FIXTURES / 'rudalle' / 'model_params.json', tmp_path)
  assert (heads(), heads(heads=2)) == (4, 2)


def test_a_tokenizer_of_youtokentome(tmp_path):
  path = tmp_path / 'bpe.model'
  letters = {'▁': 4, 'a': 5, 'b': 6}
  lines = ['3 2', *(f'{ord(c)} {i}' for c, i in letters.items()), '4 5 7', '7 6 8', '1 0 2 3']
  path.write_text('\n'.join(lines))
  words = rudalle.youtokentome(path)
  assert words.encode('AB  ba').ids == [8, 4, 6, 5] and words.encode('z').ids[-1] == 1
  assert dalle_pytorch.captions(path, words.get_vocab_size()).encode('Ab').ids == [4, 1, 6]  # it keeps case
  path.write_text('3 2\n1 2')
  with pytest.raises(ValueError, match=r'cannot be read .*; expected a YouTokenToMe model'):
    rudalle.youtokentome(path)


def test_a_run_may_be_named_by_its_repository(mindalle, tmp_path, monkeypatch):
  asked = []
  hub = types.SimpleNamespace(snapshot_download=lambda name: asked.append(name) or str(mindalle))
  monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
  monkeypatch.chdir(tmp_path)
  for name, objective in (('owner/mindalle', 'dalle'), ('owner/mindalle/frozen/vqgan', 'vqgan')):
    assert checkpoint.load_run(name).config['objective'] == objective and set(asked) == {'owner/mindalle'}
  hub.snapshot_download = lambda name: (_ for _ in ()).throw(RuntimeError('404:\nno such repository'))
  with pytest.raises(
    FileNotFoundError, match=r'is not a directory, and cannot be downloaded .*404: no such repository'
  ):
    checkpoint.load_run('owner/other')
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(FileNotFoundError, match=r'pip install -e "\.\[hf\]"'):
    checkpoint.load_run('owner/other')


@pytest.mark.parametrize(
  'arguments, message',
  [
    (
      ['--from=dallemini', '--path=x'],
      "--from 'dallemini' is unknown; there are clip, dalle_mini, dalle_pytorch,",
    ),
    (['--from=mindalle', '--path=/none'], '/none does not exist; expected the folder of minDALL-E'),
    (['--from=taming', f'--path={FIXTURES}/clip_hf'], 'has no model.yaml or'),
    (['--from=clip', f'--path={FIXTURES}/roberta_hf'], "has model_type 'roberta'; expected 'clip'"),
    (['--from=storydalle', f'--path={FIXTURES}/mindalle/1.3B/stage2_last.ckpt'], 'stage2_last.ckpt has no stage2.'),
    (
      ['--from=storydalle', f'--path={FIXTURES}/mindalle/1.3B/stage2_last.ckpt', '--config=/none.yaml'],
      '/none.yaml does not exist; expected the config.yaml of minDALL-E.',
    ),
    (['--from=mindalle'], 'give --from'),
  ],
)
def test_a_wrong_request_is_one_line(arguments, message, tmp_path, capsys):
  status, said = convert(*arguments, f'--out={tmp_path}/run', capsys=capsys)
  assert status == 2 and message in said.err and len(said.err.splitlines()) == 1
  assert not (tmp_path / 'run').exists()


def test_missing_and_damaged_files_are_one_line(mindalle, tmp_path, capsys):
  folder = tmp_path / '1.3B'
  shutil.copytree(FIXTURES / 'mindalle' / '1.3B', folder)
  whole = (folder / 'stage2_last.ckpt').read_bytes()

  def expect(message, out='run'):
    status, said = convert('--from=mindalle', f'--path={folder}', f'--out={tmp_path}/{out}', capsys=capsys)
    assert status == 2 and message in said.err and len(said.err.splitlines()) == 1, said.err

  (folder / 'stage2_last.ckpt').write_bytes(whole[: len(whole) // 2])
  expect('stage2_last.ckpt cannot be read')
  (folder / 'stage2_last.ckpt').write_bytes(whole)
  config = (folder / 'config.yaml').read_text()
  (folder / 'config.yaml').write_text(config.replace('n_layers: 3', 'n_layers: 2').replace('n_dense_layers: 2', ''))
  expect('unexpected blocks.2.attn.key.bias')
  (folder / 'config.yaml').write_text(config.replace('embed_dim: 48', 'embed_dim: 96'))
  expect('does not give [96] for our blocks/blocks/block_0/norm_1/scale')
  (folder / 'config.yaml').write_text(config)
  shutil.rmtree(folder / 'tokenizer')
  expect('expected the vocabulary and merges of the tokenizer')
  assert not (tmp_path / 'run').exists()
  status, said = convert('--from=mindalle', '--path=x', f'--out={mindalle}', capsys=capsys)
  assert status == 2 and 'already exists' in said.err


def test_every_tensor_is_accounted_for():
  shapes = {'a': np.zeros(2), 'b': np.zeros((3, 2))}
  theirs = {'x': np.ones(2, np.float32), 'y': np.ones((2, 3), np.float32), 'junk': np.ones(1)}
  rows = [engine.row('a', 'x'), engine.row('b', 'y', engine.linear)]
  found = engine.convert('it', rows, theirs, shapes, ['junk'])
  assert found['b'].shape == (3, 2) and found['a'].dtype == np.float32
  for wrong, message in (
    (rows, r'it does not fit its config: unexpected junk \[1\]'),
    ([rows[0]], r'unexpected y \[2, 3\].*our b has no source'),
    ([*rows, engine.row('c', 'x')], 'x is used twice; our c is not in the network'),
    ([*rows, engine.row('a', 'junk')], 'our a is produced twice'),
    ([rows[0], engine.row('b', 'z')], r'missing z; unexpected junk \[1\]; unexpected y'),
    ([engine.row('a', 'y'), engine.row('b', 'x')], r'y \[2, 3\] does not give \[2\] for our a'),
  ):
    with pytest.raises(ValueError, match=message):
      engine.convert('it', wrong, theirs, shapes)
  # A shape that an operation cannot take is named, and no tensor is read before all of them are known to fit.
  unread = types.SimpleNamespace(shape=(3, 2), numpy=lambda: pytest.fail('it was read'))
  for op in (engine.conv, lambda x: x @ np.ones(3), lambda x: x[5], engine.part(0, 2)):
    with pytest.raises(ValueError, match=r'it does not fit its config: x \[3, 2\] does not give \[2\] for our a\.'):
      engine.convert('it', [engine.row('a', 'x', op)], {'x': unread}, {'a': np.zeros(2)})
  layers = [engine.Row('a', (('x',), ('y',)), engine.same, stacked=True)]
  for shape, message in (((3, 2), 'our a has 3 layers, theirs 2'), ((2, 5), r'x \[2\] does not give \[5\] for our a')):
    with pytest.raises(ValueError, match=message):
      engine.convert('it', layers, {'x': np.ones(2), 'y': np.ones(5)}, {'a': np.zeros(shape)})
  assert not engine.fits((2, 3), (3, 2)) and engine.fits((6, 4), (6, 2, 2)) and engine.fits((1, 5, 1, 1), (5,))


class Runs:
  """An object whose pickle calls `function(*arguments)` when it is read."""

  def __init__(self, function, *arguments):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize('layout', ['zip', 'stream'])
def test_a_hostile_checkpoint_is_refused_and_not_run(layout, tmp_path, capsys):
  mark, path = tmp_path / 'mark', tmp_path / 'stage2_last.ckpt'
  for hostile in (Runs(exec, f'open({str(mark)!r}, "w")'), Runs(eval, '1'), Runs(open, str(mark), 'w')):
    text = pickle.dumps({'state_dict': {'a': hostile}}, protocol=2)
    if layout == 'zip':
      with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('archive/data.pkl', text)
        archive.writestr('archive/version', '3')
    else:
      head = [pickle.dumps(x, protocol=2) for x in (torch_file.MAGIC, torch_file.PROTOCOL, {'little_endian': True})]
      path.write_bytes(b''.join([*head, text, pickle.dumps([])]))
    with pytest.raises(
      ValueError, match=r'is refused because it asks for (__builtin__|builtins|_?io)\.(exec|eval|open)'
    ):
      torch_file.load(path)
  shutil.copytree(FIXTURES / 'mindalle' / '1.3B', tmp_path / '1.3B')
  shutil.copy(path, tmp_path / '1.3B' / path.name)
  status, said = convert('--from=mindalle', f'--path={tmp_path}/1.3B', f'--out={tmp_path}/run', capsys=capsys)
  assert status == 2 and len(said.err.splitlines()) == 1 and 'is refused' in said.err
  assert not mark.exists() and not (tmp_path / 'run').exists()


def test_objects_of_other_packages_are_inert_and_others_refused():
  def loaded(text):
    return torch_file._Unpickler(io.BytesIO(text), lambda saved: None).load()

  kind = b'cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n'
  stub = loaded(kind + b'(S"a"\ntR.')
  assert isinstance(stub, torch_file.Stub) and stub.args == ('a',) and 'ModelCheckpoint' in repr(stub)
  for name in (b'os\nsystem', b'torch.hub\nload', b'torch.storage\n_load_from_bytes', b'subprocess\nPopen'):
    with pytest.raises(torch_file.Refused):
      loaded(b'c' + name + b'\n.')
  with pytest.raises(torch_file.Refused, match='a call of FloatStorage'):
    loaded(b'ctorch\nFloatStorage\n(tR.')


@pytest.mark.parametrize('name', ['new_zip.pt', 'old_zip_cuda.ckpt', 'legacy.pth', 'legacy_cuda.ckpt'])
def test_damaged_checkpoints_end_in_clean_errors(name, tmp_path):
  """125 damaged files of each layout; some of the changes do no harm."""
  whole, path, rng = (FIXTURES / 'torch_formats' / name).read_bytes(), tmp_path / name, random.Random(0)
  errors = 0
  for _ in range(125):
    data = bytearray(whole)
    match rng.randrange(3):
      case 0:
        data = data[: rng.randrange(len(data))]
      case 1:
        for _ in range(rng.randrange(1, 8)):
          data[rng.randrange(len(data))] = rng.randrange(256)
      case 2:
        start = rng.randrange(len(data))
        data[start : start + rng.randrange(1, 200)] = rng.randbytes(rng.randrange(200))
    path.write_bytes(data)
    try:
      for tensor in torch_file.flat(torch_file.load(path)).values():
        tensor.numpy()
    except ValueError as e:
      errors += 1
      assert len(str(e).splitlines()) == 1
  assert errors > 60


def test_tensors_stay_inside_their_storage():
  storage = torch_file.Storage('f4', 4)
  for offset, shape, strides in ((2, (3,), (1,)), (-1, (1,), (1,)), (0, (2, 2), (3, 1)), (0, (2,), (-1,))):
    with pytest.raises((ValueError, torch_file.Refused)):
      torch_file.Tensor(storage, offset, shape, strides)
  assert struct.calcsize('<q') == 8
