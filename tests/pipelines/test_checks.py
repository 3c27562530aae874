"""What pipelines accept."""

import numpy as np
import pytest

from dalle_jax.pipelines.checks import check_numbers, is_list_of_strings


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
