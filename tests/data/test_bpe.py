"""Laws of the tokenizer: any text survives, training and dropout are functions of what is given, padding is its own."""

import json
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest

from dalle_jax.data import bpe
from dalle_jax.data.sources import shapes

TEXTS = (
  'a small red circle at the top',
  'Zürich, 東京 and Ελλάδα',
  'tabs\tand\nlines  twice',
  "don't stop, 12 of 3!",
  '🙂🚀 family 👨‍👩‍👧',
  'e\u0301 combining, \u200d joiner, \x00 zero',
)


@pytest.fixture(scope='module')
def captions():
  source = shapes.load('train')
  return [source[i]['caption'] for i in range(300)]


@pytest.fixture(scope='module')
def words(captions):
  return bpe.train(captions, 320)


def test_any_text_survives_in_lower_case(words):
  for text in TEXTS:
    ids = words.encode(text)
    assert all(0 <= i < words.vocab_size for i in ids)
    assert words.decode(ids) == text.lower()
  assert words.encode('A RED Ball') == words.encode('a red ball')
  assert words.encode('') == words.encode('  ') == [] and words.decode([]) == ''


def test_training_merges_and_tells_the_true_size(words, captions):
  assert words.vocab_size == 320
  assert len(words.encode(captions[0])) < len(captions[0]) / 2
  assert 256 < bpe.train(['a ball', 'a ball'], 5000).vocab_size < 270


def test_the_same_captions_give_the_same_bytes(words, captions):
  assert bpe.train(iter(captions), 320).to_json() == words.to_json()
  # Another process has other hash seeds and another order of threads.
  script = (
    'import sys; from dalle_jax.data import bpe; from dalle_jax.data.sources import shapes; s = shapes.load("train"); '
    'sys.stdout.write(bpe.train([s[i]["caption"] for i in range(300)], 320).to_json())'
  )
  other = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True)
  assert other.stdout == words.to_json()


def test_json_file_and_pickle_round_trips(words, tmp_path):
  (tmp_path / 'words.json').write_text(words.to_json(), encoding='utf-8')
  for other in (
    bpe.BPE(words.to_json()),
    bpe.BPE.load(tmp_path / 'words.json'),
    pickle.loads(pickle.dumps(words)),
  ):
    assert other.to_json() == words.to_json() and other.vocab_size == words.vocab_size
    assert [other.encode(t) for t in TEXTS] == [words.encode(t) for t in TEXTS]


def test_our_merges_without_dropout_equal_the_library(words, captions):
  for text in (*captions, *TEXTS):
    # So small a chance that no merge is ever skipped, yet the merges are ours.
    assert words.encode(text, dropout=1e-300, seed=1) == words.encode(text)
  assert (
    words.encode(captions[0], dropout=0.0, seed=1)
    == words.encode(captions[0], dropout=0.5)
    == words.encode(captions[0])
  )


def test_dropout_is_a_function_of_the_seed_and_keeps_the_text(words, captions):
  text = captions[0]
  variants = [tuple(words.encode(text, 0.3, seed)) for seed in range(30)]
  assert variants == [tuple(pickle.loads(pickle.dumps(words)).encode(text, 0.3, seed)) for seed in range(30)]
  assert len(set(variants)) > 15
  assert all(words.decode(v) == text for v in variants)
  assert len(words.encode(text, 1.0, 0)) == len(text.encode()) + 1  # every merge skipped: bytes, and the first space
  mean = lambda p: np.mean([len(words.encode(c, p, 1)) for c in captions])
  assert mean(1e-300) < mean(0.1) < mean(0.3) < mean(0.9)


def test_dropout_has_the_published_distribution():
  # One merge, 'a' 'b': it happens with probability 1 - p, on a text without a second chance.
  words = bpe.train(['xaby'] * 3, 257)
  _, merges, _ = words._read_model()
  assert len(merges) == 1
  rng = random.Random(0)
  pair, (_, new) = next(iter(merges.items()))
  share = np.mean([bpe._merge(list(pair), merges, 0.25, rng) == [new] for _ in range(4000)])
  assert abs(share - 0.75) < 0.03


def test_text_encoder_pads_each_position_with_its_own_id_and_truncates(words):
  encoder = bpe.TextEncoder(words, 12, 0.1)
  v = words.vocab_size
  ids = words.encode('a red circle')
  text = encoder('a red circle')
  assert text.dtype == np.int32 and text.shape == (12,)
  assert list(text) == ids + [v + i for i in range(len(ids), 12)]
  assert list(encoder('')) == [v + i for i in range(12)]
  assert words.decode(text) == 'a red circle' and words.decode(encoder('')) == ''
  assert list(encoder('circle ' * 50)) == words.encode('circle ' * 50)[:12]
  np.testing.assert_array_equal(encoder('a red circle', 5), encoder('a red circle', 5))
  assert len({encoder('a red circle', s).tobytes() for s in range(30)}) > 3
  np.testing.assert_array_equal(bpe.TextEncoder(words, 12, 0.0)('a red circle', 5), text)
  np.testing.assert_array_equal(pickle.loads(pickle.dumps(encoder))('a red circle', 5), encoder('a red circle', 5))


