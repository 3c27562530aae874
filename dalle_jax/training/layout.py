"""Command-line flags that lay a pipeline out over devices and processes."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags

from dalle_jax.training import distributed, sharding


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags that `asked` reads."""
  text = 'over all devices, e.g. data=-1,fsdp=1,tensor=1; empty: one device'
  flags.DEFINE_string('mesh', '', text, flag_values=values)
  distributed.define_flags(values)


def sizes(text: str, axes: Mapping[str, int]) -> dict[str, int]:
  """Parses 'data=-1,tensor=4' into the sizes of all `axes`, 1 for those left out; {} for ''. Raises ValueError."""
  if not text:
    return {}
  if not re.fullmatch(r'(\w+=-?\d+)(,\w+=-?\d+)*', text):
    raise ValueError(f'--mesh {text!r} is not understood; expected e.g. data=-1,fsdp=1,tensor=1.')
  pairs = [part.split('=') for part in text.split(',')]
  given = {k: int(v) for k, v in pairs}
  if len(given) < len(pairs):
    raise ValueError(f'--mesh {text!r} has an axis twice; give each once.')
  if unknown := sorted(set(given) - set(axes)):
    raise ValueError(f'--mesh has no axis {", ".join(unknown)}; its axes are {", ".join(axes)}.')
  return {axis: given.get(axis, 1) for axis in axes}


@contextlib.contextmanager
def asked(options: Any, axes: Mapping[str, int], rules: sharding.Rules) -> Iterator[dict[str, Any]]:
  """Joins the processes that the flags name and yields the arguments for a pipeline's `load`: mesh and rules, or none.

  At the end the other processes wait for process 0, which writes the results. Raises ValueError for flags that do not
  go together or that differ between processes.
  """
  wanted = sizes(options.mesh, axes)
  distributed.join(options)
  if distributed.joined() and not wanted:
    raise ValueError('several processes sample over one mesh; give it, e.g. --mesh data=-1.')
  if not wanted:
    yield {}
    return
  own = ('process', 'out', 'debug')
  distributed.check_same({f'--{name}': str(options[name].value) for name in options if name not in own})
  with contextlib.ExitStack() as stack:
    try:
      mesh = stack.enter_context(sharding.use(wanted, rules))
    except ValueError as e:
      raise ValueError(str(e).replace('config.mesh', '--mesh')) from e
    yield {'mesh': mesh, 'rules': rules}
    distributed.wait_for_first()
