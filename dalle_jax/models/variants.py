"""Building modules from named variants with overrides, and checks of config fields."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp

Module = TypeVar('Module')


def text_sizes(tokenizer: Mapping[str, Any]) -> dict[str, int]:
  """The fields of a network that follow from `config.tokenizer`: number of text ids, length of a text, padding id."""
  length, pad = tokenizer['length'], tokenizer.get('pad', -1)
  paddings = length if pad < 0 else 0  # one padding id for each position
  return dict(text_vocab=tokenizer['vocab_size'] + paddings, text_length=length, pad=pad)


# type of a default -> types accepted for the field; a bool is an int in Python, so it comes first
KINDS = ((bool, bool), (int, int), (float, (int, float)), (str, str), ((tuple, list), (tuple, list)))


def fields(owner: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
  """`given` as a dict. Raises ValueError for a name that is not in `defaults`, or for a value of another type."""
  if unknown := sorted(set(given) - set(defaults)):
    raise ValueError(f'{owner} has no field {", ".join(unknown)}; its fields are {", ".join(defaults)}.')
  for name, value in given.items():
    accepted = next((kind for default, kind in KINDS if isinstance(defaults[name], default)), object)
    if not isinstance(value, accepted) or (isinstance(value, bool) and accepted not in (bool, object)):
      raise ValueError(f'{owner}.{name} is {value!r}; expected a value like {defaults[name]!r}.')
  return dict(given)


def check_ranges(
  owner: str, given: Mapping[str, Any], fractions: Sequence[str] = (), sizes: Sequence[str] = ()
) -> None:
  """Raises ValueError if one of the `fractions` in `given` is not in [0, 1], or one of the `sizes` is negative."""
  for name in fractions:
    if not 0 <= given[name] <= 1:
      raise ValueError(f'{owner}.{name} is {given[name]}; expected a fraction from 0 to 1.')
  for name in sizes:
    if given[name] < 0:
      raise ValueError(f'{owner}.{name} is {given[name]}; expected 0 or more.')


def check_image_size(side: int, data: Mapping[str, Any]) -> None:
  """Raises ValueError if the images of `config.data` are smaller than those that a network generates."""
  if data['image_size'] < side:
    raise ValueError(
      f'the network generates images of {side} pixels a side, but those of the data have {data["image_size"]}; set '
      'config.model.image_size or config.data.image_size.'
    )


POSITIVE = (  # fields that are 1 or more; 0, too, where that is the default and stands for another size
  'width',
  'd_model',
  'depth',
  'layers',
  'heads',
  'mlp',
  'text_mlp',
  'text_layers',
  'text_heads',
  'patch',
  'ch',
  'num_codes',
  'code_dim',
  'z_channels',
  'norm_groups',
  'conv_kernel',
  'period',
  'unroll',
  'prompt',
)


def build(module: type[Module], variants: Mapping[str, Mapping[str, Any]], variant: str, overrides: Any) -> Module:
  """`module` with the fields of `variants[variant]`, with overrides: a dtype may be a string, and a tuple a list.

  Raises ValueError, which names the known ones, for an unknown variant, field or dtype, and for sizes too small.
  """
  name = module.__name__
  if variant not in variants:
    raise ValueError(f'{name} has no variant {variant!r}; its variants are {", ".join(variants)}.')
  defaults = {f.name: f.default for f in dataclasses.fields(module) if f.name not in ('parent', 'name')}
  merged = {**variants[variant], **fields(name, {**defaults, **variants[variant]}, overrides)}
  values = {k: tuple(v) if isinstance(v, list) else v for k, v in merged.items()}
  for field in POSITIVE:
    least = 0 if defaults.get(field) == 0 else 1
    if field in overrides and overrides[field] < least:
      raise ValueError(f'{name}.{field} is {overrides[field]}; expected {least} or more.')
  if 'dtype' in defaults:
    dtype = values.get('dtype', defaults['dtype'])
    if isinstance(dtype, str) and dtype not in ('float32', 'bfloat16'):
      raise ValueError(f'{name}: dtype {dtype!r} is unknown; expected float32 or bfloat16.')
    values['dtype'] = jnp.dtype(dtype)  # in one form, so that equal networks have equal hashes
  return module(**values)
