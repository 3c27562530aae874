"""Modules from named sets of fields, and the checks that fields of a config deserve."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp

Module = TypeVar('Module')


def text_sizes(tokenizer: Mapping[str, Any]) -> dict[str, int]:
  """The fields of a network that follow from `config.tokenizer`: all text ids, the length of a text, its padding."""
  length, pad = tokenizer['length'], tokenizer.get('pad', -1)
  own = length if pad < 0 else 0  # a padding for each position
  return dict(text_vocab=tokenizer['vocab_size'] + own, text_length=length, pad=pad)


KINDS = ((bool, bool), (int, int), (float, (int, float)), (str, str), ((tuple, list), (tuple, list)))


def fields(owner: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
  """`given` as a dict. Raises ValueError for a name that `defaults` lacks or a value of another kind than there."""
  if unknown := sorted(set(given) - set(defaults)):
    raise ValueError(f'{owner} has no field {", ".join(unknown)}; there are {", ".join(defaults)}.')
  for name, value in given.items():
    wanted = next((kind for default, kind in KINDS if isinstance(defaults[name], default)), object)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted not in (bool, object)):
      raise ValueError(f'{owner}.{name} is {value!r}; expected something like {defaults[name]!r}.')
  return dict(given)


def check_ranges(
  owner: str, given: Mapping[str, Any], fractions: Sequence[str] = (), sizes: Sequence[str] = ()
) -> None:
  """Raises ValueError for a fraction outside [0, 1] or a negative size among `given`."""
  for name in fractions:
    if not 0 <= given[name] <= 1:
      raise ValueError(f'{owner}.{name} is {given[name]}; expected a fraction, 0 to 1.')
  for name in sizes:
    if given[name] < 0:
      raise ValueError(f'{owner}.{name} is {given[name]}; expected 0 or more.')


def check_image_size(side: int, data: Mapping[str, Any]) -> None:
  """Raises ValueError when the pictures of `config.data` are smaller than those that a network learns to draw."""
  if data['image_size'] < side:
    raise ValueError(
      f'the network draws {side} pixels a side, the data has {data["image_size"]}; set config.model.image_size or '
      'config.data.image_size.'
    )


def build(module: type[Module], variants: Mapping[str, Mapping[str, Any]], variant: str, overrides: Any) -> Module:
  """`module` with the fields of `variants[variant]`, some overridden; a `dtype` may be a string, a tuple a list.

  Raises ValueError, naming those that exist, for an unknown variant, field or dtype.
  """
  name = module.__name__
  if variant not in variants:
    raise ValueError(f'{name} has no variant {variant!r}; there are {", ".join(variants)}.')
  own = {f.name: f.default for f in dataclasses.fields(module) if f.name not in ('parent', 'name')}
  merged = {**variants[variant], **fields(name, {**own, **variants[variant]}, overrides)}
  values = {k: tuple(v) if isinstance(v, list) else v for k, v in merged.items()}
  if isinstance(values.get('dtype'), str):
    if values['dtype'] not in ('float32', 'bfloat16'):
      raise ValueError(f'{name}: dtype {values["dtype"]!r} is unknown; there are float32 and bfloat16.')
    values['dtype'] = jnp.dtype(values['dtype'])
  return module(**values)
