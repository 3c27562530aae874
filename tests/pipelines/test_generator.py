"""What every generator shares, without a network."""

import numpy as np
import pytest

from dalle_jax.data import bpe
from dalle_jax.pipelines.generator import Generator, check_numbers
from dalle_jax.pipelines.rerank import is_list_of_strings
from dalle_jax.training.checkpoint import Run

BPE = bpe.train(['a red heart'] * 3, 260)


@pytest.mark.parametrize(
  ('special', 'capacity'),
  [({}, 6), ({'start': 0, 'end': 1}, 4), ({'start': 0, 'end': 1, 'pad': 1}, 4), ({'end': 1, 'pad': 1}, 5)],
)
def test_a_prompt_that_is_cut_gives_a_warning(special, capacity, caplog):
  config = {'data': {'image_size': 8}, 'tokenizer': {'length': 6, **special}}
  generator = Generator(Run(config, {}, BPE.to_json(), 0, ''), {})
  for count in (0, 1, capacity):
    generator._text('xyzxyzxyz'[: max(0, count - 1)])  # and the space before it
  assert not caplog.records
  assert len(BPE.encode('xyzxyzxyz'[:capacity])) == capacity + 1
  generator._text('xyzxyzxyz'[:capacity])
  assert f'has {capacity + 1} tokens; the model reads the first {capacity}.' in caplog.text


@pytest.mark.parametrize(
  'numbers', [dict(n=2.0), dict(n='2'), dict(n=None), dict(seed='1'), dict(seed=1.5), dict(batch_size=1.5)]
)
def test_numbers_that_are_not_whole_are_refused(numbers):
  ((name, value),) = numbers.items()
  with pytest.raises(ValueError, match=f'{name} is {value!r}; expected a whole number'):
    check_numbers(**{'n': np.int64(2), 'seed': 0, 'batch_size': 4, **numbers})


def test_what_counts_as_a_list_of_strings():
  for values in (['a'], ('a', 'b'), np.array(['a']), []):
    assert is_list_of_strings(values)
  for values in ('a', b'a', None, (c for c in 'ab'), [None], [['a']], {'a': 1}, np.zeros(2)):
    assert not is_list_of_strings(values)
