"""Parses configs from the command line, with one clear line for each mistake, and compares them."""

import contextlib
import difflib
import importlib
import importlib.util
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from absl import flags
from ml_collections import ConfigDict, config_flags

# Fields that may be new: the model, objective, data source or optimiser that reads them refuses unknown names.
OPEN = r'(model|loss|frozen|data\.source_args|train\.xla_options|loss\.disc|optim\.groups\.\w+)\.\w+'


def parse(argv: Sequence[str], flag_values: flags.FlagValues | None = None) -> ConfigDict:
  """Parses `PROGRAM --config file.py:argument --config.NAME=VALUE ...`; `flag_values` defines any other flags.

  Raises ValueError for a field that the config does not have (naming similar ones), a value of the wrong type, or an
  error in the file, and OSError if the file cannot be read.
  """
  config = _load(argv)
  for name in (a.lstrip('-').removeprefix('config.').split('=')[0] for a in argv if re.match('--?config[.]', a)):
    _add_parents(config, name)
  i, flag, _ = _config_file(argv)
  overrides = [*argv[: i if flag else i - 1], *argv[i + 1 :]]
  values = flags.FlagValues() if flag_values is None else flag_values
  config_flags.DEFINE_config_dict(
    'config', config, flag_values=values, sys_argv=overrides, lock_config=False, accept_new_attributes=True
  )
  try:
    rest = values(overrides)[1:]
  except flags.Error as e:
    text = ' '.join(str(e).split())
    if 'as a ConfigDict' in text:
      flag = text.removeprefix('flag ').partition('=')[0]
      text = f'{flag} holds other fields; set one of those, as {flag}.NAME=VALUE.'
    raise ValueError(text) from e
  if rest:
    raise ValueError(f'arguments {rest} are not understood; overrides look like --config.optim.lr=3e-4.')
  for rule in config.get('rules', ()):
    if not _is_rule(rule):
      raise ValueError(
        f"config.rules has {rule!r}; expected pairs of a logical axis and mesh axes, such as ('embed', 'fsdp')."
      )
  if not 0 <= config.get('seed', 0) < 2**32:  # jax takes the lowest 32 bits
    raise ValueError(f'config.seed is {config.seed}; expected 0 to {2**32 - 1}.')
  return config


def _is_rule(rule: Any) -> bool:
  """Whether it is a logical axis and None, a mesh axis, or several different ones."""
  if not isinstance(rule, (tuple, list)) or len(rule) != 2 or not isinstance(rule[0], str):
    return False
  axes = list(rule[1]) if isinstance(rule[1], (tuple, list)) else [rule[1] or '']
  return all(isinstance(axis, str) for axis in axes) and len(set(axes)) == len(axes)


def with_stage(argv: Sequence[str], stage: str) -> list[str]:
  """Returns `argv` with `stage` as the first argument of the config file, before its other arguments."""
  i, flag, file = _config_file(argv)
  path, _, arguments = file.partition(':')
  return [*argv[:i], f'{flag}{path}:{",".join(filter(None, (stage, arguments)))}', *argv[i + 1 :]]


def _config_file(argv: Sequence[str]) -> tuple[int, str, str]:
  """The index of the argument that names the file, what precedes the name in it ('--config=' or ''), and the name."""
  for i, a in enumerate(argv):
    if a.startswith(('--config=', '-config=')):
      flag, _, file = a.partition('=')
      return i, f'{flag}=', file
    if a in ('--config', '-config') and i + 1 < len(argv):
      return i + 1, '', argv[i + 1]
  raise ValueError('no config is given; pass --config configs/NAME.py (`ls configs` lists them).')


def _load(argv: Sequence[str]) -> ConfigDict:
  """The config as its file defines it, without overrides."""
  path, *argument = _config_file(argv)[2].split(':', 1)
  module = load_file(path, 'get_config')
  with user_code(path):
    config = module.get_config(*argument)
  if not isinstance(config, ConfigDict):
    raise ValueError(
      f'get_config of {path} returns {type(config).__name__}; expected a ConfigDict, such as that of common.base().'
    )
  return config


def load_file(path: str, function: str) -> ModuleType:
  """Imports a config file that defines `function`. Raises ValueError or OSError of one line naming the file."""
  if not path.endswith('.py') and Path(path).is_file():
    raise ValueError(
      f'{path} is not a Python file; pass --config configs/NAME.py (a run resumes with the config it began with).'
    )
  try:
    open(path).close()
  except OSError as e:
    raise type(e)(f'the config cannot be read: {e}; pass --config configs/NAME.py.') from e
  spec = importlib.util.spec_from_file_location(Path(path).stem, path)
  module = importlib.util.module_from_spec(spec)
  with user_code(path):
    spec.loader.exec_module(module)
  if not hasattr(module, function):
    raise ValueError(f'{path} has no function `{function}`; the files in configs/ show what it returns.')
  return module


