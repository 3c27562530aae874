"""What pipelines accept: lists of captions, and numbers."""

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np


def is_list_of_strings(values: Any) -> bool:
  """Whether `values` is a list of strings, or an array or another sequence of them, but not itself a string."""
  is_sequence = isinstance(values, (Sequence, np.ndarray)) and not isinstance(values, str)
  return is_sequence and all(isinstance(value, str) for value in values)


def check_prompts(prompts: Sequence[str]) -> None:
  """Raises ValueError for anything but a list of captions."""
  if not is_list_of_strings(prompts):
    raise ValueError('prompts must be a list of strings, e.g. ["a red circle"].')
  if not len(prompts):
    raise ValueError('there are no prompts; give at least one.')


def check_numbers(n: int, batch_size: int, seed: int) -> None:
  """Raises ValueError for numbers that no generator takes."""
  for name, value in dict(n=n, batch_size=batch_size, seed=seed).items():
    if not isinstance(value, numbers.Integral):
      raise ValueError(f'{name} is {value!r}; expected a whole number.')
  if n < 1 or batch_size < 1:
    raise ValueError(f'n is {n} and batch_size {batch_size}; both must be 1 or more.')
  if not 0 <= seed < 2**32:
    raise ValueError(f'seed is {seed}; expected 0 to {2**32 - 1}.')
