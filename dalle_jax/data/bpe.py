"""Byte-level BPE, trained on captions and stored as one JSON string, with dropout that is a function of a seed.

BPE dropout follows "BPE-Dropout: Simple and Effective Subword Regularization" (Provilkov et al., 2020). That of the
`tokenizers` library cannot be seeded, so with dropout the merges are done here; without it the library does them.
"""

import itertools
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

Merges = dict[tuple[int, int], tuple[int, int]]  # pair of ids -> (rank, id of both)
BYTES = 256  # entries that every byte-level vocabulary starts with, so that any text can be encoded
LONE_SURROGATE = re.compile('[\ud800-\udfff]')  # half of a UTF-16 pair, which JSON may contain; not valid Unicode


def train(captions: Iterable[str], vocab_size: int) -> 'BPE':
  """Trains a lower-casing byte-level BPE of at most `vocab_size` entries; a few captions give fewer.

  The same captions in the same order give the same tokenizer, byte for byte. Captions that are not valid Unicode are
  left out. Raises ValueError when no caption has any text or `vocab_size` is below 256.
  """
  if vocab_size < BYTES:
    raise ValueError(f'tokenizer.vocab_size is {vocab_size}; a byte-level BPE needs {BYTES} or more.')
  tokenizer = Tokenizer(models.BPE())
  tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Lowercase()])
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # the first word is encoded like any other
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    min_frequency=2,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    special_tokens=[],
    show_progress=False,
  )
  any_text = False

  def texts():
    nonlocal any_text
    for caption in captions:
      if LONE_SURROGATE.search(caption):
        continue
      any_text = any_text or bool(caption.strip())
      yield caption

  tokenizer.train_from_iterator(texts(), trainer)
  if not any_text:
    raise ValueError('the tokenizer has no captions to learn from; give the data set captions or set tokenizer.path.')
  return BPE(tokenizer.to_str())


class BPE:
  """A tokenizer in the JSON format of the `tokenizers` library: from `train`, or any tokenizer.json."""

  def __init__(self, json_str: str):
    """Raises ValueError when the string is not a tokenizer."""
    try:
      self._tokenizer = Tokenizer.from_str(json_str)
    except Exception as e:  # the library raises bare Exception
      raise ValueError(
        f'this is not a tokenizer JSON ({e}); expected what `BPE.to_json` or the `tokenizers` library writes.'
      ) from e
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    if getattr(self._tokenizer.model, 'dropout', None):
      self._tokenizer.model.dropout = None  # that of the library has no seed
    ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
    self._vocab_size, self._has_gaps = max(ids, default=-1) + 1, len(set(ids)) <= max(ids, default=-1)
    self._json = json_str
    # Read when it is first needed, by any of several threads.
    self._model: tuple[dict[str, int], Merges, dict[str, int]] | None = None

  @classmethod
  def load(cls, path: str | Path) -> 'BPE':
    """Reads a tokenizer file. Raises FileNotFoundError, or ValueError when it is not a tokenizer."""
    if not Path(path).is_file():
      raise FileNotFoundError(f'there is no tokenizer file {path}; expected a tokenizer JSON.')
    try:
      return cls(Path(path).read_text(encoding='utf-8'))
    except ValueError as e:  # such as UnicodeDecodeError
      raise ValueError(f'the tokenizer file {path} cannot be read: {e}') from e

  def __reduce__(self):
    return BPE, (self._json,)

  def to_json(self) -> str:
    return self._json

  @property
  def vocab_size(self) -> int:
    """V, one more than the largest id: the actual number of entries, unless ids are left out."""
    return self._vocab_size

  def add(self, words: Sequence[str]) -> 'BPE':
    """Returns a tokenizer in which each of `words` is one token; those that were not get new ids from `vocab_size` on.

    Only whole words match, in upper or lower case, together with the space before them: `pip` does not match in `pipe`.
    Raises ValueError for a word that is empty or contains a space, and if the tokenizer leaves out ids.
    """
    if self._has_gaps:
      raise ValueError(
        'the tokenizer leaves out ids, so words cannot be added to it; leave tokenizer.new_tokens empty.'
      )
    if bad := [w for w in words if not isinstance(w, str) or not w.strip() or len(w.split()) > 1 or w != w.strip()]:
      raise ValueError(f'tokenizer.new_tokens has {bad}; expected single words.')
    grown = Tokenizer.from_str(self._json)
    normal = grown.normalizer.normalize_str if grown.normalizer else str
    several = [w for w in dict.fromkeys(map(normal, words)) if len(self.encode(w)) > 1]
    # A word that is already an entry of the vocabulary keeps its id: the library does not add it twice.
    grown.add_tokens([AddedToken(w, single_word=True, lstrip=True, normalized=True) for w in several])
    return BPE(grown.to_str())

  def encode(self, text: str, dropout: float = 0.0, seed: int | None = None) -> list[int]:
    """Token ids of a text of any length; '' gives [].

    With `dropout` p > 0 and a `seed`, every merge is skipped with probability p each time it could be applied. The ids
    are then a function of (text, p, seed). Raises ValueError for text that is not valid Unicode, and for dropout on a
    tokenizer that is not a byte-level BPE.
    """
    if LONE_SURROGATE.search(text):
      raise ValueError(
        f'the text {text[:100]!r} has a lone surrogate, so it is not valid Unicode; remove that character.'
      )
    if not dropout or seed is None:
      return self._tokenizer.encode(text, add_special_tokens=False).ids
    if self._model is None:
      self._model = self._read_model()
    vocab, merges, added = self._model
    rng = random.Random(seed)
    if self._tokenizer.normalizer:
      text = self._tokenizer.normalizer.normalize_str(text)
    pattern = '|'.join(map(re.escape, sorted(added, key=len, reverse=True)))
    parts = re.split(rf'\s*(?<!\w)({pattern})(?!\w)', text) if added else [text]  # every second part is an added word
    ids: list[int] = []
    for i, part in enumerate(parts):
      if i % 2:
        ids.append(added[part])
      elif part:
        words = self._tokenizer.pre_tokenizer.pre_tokenize_str(part)
        ids += [i for word, _ in words for i in _merge([vocab[c] for c in word], merges, dropout, rng)]
    return ids

  def _read_model(self) -> tuple[dict[str, int], Merges, dict[str, int]]:
    whole = json.loads(self._json)
    model, added = whole['model'], {t['content']: t['id'] for t in whole.get('added_tokens', [])}
    vocab = model.get('vocab', {})
    plain = model['type'] == 'BPE' and not (model.get('continuing_subword_prefix') or model.get('end_of_word_suffix'))
    if not plain or not set(pre_tokenizers.ByteLevel.alphabet()) <= set(vocab):
      raise ValueError('BPE dropout needs a byte-level BPE, this tokenizer is another kind; set tokenizer.dropout=0.0.')
    merges = [m.split(' ') if isinstance(m, str) else m for m in model['merges']]
    return vocab, {(vocab[a], vocab[b]): (rank, vocab[a + b]) for rank, (a, b) in enumerate(merges)}, added

  def decode(self, ids: Sequence[int]) -> str:
    """The text of token ids, of which those outside [0, V), such as padding, are ignored."""
    added = self._tokenizer.get_added_tokens_decoder()
    known = (int(i) for i in ids if 0 <= i < self.vocab_size)
    texts = []
    for is_added, part in itertools.groupby(known, key=added.__contains__):
      if is_added:  # such a token includes the space before it
        texts += [f' {added[i].content}' for i in part]
      else:
        texts.append(self._tokenizer.decode(list(part)))
    return ''.join(texts).removeprefix(' ')


