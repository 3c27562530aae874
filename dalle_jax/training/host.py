"""What the memory allocator of the host and the compiler have to know."""

import ctypes
import platform
from collections.abc import Mapping
from typing import Any

import jax

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8  # of glibc's malloc.h


def keep_memory() -> None:
  """Freed memory stays with this process, for the next step; does nothing where malloc is not glibc's.

  XLA on the CPU frees its buffers after every step. By default glibc gives large ones back to the kernel, which then
  clears each page of them anew: a quarter of the time of a step of the quickstart's DALL-E.
  """
  if platform.libc_ver()[0] != 'glibc':
    return
  mallopt = ctypes.CDLL(None).mallopt
  for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26), (_ARENA_MAX, 1)):
    mallopt(option, value)


def known_options(options: Mapping[str, Any]) -> dict[str, Any]:
  """Those of `options` that this XLA knows; others are named, as names of options come and go with versions."""
  known = {}
  for name, value in options.items():
    try:
      jax.jit(lambda x: x, compiler_options={name: value}).lower(0.0).compile()
      known[name] = value
    except Exception as e:  # XLA has no common class
      print(f'config.train.xla_options.{name} is left out: {" ".join(str(e).split())[:200]}', flush=True)
  return known
