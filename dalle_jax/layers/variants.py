"""Modules from named sets of fields."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import jax.numpy as jnp

Module = TypeVar('Module')


def build(module: type[Module], variants: Mapping[str, Mapping[str, Any]], variant: str, overrides: Any) -> Module:
  """`module` with the fields of `variants[variant]`, some overridden; a `dtype` may be a string, a tuple a list.

  Raises ValueError, naming those that exist, for an unknown variant, field or dtype.
  """
  name = module.__name__
  if variant not in variants:
    raise ValueError(f'{name} has no variant {variant!r}; there are {", ".join(variants)}.')
  known = [f.name for f in dataclasses.fields(module) if f.name not in ('parent', 'name')]
  if unknown := sorted(set(overrides) - set(known)):
    raise ValueError(f'{name} has no field {", ".join(unknown)}; there are {", ".join(known)}.')
  fields = {k: tuple(v) if isinstance(v, list) else v for k, v in {**variants[variant], **overrides}.items()}
  if isinstance(fields.get('dtype'), str):
    if fields['dtype'] not in ('float32', 'bfloat16'):
      raise ValueError(f'{name}: dtype {fields["dtype"]!r} is unknown; there are float32 and bfloat16.')
    fields['dtype'] = jnp.dtype(fields['dtype'])
  return module(**fields)