@contextlib.contextmanager
def user_code(path: str) -> Iterator[None]:
  """Turns an error in the config file `path` into a ValueError of one line, with its line in the file.

  A ValueError that is raised on purpose, such as that of an unknown argument, keeps its message.
  """
  try:
    yield
  except Exception as e:
    frames = traceback.extract_tb(e.__traceback__)
    if isinstance(e, ValueError) and (frames[-1].line or '').startswith('raise '):
      raise ValueError(' '.join(str(e).split())) from e
    if isinstance(e, SyntaxError):
      where, text = f'{e.filename}, line {e.lineno}', e.msg
    else:
      lines = [f.lineno for f in frames if Path(f.filename).absolute() == Path(path).absolute()]
      where, text = f'{path}, line {lines[-1]}' if lines else path, ' '.join(str(e).split())
    raise ValueError(f'{where}: {type(e).__name__}: {text}') from e


def _add_parents(config: ConfigDict, name: str) -> None:
  """Creates the parents of a field that may be new. Raises ValueError for a name that is neither known nor allowed."""
  known = list(flat(config, parents=True))
  if name in known:
    return
  if not re.fullmatch(OPEN, name):
    leaf = name.rpartition('.')[2]
    close = [k for k in known if k.rpartition('.')[2] == leaf]
    close += difflib.get_close_matches(name, known, 3) + difflib.get_close_matches(leaf, known, 3)
    hint = f'did you mean {", ".join(dict.fromkeys(close))}?' if close else f'it has {", ".join(config)}.'
    raise ValueError(f'the config has no field {name!r}; {hint}')
  for parent in name.split('.')[:-1]:
    if parent not in config:
      config[parent] = ConfigDict()
    config = config[parent]


def module_named(package: str, name: str, field: str, function: str = '') -> ModuleType:
  """Imports the module dalle_jax/PACKAGE/NAME.py that the config field `field` names.

  Raises ValueError, listing the possible names, if there is no such module or it does not define `function`.
  """
  load = lambda name: importlib.import_module(f'dalle_jax.{package}.{name}')
  known = sorted(p.stem for p in (Path(__file__).parents[1] / package).glob('*.py') if p.stem != '__init__')
  if name in known and (not function or hasattr(load(name), function)):
    return load(name)
  if function:
    known = [other for other in known if hasattr(load(other), function)]
  raise ValueError(f'{field} {name!r} is unknown; dalle_jax/{package} has {", ".join(known)}.')


def inherit(config: ConfigDict, known: dict) -> None:
  """Copies into `config` the settings that the tokenizer and networks of the run to start from, `known`, depend on.

  With `model.variant='init'` these include every field of the model and of the discriminator that is not given, and the
  length of captions.
  """
  names: tuple[str, ...] = ('pad', 'start', 'end', 'blank')
  if config.model.get('variant') == 'init':
    given = {k: v for k, v in config.model.items() if k != 'variant'}
    # An import names these two, which follow from the image tokenizer and the image size.
    fields = {k: v for k, v in known['model'].items() if k not in ('image_vocab', 'grid')}
    config.model = ConfigDict({**fields, **given})
    if 'disc' in config.loss and known.get('loss', {}).get('disc'):
      config.loss.disc = ConfigDict({**known['loss']['disc'], **config.loss.disc})
    names = (*names, 'length')
  if config.tokenizer.vocab_size and known.get('tokenizer'):
    config.tokenizer.update({k: known['tokenizer'][k] for k in names if k in known['tokenizer']})


def check_regex(field: str, pattern: str) -> None:
  """Raises ValueError if the config field `field` is not a regular expression."""
  try:
    re.compile(pattern)
  except re.error as e:
    raise ValueError(f'{field} {pattern!r} is not a regular expression: {e}.') from e


def to_json(config: Any) -> Any:
  """Converts a ConfigDict to plain dicts, lists and numbers."""
  if isinstance(config, (Mapping, ConfigDict)):
    return {k: to_json(v) for k, v in config.items()}
  if isinstance(config, (tuple, list)):
    return [to_json(v) for v in config]
  return config


class _Yaml(yaml.SafeDumper):
  """Writes lists on one line: those of a config are short."""


_Yaml.add_representer(list, lambda dumper, x: dumper.represent_sequence('tag:yaml.org,2002:seq', x, flow_style=True))


def to_yaml(config: Any) -> str:
  """The fields of a config as YAML, which gives `to_json(config)` when it is read."""
  return yaml.dump(to_json(config), Dumper=_Yaml, width=120, allow_unicode=True)


def flat(config: Any, prefix: str = '', parents: bool = False) -> dict[str, Any]:
  """Fields by dotted name; with `parents`, also those that hold other fields."""
  fields = {}
  for k, v in config.items():
    nested = isinstance(v, (Mapping, ConfigDict))
    if parents or not nested:
      fields[f'{prefix}{k}'] = v
    if nested:
      fields |= flat(v, f'{prefix}{k}.', parents)
  return fields


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """One 'name: old -> new' for every field that differs between two configs in JSON form."""
  a, b = flat(old), flat(new)
  return [f'{k}: {a.get(k)} -> {b.get(k)}' for k in sorted({*a, *b}) if a.get(k) != b.get(k)]