def _merge(ids: list[int], merges: Merges, dropout: float, rng: random.Random) -> list[int]:
  """Applies merges to one word, best rank first and leftmost among equals (Provilkov et al., 2020, Algorithm 1).

  Only the best merge that is not dropped is applied, so there is no need to sample whether worse ones are dropped.
  """
  while True:
    candidates = sorted((*merges[pair], i) for i, pair in enumerate(itertools.pairwise(ids)) if pair in merges)
    best = next((c for c in candidates if rng.random() >= dropout), None)
    if best is None:
      return ids
    _, new, i = best
    ids = [*ids[:i], new, *ids[i + 2 :]]


class TextEncoder:
  """Encodes captions to token ids of a fixed length, as models take them."""

  def __init__(
    self,
    bpe: BPE,
    length: int,
    dropout: float = 0.0,
    *,
    pad: int = -1,
    start: int = -1,
    end: int = -1,
    blank: int = -1,
  ):
    """`pad`, `start`, `end` and `blank` are token ids; `blank` is replaced by the padding of its position.

    -1 means a separate padding id for each position, no start, no end and no blank.

    Raises ValueError for a length below 1 (not counting start and end), a dropout outside [0, 1] or an id outside the
    vocabulary.
    """
    self._start, self._end = ([i] if i >= 0 else [] for i in (start, end))
    self.capacity = length - len(self._start) - len(self._end)  # how many tokens of a caption are not cut off
    if self.capacity < 1:
      raise ValueError(f'tokenizer.length is {length}; expected 1 or more tokens in addition to start and end.')
    if (largest := max(pad, start, end, blank)) >= bpe.vocab_size:
      raise ValueError(f'tokenizer.pad, start, end or blank is {largest}; there are {bpe.vocab_size} tokens.')
    if not 0 <= dropout <= 1:
      raise ValueError(f'tokenizer.dropout is {dropout}; expected a probability.')
    self.bpe, self.length, self.dropout = bpe, length, dropout
    by_position = np.arange(bpe.vocab_size, bpe.vocab_size + length, dtype=np.int32)
    self._padding = by_position if pad < 0 else np.full(length, pad, np.int32)
    self._blank = blank

  def __call__(self, caption: str, seed: int | None = None) -> np.ndarray:
    """int32[length]: the token ids, cut to the length, then padding.

    By default position i has its own padding id V + i (DALL-E, 2.2), and '' is all padding: the unconditional prompt.
    BPE dropout is applied only with a `seed`.
    """
    ids = self.bpe.encode(caption, self.dropout, seed)
    ids = [*self._start, *ids[: self.capacity], *self._end]
    text = self._padding.copy()
    text[: len(ids)] = ids
    return np.where(text == self._blank, self._padding, text)


def text_encoder(tokenizer: BPE | str, config: Mapping[str, Any], dropout: float = 0.0) -> TextEncoder:
  """The encoder of a run, from its tokenizer and its `config.tokenizer`. Raises ValueError like `TextEncoder`."""
  bpe = BPE(tokenizer) if isinstance(tokenizer, str) else tokenizer
  special = {name: config.get(name, -1) for name in ('pad', 'start', 'end', 'blank')}
  return TextEncoder(bpe, config['length'], dropout, **special)
