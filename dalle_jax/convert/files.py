"""Readers for the files of public checkpoints: weights in all formats, YAML and JSON configs, vocabularies."""

import json
import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import yaml
from flax import serialization, traverse_util
from tokenizers import Tokenizer

from dalle_jax.convert import torch_file

FLAX_LEAVES = {'kernel': 'weight', 'scale': 'weight', 'embedding': 'weight', 'bias': 'bias'}  # as PyTorch names them
STATE_KEYS = ('state_dict', 'model_state_dict', 'model')  # under which trainers store the tensors of the network


def find(folder: Path, *patterns: str, expected: str, several: bool = False) -> Path:
  """Returns the file in `folder` that matches a pattern, earlier patterns first, or `folder` if it is a file.

  Raises FileNotFoundError listing what is there, and ValueError if a pattern matches several files, unless `several`,
  which takes the first by name.
  """
  folder = Path(folder).expanduser()
  if folder.is_file():
    return folder
  if not folder.is_dir():
    raise FileNotFoundError(f'{folder} does not exist; expected {expected}.')
  for pattern in patterns:
    found = sorted(p for p in folder.glob(pattern) if p.is_file())
    if len(found) > 1 and not several:
      names = ', '.join(str(p.relative_to(folder)) for p in found[:4])
      more = f' and {len(found) - 4} more' if len(found) > 4 else ''
      raise ValueError(f'{folder} has {names}{more}; expected one: give it as --path, or move the others.')
    if found:
      return found[0]
  there = ', '.join(sorted(p.name for p in folder.iterdir())[:12]) or 'nothing'
  raise FileNotFoundError(f'{folder} has no {" or ".join(patterns)}; expected {expected}, found {there}.')


def state_dict(path: Path) -> dict[str, Any]:
  """Reads the tensors of a .safetensors or torch.save file by dotted name, unwrapped from the trainer's dicts.

  Raises ValueError with a one-line message for a file that is damaged or has no tensors.
  """
  if path.suffix == '.safetensors':
    return _safetensors(path)
  value = torch_file.load(path)
  if isinstance(value, torch_file.Stub):
    return torch_file.module(value)
  for key in STATE_KEYS:
    if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
      value = value[key]
      break
  tensors = torch_file.flat(value)
  if not tensors:
    keys = ', '.join(map(str, list(value)[:8])) if isinstance(value, Mapping) else type(value).__name__
    raise ValueError(f'{path} has no tensors (it has {keys}); expected a state_dict.')
  return tensors


def _safetensors(path: Path) -> dict[str, Any]:
  if not path.is_file():
    raise FileNotFoundError(f'{path} is missing; expected a .safetensors file.')
  try:
    return safetensors.numpy.load_file(path)
  except Exception as e:  # the library raises its own class and others
    raise ValueError(f'{path} cannot be read ({" ".join(str(e).split())[:200]}); is it complete?') from e


def msgpack(path: Path) -> dict[str, np.ndarray]:
  """Reads the arrays of a .msgpack file of Flax by dotted name. Raises ValueError with a one-line message."""
  try:
    with path.open('rb') as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
      arrays = traverse_util.flatten_dict(serialization.msgpack_restore(content), sep='.')
  except Exception as e:  # the library raises its own classes, AttributeError and others
    text = ' '.join(str(e).split())[:200]
    raise ValueError(f'{path} cannot be read ({text}); expected parameters saved by Flax. Is it complete?') from e
  if odd := [name for name, x in arrays.items() if not isinstance(x, np.ndarray)]:
    raise ValueError(f'{path} has {odd[0]}, which is no array; expected parameters saved by Flax.')
  return arrays


def add(path: Path, tensors: dict[str, Any], name: str, x: Any) -> None:
  """Adds the tensor x of the file `path` under a new name. Raises ValueError if another one has it."""
  if name in tensors:
    raise ValueError(f'{path} has two tensors for {name}; expected one.')
  tensors[name] = x


def config(path: Path) -> dict[str, Any]:
  """Reads a mapping from a .yaml, .yml or .json file. Raises ValueError with a one-line message for other content."""
  try:
    text = path.read_text(encoding='utf-8')
    value = json.loads(text) if path.suffix == '.json' else yaml.safe_load(text)
  except (ValueError, yaml.YAMLError) as e:
    raise ValueError(f'{path} cannot be read ({" ".join(str(e).split())[:200]}); expected YAML or JSON.') from e
  if not isinstance(value, dict):
    raise ValueError(f'{path} holds {type(value).__name__}; expected a mapping of fields.')
  return value


def fields(path: Path, value: Mapping[str, Any], *names: str) -> dict[str, Any]:
  """Returns the fields at these dotted paths, by last name. Raises ValueError naming the file if one is missing."""
  result = {}
  for name in names:
    node: Any = value
    for key in name.split('.'):
      if not isinstance(node, Mapping) or key not in node:
        raise ValueError(f'{path} has no field {name}; is it the config of this model?')
      node = node[key]
    result[name.rpartition('.')[2]] = node
  return result


def integers(path: Path, value: Mapping[str, Any], *names: str) -> dict[str, int]:
  """Like `fields`, for fields that must be whole numbers from 0 to a billion."""
  result = fields(path, value, *names)
  for name, number in result.items():
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= 10**9:
      raise ValueError(f'{path} has {name} {str(number)[:50]!r}; expected a whole number.')
  return result


def vocabulary(path: Path) -> dict[str, int]:
  """Reads the token ids of a vocab.json. Raises ValueError with a one-line message for any other file."""
  value = config(path)
  if not all(isinstance(i, int) for i in value.values()):
    raise ValueError(f'{path} is not a vocabulary; expected tokens with their ids.')
  return value


def merges(path: Path) -> list[tuple[str, str]]:
  """Reads the merges of a merges.txt, best first. Raises ValueError with a one-line message for any other file."""
  try:
    lines = path.read_text(encoding='utf-8').splitlines()
  except ValueError as e:
    raise ValueError(f'{path} is not a text file ({e}); expected the merges of a BPE.') from e
  pairs = [tuple(line.split(' ')) for line in lines if line and not line.startswith('#version')]
  if bad := [p for p in pairs if len(p) != 2]:
    raise ValueError(f'{path} has the line {" ".join(bad[0])[:50]!r}; expected two pieces separated by a space.')
  return pairs  # type: ignore[return-value]


def tokenizer(path: Path, text: str = '') -> Tokenizer:
  """Reads a JSON file of Hugging Face's tokenizers, or `text`, if given, in its place.

  Raises ValueError with a one-line message for any other file.
  """
  try:
    return Tokenizer.from_str(text) if text else Tokenizer.from_file(str(path))
  except Exception as e:  # the library raises bare Exception
    raise ValueError(
      f"{path} cannot be read ({' '.join(str(e).split())[:100]}); expected a JSON file of Hugging Face's tokenizers."
    ) from e


def layers(theirs: Mapping[str, Any], pattern: str) -> int:
  """Counts layers: 1 + the highest number that the group of the regular expression `pattern` matches in the names."""
  return 1 + max((int(m[1]) for k in theirs if (m := re.match(pattern, k))), default=-1)


def under(theirs: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  """The tensors whose names begin with `prefix`, with the prefix removed."""
  return {k.removeprefix(prefix): v for k, v in theirs.items() if k.startswith(prefix)}
