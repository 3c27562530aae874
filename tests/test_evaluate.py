"""The evaluation script from end to end, with runs of random parameters: what it writes, counts, and refuses."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import types

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import evaluate
from dalle_jax.data import bpe, sources
from dalle_jax.data.sources import pororo, shapes, story_shapes
from dalle_jax.data.sources.folder import Folder
from dalle_jax.evals import fid
from dalle_jax.evals.oracle import ATTRIBUTES, COLUMNS, Oracle, score_moments
from dalle_jax.models import classifier, clip, dalle, inception, lpips, story_dalle, vqgan
from dalle_jax.pipelines.dalle import DallE
from dalle_jax.pipelines.image_tokenizer import ImageTokenizer
from dalle_jax.pipelines.rerank import Reranker
from dalle_jax.pipelines.story_dalle import StoryDallE
from dalle_jax.training import checkpoint
from tests import runs
from tests.data.test_story_sources import CLIPS, write_pororo, write_pororo_tables

SIZE, TOKENIZER = 24, dict(length=6)
SOURCE = story_shapes.load('test_seen', image_size=SIZE)
WORDS = bpe.train((c for k in range(20) for c in SOURCE.captions(k)), 280)
TOKENIZER['vocab_size'] = WORDS.vocab_size


def write(path, kind, model, config, *inputs, **options):
  runs.write(path, kind, model, {'tokenizer': TOKENIZER, **config}, *inputs, words=WORDS, **options)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp('runs')
  picture, text = np.zeros((1, SIZE, SIZE, 3), np.float32), np.zeros((1, 1, 6), np.int32)
  data = {'image_size': SIZE, 'path': '', 'source': 'story_shapes', 'source_args': {'image_size': SIZE, 'count': 50}}

  # 4 x 4 codes of 16, one level of convolutions, and two layers over the codes: programs that compile quickly
  fields = dict(variant='test', image_size=SIZE, patch=6, ch_mult=(1,), attn_resolutions=())
  write(root / 'lpips', 'lpips', lpips.build('test'), {'model': {'variant': 'test'}}, picture, picture)
  write(root / 'vqgan', 'vqgan', vqgan.build(**fields), {'model': fields, 'data': data}, picture, frozen=['lpips'])
  c = {'model': {'variant': 'test'}, 'data': data, 'tokenizer': TOKENIZER}
  write(root / 'clip', 'clip', clip.of_run(c), c, picture, text[0])
  c = {'model': {'variant': 'test', 'labels': 9}, 'data': data}
  write(root / 'classifier', 'classifier', classifier.of_run(c), c, picture)

  shallow = {'variant': 'test', 'depth': 2}
  model = story_dalle.build(**shallow, text_vocab=WORDS.vocab_size + 6)
  codes = np.zeros((1, 1, 16), np.int32)
  pororo = {**data, 'source': 'pororo', 'source_args': {'seed': 1}}
  for name, source in (('story', data), ('pororo', pororo), ('imported', {'image_size': SIZE})):
    c = {'model': shallow, 'data': source}
    write(root / name, 'story_dalle', model, c, text, codes, codes[0], frozen=['vqgan'], players=True)

  data = {**data, 'source': 'shapes', 'source_args': {'image_size': SIZE, 'count': 50}}
  c = {'model': shallow, 'data': data}
  sizes = dict(text_vocab=WORDS.vocab_size + 6, text_length=6, image_vocab=16, grid=(4, 4))
  write(root / 'dalle', 'dalle', dalle.build(**shallow, **sizes), c, text[0], codes[0], frozen=['vqgan'])
  c = {'model': {'variant': 'test'}}
  write(root / 'inception', 'inception', inception.of_run(c), c, picture)
  return root


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch):
  """A batch is filled up, and through Inception-v3 each picture takes its time."""
  monkeypatch.setattr(fid, 'BATCH', 8)


loaded = functools.cache(checkpoint.load_run)


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
  """The runs are the same for all tests, so each is read once in the same way."""
  monkeypatch.setattr(checkpoint, 'load_run', loaded)


@pytest.fixture
def run(tmp_path):
  return lambda *arguments: runs.call(evaluate, '--out', tmp_path / 'out', *arguments)


def read(tmp_path):
  return [json.loads((tmp_path / 'out' / f'{name}.json').read_text()) for name in ('predictions', 'metrics')]


def picture(tmp_path, row):
  return np.asarray(Image.open(tmp_path / 'out' / row['file']))


def test_procedural_stories_by_oracle_and_clip(root, run, tmp_path):
  flags = ['--split', 'test_seen', '--count', 3, '--n', 2, '--batch_size', 16, '--seed', 4, '--top_k', 5]
  assert run('--run', root / 'story', '--clip', root / 'clip', *flags) == 0
  rows, metrics = read(tmp_path)
  assert [(r['index'], r['frame']) for r in rows] == [(k, t) for k in range(3) for t in range(1, 5)]
  assert rows[5]['caption'] == SOURCE.captions(1)[2] and rows[5]['record'] == SOURCE.name(1)
  assert {p.name for p in (tmp_path / 'out' / 'pictures').iterdir()} == {
    f'0000{k}_{t}.png' for k, t in np.ndindex(3, 5) if t
  }

  # The frames are those of the pipeline for this seed, the best of two by CLIP, whatever they were drawn beside.
  model = StoryDallE.load(root / 'story', clip=root / 'clip')
  firsts, told = np.stack([SOURCE[k].frames[0] for k in (1, 2)]), [SOURCE.captions(k)[1:] for k in (1, 2)]
  samples = model.continue_stories(firsts, told, n=2, seed=4, top_k=5, batch_size=16)
  drawn = np.stack([picture(tmp_path, r) for r in rows])
  np.testing.assert_allclose(drawn[4:].astype(int), np.concatenate([s.frames[:, 0] for s in samples]), atol=1)
  assert [r['candidate'] for r in rows[4:]] == [int(c) for s in samples for c in s.candidates[:, 0]]
  assert metrics['clip_score'] == pytest.approx(np.mean([r['clip_score'] for r in rows]))

  moments = [m for k in range(3) for m in SOURCE.moments(k)[1:]]
  right = score_moments(Oracle(SIZE, accessories=True), drawn, moments)
  assert {c: metrics[c] for c in COLUMNS} == {c: float(right[c].mean()) for c in COLUMNS}
  silent = [m.silent for m in moments]
  assert metrics['silent_frames'] == sum(silent) > 0
  assert metrics['setting_silent'] == float(right['setting'][silent].mean())

  network, true = fid.FeatureExtractor.load(root / 'clip'), np.concatenate([SOURCE[k].frames[1:] for k in range(3)])
  sets = fid.FeatureSet(network), fid.FeatureSet(network)
  sets[0].add(drawn), sets[1].add(true)
  expected = fid.report(*sets)
  assert metrics['fid'] == pytest.approx(expected['fid'], abs=1e-6) and metrics['fid'] > 0
  assert metrics['fid_reference_sha256'] == expected['fid_reference_sha256']
  assert metrics['fid_network'] == {'kind': 'clip', 'run': str(root / 'clip'), 'step': 3, 'sha256': network.sha256}
  settings = metrics['settings']
  assert (settings['run'], settings['step'], settings['seed'], settings['count']) == (str(root / 'story'), 3, 4, 3)
  assert metrics['records'] == 3
  assert metrics['skipped'] == 0 and Image.open(tmp_path / 'out' / 'grid.png').height > 3 * SIZE


def test_labelled_stories_by_a_classifier_with_a_broken_one(root, run, tmp_path, capsys):
  folder = write_pororo(tmp_path / 'pororo')
  write_pororo_tables(folder)
  (folder / CLIPS[10]).unlink()  # the last frame of the second story
  assert run('--run', root / 'pororo', '--path', folder, '--classifier', root / 'classifier', '--resize', 8) == 0
  rows, metrics = read(tmp_path)
  assert [r['caption'] for r in rows] == [f'clip {k}.' for k in range(6, 10)]
  assert [r['labels'] for r in rows] == [[pororo.CHARACTERS[k % 9]] for k in range(6, 10)]
  assert metrics['skipped'] == 1 and 'ep1/10.png is missing' in metrics['skipped_records'][0]
  out = capsys.readouterr().out
  assert f'skipped {CLIPS[6]}: FileNotFoundError' in out and 'FID of 4 and 4 images with 8 features' in out
  assert (metrics['records'], metrics['pictures'], metrics['fid_resize']) == (1, 4, 8)
  assert metrics['fid_network']['kind'] == 'classifier' and 'caption' not in metrics and 'clip_score' not in metrics

  network = fid.FeatureExtractor.load(root / 'classifier')
  found = network.labels(np.stack([picture(tmp_path, r) for r in rows]))
  assert [r['labels_drawn'] for r in rows] == [
    [n for n, f in zip(pororo.CHARACTERS, x, strict=True) if f] for x in found
  ]
  true = np.eye(9, dtype=bool)[[6, 7, 8, 0]]
  assert metrics['characters_drawn']['frame_accuracy'] == float((found == true).all(1).mean())
  assert metrics['characters_drawn']['f1_micro'] == pytest.approx(2 * (found & true).sum() / (found.sum() + 4))
  assert set(metrics['characters_true']['f1']) == set(pororo.CHARACTERS)


def test_captions_by_oracle_clip_and_inception(root, run, tmp_path):
  source = shapes.load('val', image_size=SIZE, count=50)
  flags = ['--split', 'val', '--count', 5, '--n', 2, '--batch_size', 4, '--seed', 4, '--inception', root / 'inception']
  assert run('--run', root / 'dalle', '--clip', root / 'clip', *flags) == 0
  rows, metrics = read(tmp_path)
  assert [r['caption'] for r in rows] == [source[k]['caption'] for k in range(5)]
  drawn = np.stack([picture(tmp_path, r) for r in rows])
  samples = DallE.load(root / 'dalle', clip=root / 'clip').sample([r['caption'] for r in rows], n=2, seed=4)
  np.testing.assert_allclose(drawn.astype(int), np.stack([s.images[0] for s in samples]), atol=1)
  assert [r['candidate'] for r in rows] == [int(s.candidates[0]) for s in samples]
  assert metrics['clip_score'] == pytest.approx(np.mean([s.scores[0] for s in samples]), abs=1e-4)
  true = np.stack([source[k]['image'] for k in range(5)])
  scores = Reranker.load(root / 'clip').scores([r['caption'] for r in rows], true[:, None])
  assert metrics['clip_score_true'] == pytest.approx(scores.mean(), abs=1e-4)
  right = Oracle(SIZE).score(drawn, [source.scene(k) for k in range(5)])
  assert {a: metrics[a] for a in (*ATTRIBUTES, 'all')} == {a: float(v.mean()) for a, v in right.items()}
  assert metrics['settings']['count'] == 5 and metrics['count'] <= 1  # the flag, and the oracle's column
  assert metrics['fid_network']['kind'] == 'inception' and metrics['fid_features'] == 128 and metrics['fid'] > 0
  assert Image.open(tmp_path / 'out' / 'grid.png').height > 5 * SIZE


def test_records_of_one_caption_get_pictures_of_their_own(root, run, tmp_path):
  folder, rng = tmp_path / 'pictures', np.random.default_rng(0)
  folder.mkdir()
  for name, caption in (('a', 'snow'), ('b', 'snow'), ('c', 'sand'), ('d', ''), ('e', 'snow'), ('f', ' ')):
    Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(folder / f'{name}.png')
    (folder / f'{name}.txt').write_text(caption)
  flags = ['--split', 'all', '--source', 'folder', '--path', folder, '--batch_size', 3]
  for count in (0, 2):  # the second leaves nothing of the first
    assert run('--run', root / 'dalle', *flags, '--count', count) == 0
    files = {p.name for p in (tmp_path / 'out' / 'pictures').iterdir()}
    assert files == ({'00000.png', '00001.png', '00002.png', '00004.png'} if not count else {'00000.png', '00001.png'})
  assert run('--run', root / 'dalle', *flags, '--save_true') == 0
  assert run('--run', root / 'dalle', *flags, '--temperature', -1) == 2  # and leaves the one before
  assert not list(tmp_path.glob('out.*'))  # nothing of what it began
  true = np.asarray(Image.open(tmp_path / 'out' / 'true' / '00001.png'))
  np.testing.assert_array_equal(true, np.asarray(Image.open(folder / 'b.png')))
  rows, metrics = read(tmp_path)
  assert len(rows) == metrics['records'] == 4 and metrics['skipped'] == 2
  assert not {'fid', 'all', 'clip_score'} & set(metrics)
  assert [r['candidate'] for r in rows] == [0, 1, 0, 2]
  drawn = DallE.load(root / 'dalle').sample(['snow'], n=3)[0].images
  snow = np.stack([picture(tmp_path, r) for r in rows if r['caption'] == 'snow'])
  np.testing.assert_allclose(snow.astype(int), drawn, atol=1)
  assert len(np.unique(snow, axis=0)) == 3


def test_frames_of_stories_for_a_model_of_pictures(root, run, tmp_path):
  folder = write_pororo(tmp_path / 'pororo')
  write_pororo_tables(folder)
  flags = ['--source', 'pororo', '--path', folder, '--classifier', root / 'classifier', '--batch_size', 4]
  frames = pororo.load('test', path=str(folder), unit='frame')
  labels = [[n for n, there in zip(pororo.CHARACTERS, frames[k]['labels'], strict=True) if there] for k in range(10)]
  for name in ('dalle', 'vqgan'):
    assert run('--run', root / name, *flags) == 0
    rows, metrics = read(tmp_path)
    assert metrics['records'] == metrics['pictures'] == 10 and rows[3]['record'].endswith('frame 3')
    assert [r['labels'] for r in rows] == labels
    assert 0 <= metrics['characters_drawn']['f1_micro'] <= 1


def test_reconstructions_of_frames(root, run, tmp_path):
  flags = ['--split', 'test_seen', '--count', 7, '--batch_size', 2, '--lpips', root / 'lpips']
  assert run('--run', root / 'vqgan', '--clip', root / 'clip', *flags, '--save_true') == 0
  rows, metrics = read(tmp_path)
  true = np.concatenate([np.stack(SOURCE[k].frames) for k in range(2)])[:7]
  assert (metrics['records'], metrics['pictures'], metrics['fid_pictures']) == (7, 7, [7, 7])
  saved, before = tmp_path / 'true.npz', metrics
  shutil.copy(tmp_path / 'out' / 'true.npz', saved)
  assert run('--run', root / 'vqgan', '--clip', root / 'clip', *flags, '--fid_reference', saved) == 0
  rows, metrics = read(tmp_path)
  assert metrics['fid'] == pytest.approx(before['fid'], rel=1e-6) and metrics['fid_pictures'] == [7, 7]
  assert metrics['fid_reference_sha256'] == before['fid_reference_sha256']
  assert rows[6]['file'] == 'pictures/00006.png' and rows[6]['record'].endswith('frame 1')

  model = ImageTokenizer.load(root / 'vqgan')
  tokens, drawn = model.encode(true), np.stack([picture(tmp_path, r) for r in rows])
  np.testing.assert_array_equal(model.reconstruct(true), model.decode(tokens))
  np.testing.assert_allclose(drawn.astype(int), model.decode(tokens), atol=1)  # drawn in batches of another size
  error = drawn.astype(float) - true
  assert metrics['l1'] == pytest.approx(np.abs(error).mean() / 127.5, abs=1e-3)
  assert metrics['psnr'] == pytest.approx(np.mean(-10 * np.log10(np.square(error / 255).mean((1, 2, 3)))), abs=1e-3)
  assert (
    metrics['lpips_network']['run'] == str(root / 'lpips')
    and np.isfinite(metrics['lpips'])
    and rows[0]['lpips'] != rows[1]['lpips']
  )
  counts = np.bincount(tokens.ravel(), minlength=16)
  assert metrics['codes_used'] == (counts > 0).mean() and 1 <= metrics['codes_perplexity'] <= (counts > 0).sum()
  scenes = [m.scene for k in range(2) for m in SOURCE.moments(k)][:7]
  right = Oracle(SIZE, accessories=True).score(drawn, scenes)
  assert {a: metrics[a] for a in (*ATTRIBUTES, 'all')} == {a: float(v.mean()) for a, v in right.items()}

  flags = ['--split', 'test', '--source', 'shapes', '--source_arg', 'max_objects=9', '--image_size', 48, '--count', 3]
  assert run('--run', root / 'vqgan', *flags) == 0
  rows, metrics = read(tmp_path)
  assert picture(tmp_path, rows[2]).shape == (48, 48, 3)
  assert metrics['lpips_network'] == {'run': str(root / 'vqgan' / 'frozen' / 'lpips'), 'step': 3}  # its own
  with pytest.raises(ValueError, match=r'image tokens range from 1 to 16; expected 0 to 15'):
    model.decode(np.arange(1, 17)[None])
  files = [tmp_path / 'out' / row['file'] for row in rows]
  np.testing.assert_array_equal(model.encode(files), model.encode([Image.open(f) for f in files]))
  with pytest.raises(ValueError, match='images are a str; expected uint8'):
    model.encode('a.png')
  with pytest.raises(ValueError, match=r'image tokens are float64\[1, 16\]; expected int32'):
    model.decode(np.zeros((1, 16)))
  one = ['--split', 'test_seen', '--count', 1, '--save_true']
  assert run('--run', root / 'vqgan', '--clip', root / 'clip', *one) == 0  # too few for a FID
  assert not (tmp_path / 'out' / 'true.npz').exists()


def test_the_coco_recipe_makes_a_folder_of_captioned_images(tmp_path, monkeypatch):
  (recipe,) = re.findall(r'```python\n(.*?)```', (runs.ROOT / 'docs' / 'evaluation.md').read_text(), re.DOTALL)
  monkeypatch.chdir(tmp_path)
  for name in ('annotations', 'val2014'):
    (tmp_path / 'COCO' / name).mkdir(parents=True)
  images = [{'id': k, 'file_name': f'COCO_val2014_{k:012d}.jpg'} for k in range(5)]
  for image in images:
    Image.new('L', (9, 8), image['id']).save(f'COCO/val2014/{image["file_name"]}')
  captions = [{'image_id': k % 5, 'caption': f'caption {k}\nof {k % 5}. '} for k in range(10)]
  with open('COCO/annotations/captions_val2014.json', 'w') as file:
    json.dump({'images': images, 'annotations': captions}, file)
  exec(recipe.replace('30_000', '4'))
  source = sources.load(ConfigDict(dict(source='folder', path='COCO/fid', source_args={})), 'all')
  assert len(source) == 4
  for k in range(4):
    (caption,) = source[k]['captions']
    assert caption.endswith(f'of {int(source.images[k][-8:-4])}.')


def test_retrieval_by_a_clip(root, run, tmp_path):
  folder, rng = tmp_path / 'pictures', np.random.default_rng(0)
  folder.mkdir()
  captions = ['snow', 'sand', 'snow', '', 'two moons', 'a red ring', 'grass']
  for name, caption in zip('abcdefg', captions, strict=True):
    Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(folder / f'{name}.png')
    (folder / f'{name}.txt').write_text(caption)
  flags = ['--split', 'all', '--source', 'folder', '--path', folder, '--batch_size', 4]
  assert run('--run', root / 'clip', *flags) == 0
  assert {p.name for p in (tmp_path / 'out').iterdir()} == {'grid.png', 'metrics.json', 'predictions.json'}
  rows, metrics = read(tmp_path)
  usable = [0, 1, 2, 4, 5, 6]
  assert [r['index'] for r in rows] == usable and [r['caption'] for r in rows] == [captions[k] for k in usable]
  assert (metrics['records'], metrics['captions'], metrics['skipped']) == (6, 5, 1)

  true = np.stack([np.asarray(Image.open(folder / f'{"abcdefg"[k]}.png')) for k in usable])
  texts = [captions[k] for k in usable]
  scores = Reranker.load(root / 'clip').scores(texts, np.broadcast_to(true, (6, *true.shape)))  # caption, image
  np.testing.assert_allclose([r['clip_score_true'] for r in rows], np.diag(scores), atol=1e-4)
  order = np.argsort(-scores, axis=1)
  assert [r['nearest_images'] for r in rows] == [[usable[k] for k in line[:5]] for line in order]
  for direction, table in (('text_to_image', scores), ('image_to_text', scores.T)):
    ranked = [[texts[k] for k in np.argsort(-line)] for line in table]
    expected = [line.index(text) + 1 for line, text in zip(ranked, texts, strict=True)]
    assert [r[f'{direction}_rank'] for r in rows] == expected and len(set(expected)) > 1
    for k in (1, 5, 10):
      assert metrics[f'{direction}_R@{k}'] == pytest.approx(np.mean(np.array(expected) <= k))
  # Six rows of the image of a caption and the five nearest ones
  assert Image.open(tmp_path / 'out' / 'grid.png').width > 6 * SIZE
  assert metrics['settings']['run'] == str(root / 'clip') and metrics['settings']['step'] == 3


def test_sigterm_leaves_nothing_behind(root, tmp_path, run, monkeypatch, capsys):
  monkeypatch.setattr(evaluate.Evaluation, 'records', lambda *_: signal.raise_signal(signal.SIGTERM))
  assert run('--run', root / 'vqgan', '--split', 'val') == 143
  assert not list(tmp_path.iterdir())
  assert capsys.readouterr().err == 'stopped; nothing of this evaluation is kept.\n'


def test_a_record_with_a_broken_caption_says_why_and_is_read_once(root, tmp_path, run, monkeypatch, capsys):
  indices, read_record = [], Folder.__getitem__
  monkeypatch.setattr(Folder, '__getitem__', lambda self, k: indices.append(k) or read_record(self, k))
  Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
  (tmp_path / 'a.txt').write_bytes(b'\xff\xfe')
  assert run('--run', root / 'clip', '--source', 'folder', '--path', tmp_path, '--split', 'all') == 2
  assert 'a.txt is not UTF-8' in capsys.readouterr().err and indices == [0]


def test_processes_compare_what_they_read_to_the_end(root, run, monkeypatch):
  """One that can read fewer records must not end while the others wait for it."""
  compared = []
  monkeypatch.setattr(evaluate.distributed, 'check_same', lambda facts: compared.extend(facts.items()))
  assert run('--run', root / 'vqgan', '--split', 'test_seen', '--count', 3, '--batch_size', 2) == 0
  assert [v for k, v in compared if k == 'records that can be read'] == ['[0, 1]', '[2]', '[]']


def test_damaged_networks_that_score_are_refused_at_once(root, run, tmp_path, capsys):
  for kind, asked, message in (
    ('clip', ['--run', root / 'dalle', '--inception', root / 'inception'], 'some values of clip_score, '),
    ('lpips', ['--run', root / 'vqgan'], 'some values of lpips are not finite'),
  ):
    damaged = checkpoint.load_run(root / kind)
    params = jax.tree.map(lambda x: x * np.nan, damaged.params)
    checkpoint.export_run(tmp_path / kind, dataclasses.replace(damaged, params=params))
    assert run('--split', 'val', '--count', 3, f'--{kind}', tmp_path / kind, *asked) == 2
    err = capsys.readouterr().err
    assert message in err and err.splitlines()[-1].endswith('the network that computes them is damaged.')
    assert not (tmp_path / 'out').exists()


def test_what_a_killed_evaluation_left_is_not_in_the_way(root, run, tmp_path):
  """In a container every run may have the same pid."""
  (tmp_path / f'out.{os.getpid()}.partial').mkdir()
  assert run('--run', root / 'vqgan', '--split', 'test_seen', '--count', 2) == 0
  assert (tmp_path / 'out' / 'metrics.json').exists()


def test_an_evaluation_does_not_replace_what_it_reads(tmp_path, run, monkeypatch, capsys):
  (true := tmp_path / 'out' / 'true').mkdir(parents=True)
  for path in (true / 'a.png', saved := tmp_path / 'out' / 'true.npz', tmp_path / 'out' / 'predictions.json'):
    path.touch()
  (link := tmp_path / 'link').symlink_to(true)
  monkeypatch.setattr(evaluate, 'load', lambda _: pytest.fail('loaded'))
  monkeypatch.setenv('HOME', str(tmp_path))
  fid_flags = ['--run', 'RUN', '--clip', 'CLIP', '--fid_reference']
  for *flags, name, path in (
    [*fid_flags, saved],
    ['--run', 'RUN', '--source', 'folder', '--path', true],
    ['--run', 'RUN', '--path', link],
    ['--run', 'RUN', '--path', tmp_path / 'out'],
    ['--run', true],
    ['--run', 'RUN', '--upsampler', 'RUN', '--upsampler', true],
    ['--run', 'RUN', '--path', '~/out/true'],
  ):
    assert run(*flags, name, path) == 2
    lost = f'--out {tmp_path}/out holds {name} {path}, which it would replace; give another directory with --out.'
    assert capsys.readouterr().err == f'error: {lost}\n'

  (tmp_path / 'own').mkdir()
  (tmp_path / 'own' / 'thesis.tex').touch()
  assert run('--run', 'RUN', '--out', '~/own') == 2
  assert f'--out {tmp_path}/own holds other things than an evaluation' in capsys.readouterr().err

  data = {'source': 'folder', 'path': str(true)}  # those of training
  model = types.SimpleNamespace(config={'data': data})
  monkeypatch.setattr(evaluate, 'load', lambda _: (model, None))
  assert run('--run', tmp_path / 'out' / 'no_path') == 2
  assert f'holds the data {true}, which it would replace' in capsys.readouterr().err


def test_mistakes_are_one_line(root, run, tmp_path, capsys):
  folder = write_pororo(tmp_path / 'pororo')
  write_pororo_tables(folder)
  story, other = ['--run', root / 'story', '--split', 'test_seen'], tmp_path / 'other.npz'
  (one := tmp_path / 'one').mkdir()
  Image.new('RGB', (8, 8)).save(one / 'a.png')
  np.savez(other, mu=np.zeros(3), sigma=np.eye(3))
  for arguments, message in (
    ([], 'give --run RUN_DIR'),
    (['--run', tmp_path / 'nowhere'], 'has no checkpoints'),
    (['--run', root / 'classifier'], "is a run of 'classifier', which generates no images from captions"),
    (['--run', root / 'clip', '--n', 2, '--top_k', 5], 'is a CLIP, which makes no images; leave out --n, --top_k'),
    (['--run', root / 'clip', '--clip', root / 'clip', '--save_true'], 'leave out --clip, --save_true'),
    (['--run', root / 'clip', '--image_size', 8], '--image_size is for reconstructions by an image tokenizer'),
    (['--run', root / 'vqgan', '--top_k', 5], 'is an image tokenizer, which samples nothing; leave out --top_k'),
    (['--run', root / 'vqgan', '--image_size', 25], 'needs image sizes divisible by 6, not 25'),
    (['--run', root / 'dalle', '--lpips', root / 'lpips'], '--lpips is for reconstructions'),
    (['--run', root / 'dalle', '--fid_reference', 'true.npz'], '--fid_reference is for the FID; give --inception'),
    (
      ['--run', root / 'dalle', '--clip', root / 'clip', '--fid_reference', other],
      'comes from another network or another resize than',
    ),
    (['--run', root / 'vqgan', '--source', 'tokens'], 'the data source tokens has no images; give data that has'),
    (['--run', root / 'vqgan', '--source_arg', 'seed'], "--source_arg 'seed' is not understood; write NAME=VALUE"),
    (['--run', root / 'dalle', '--inception', root / 'clip'], f"--inception {root / 'clip'} is a run of 'clip'"),
    (
      ['--run', root / 'dalle', '--inception', root / 'inception', '--classifier', root / 'classifier'],
      '--classifier predicts labels, which the data does not have',
    ),
    ([*story, '--source', 'shapes', '--split', 'val'], 'record 0 is an image; expected a story'),
    ([*story, '--source_arg', 'count=abc'], "--source_arg count is 'abc'; expected a whole number"),
    ([*story, '--source', 'folder'], "the data source 'folder' needs path; set --path"),
    ([*story, '--resize', 8], '--resize is for the FID'),
    (
      ['--run', root / 'vqgan', '--split', 'val', '--out', one / 'a.png' / 'x'],
      f'--out {one}/a.png/x cannot be created',
    ),
    ([*story, '--out', root], 'holds other things than an evaluation (classifier, clip, dalle, imported,'),
    (['--run', root / 'vqgan', '--source', 'foo'], "--source 'foo' is unknown"),
    (['--run', root / 'vqgan', '--source', 'folder', '--path', 'no'], "--path 'no' is"),
    (['--run', root / 'vqgan', '--source', 'folder', '--path', one, '--split', 'no'], "split 'no'"),
    (['--run', root / 'vqgan', '--source', 'folder', '--path', one], "the split 'test' of 1"),
    ([*story, '--source', 'clevr_sv', '--path', one, '--split', 'val'], 'or --split test'),
    ([*story, '--source_arg', 'a.b=1'], "--source_arg 'a.b=1' is not understood"),
    ([*story, '--mesh', 'data=3'], 'set --mesh so that'),
    ([*story, '--mesh', 'data=2,data=4'], 'has an axis twice'),
    (
      ['--run', root / 'vqgan', '--split', 'val', '--clip', root / 'clip', '--inception', root / 'inception'],
      'an image tokenizer has no use for --clip in addition to --inception',
    ),
    ([*story, '--out', '.'], 'is a link, a mount or the current directory'),
    (['--run', root / 'vqgan', '--n', 2], 'is an image tokenizer, which samples nothing; leave out --n'),
    (['--run', root / 'vqgan', '--split', 'val', '--lpips', root / 'clip'], '--lpips takes an imported LPIPS'),
    ([*story, '--n', 2], '--n 2 needs --clip RUN_DIR'),
    ([*story, '--step', 7], 'has no checkpoint of step 7'),
    ([*story, '--path', folder], "the data source 'story_shapes' does not take path"),
    (['--run', root / 'imported'], 'was imported, without data; give them, e.g. --source folder'),
    (['--run', root / 'story'], "unknown split 'test'; expected one of train, val, test_seen, test_unseen"),
    ([*story, '--classifier', root / 'vqgan'], 'image features need one of inception, classifier, clip'),
    ([*story, 'more'], "arguments ['more'] are not understood"),
  ):
    assert run(*arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1 and 'config.' not in err, err  # in terms of flags
  for name in CLIPS[5:]:
    (folder / name).unlink()
  assert run('--run', root / 'imported', '--source', 'pororo', '--path', folder, '--int8') == 2
  assert f'none of 2 records is usable; {CLIPS[5]}: FileNotFoundError' in capsys.readouterr().err