def test_start_and_end_take_their_part_of_the_length(words):
  encoder = bpe.TextEncoder(words, 6, start=1, end=2)
  ids = words.encode('a red circle at the top')
  assert encoder.capacity == 4 < len(ids) and bpe.TextEncoder(words, 6).capacity == 6
  assert list(encoder('a red circle at the top')) == [1, *ids[:4], 2]
  with pytest.raises(ValueError, match='length is 2; expected 1 or more tokens'):
    bpe.TextEncoder(words, 2, start=1, end=2)


def test_a_blank_is_padding_wherever_it_is(words):
  ids, v = words.encode('a red circle at the top'), words.vocab_size
  encoder = bpe.TextEncoder(words, len(ids) + 1, blank=ids[1])
  expected = [v + i if token == ids[1] else token for i, token in enumerate(ids)] + [v + len(ids)]
  assert list(encoder('a red circle at the top')) == expected


def test_a_library_tokenizer_with_padding_and_special_tokens_is_taken_bare():
  from tokenizers import Tokenizer, models, pre_tokenizers

  other = Tokenizer(models.WordLevel({'[UNK]': 0, 'red': 1, 'ball': 2}, unk_token='[UNK]'))
  other.pre_tokenizer = pre_tokenizers.Whitespace()
  other.enable_padding(length=9)
  other.enable_truncation(1)
  words = bpe.BPE(other.to_str())
  assert words.encode('red ball blue') == [1, 2, 0]
  with pytest.raises(ValueError, match=r'dropout needs a byte-level BPE.*dropout=0\.0'):
    words.encode('red', 0.1, 0)


def test_a_dropout_of_the_library_is_not_applied_as_it_has_no_seed(words, captions):
  json_with = json.loads(words.to_json())
  json_with['model']['dropout'] = 0.5
  other = bpe.BPE(json.dumps(json_with))
  for caption in captions[:20]:
    assert other.encode(caption) == pickle.loads(pickle.dumps(other)).encode(caption) == words.encode(caption)


def test_ids_that_are_left_out_are_never_padding(words):
  spread = json.loads(words.to_json())
  last = max(spread['model']['vocab'], key=spread['model']['vocab'].get)
  spread['model']['vocab'][last] += 50
  gaps = bpe.BPE(json.dumps(spread))
  assert (words.vocab_size, gaps.vocab_size) == (len(spread['model']['vocab']), words.vocab_size + 50)
  assert bpe.TextEncoder(gaps, 4)('').min() == gaps.vocab_size
  with pytest.raises(ValueError, match='leaves out ids'):
    gaps.add(['pip'])


def test_added_words_are_one_token_each_and_counted_when_new(words):
  grown = words.add(['Pororo', 'pip', 'red', 'pip'])  # 'red' is a token already
  assert grown.vocab_size == words.vocab_size + 2 and grown.add(['pip', 'PORORO']).vocab_size == grown.vocab_size
  ids = grown.encode('Pip, pororo and pipe')
  assert ids[0] == words.vocab_size + 1 and words.vocab_size in ids and ids.count(ids[0]) == 1  # not in 'pipe'
  assert [i for i in ids if i < words.vocab_size] == words.encode(',') + words.encode('and pipe')
  assert grown.decode(grown.encode('a red circle pip meets pororo')) == 'a red circle pip meets pororo'
  again = bpe.BPE(grown.to_json())
  for text in ('pip', 'a red pip at the top', 'PIP pip', 'pippip pip.'):
    assert again.encode(text) == grown.encode(text) == grown.encode(text, 1e-9, 3)
  dropped = grown.encode('a red circle pip', 1.0, 0)
  assert dropped[-1] == words.vocab_size + 1 and len(dropped) > 6
  with pytest.raises(ValueError, match=r"new_tokens has \['two words', ''\]; expected single words"):
    words.add(['ok', 'two words', ''])


@pytest.mark.parametrize('dropout', [0.0, 0.5])
def test_a_lone_surrogate_is_refused_by_encode_and_left_out_of_training(words, captions, dropout):
  with pytest.raises(ValueError, match=r"the text 'a cat \\ud83d' has a lone surrogate"):
    words.encode('a cat \ud83d', dropout, seed=0)
  assert bpe.train(['b \ud83d', *captions], 320).to_json() == words.to_json()


def test_errors_are_one_line(words, tmp_path):
  for call, message in (
    (lambda: bpe.train(['a'], 255), 'vocab_size is 255'),
    (lambda: bpe.train([], 300), 'no captions'),
    (lambda: bpe.train(['', ' '], 300), 'no captions'),
    (lambda: bpe.BPE('{}'), 'not a tokenizer JSON'),
    (lambda: words.add([1, 'pip']), r'tokenizer.new_tokens has \[1\]'),
    (lambda: bpe.TextEncoder(words, 0), 'length is 0'),
    (lambda: bpe.TextEncoder(words, 4, 1.5), 'dropout is 1.5'),
  ):
    with pytest.raises(ValueError, match=message) as e:
      call()
    assert '\n' not in str(e.value)
  with pytest.raises(FileNotFoundError, match='no tokenizer file'):
    bpe.BPE.load(tmp_path / 'missing.json')
  for content, message in ((b'{"caf\xe9": 1}', "'utf-8' codec can't decode"), (b'{}', 'this is not a tokenizer JSON')):
    (tmp_path / 'words.json').write_bytes(content)
    with pytest.raises(ValueError, match=rf'the tokenizer file {tmp_path}/words.json cannot be read: {message}') as e:
      bpe.BPE.load(tmp_path / 'words.json')
    assert '\n' not in str(e.value)
