"""What the memory allocator of the host and the compiler have to know."""

import ctypes
import platform
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -2, -3, -4, -8  # of glibc's malloc.h


def keep_memory() -> None:
  """Freed memory stays with this process, for the next step; does nothing where malloc is not glibc's.

  XLA on the CPU frees its buffers after every step. By default glibc gives large ones back to the kernel, which then
  clears each page of them anew: a quarter of the time of a step of the quickstart's DALL-E.
  """
  _mallopt({_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 2**26, _ARENA_MAX: 1})


def give_back_memory() -> None:
  """Freed memory goes back to the kernel at once, for a process that handles large arrays one after the other."""
  _mallopt({_MMAP_THRESHOLD: 2**20, _ARENA_MAX: 2})


def _mallopt(options: Mapping[int, int]) -> None:
  if platform.libc_ver()[0] == 'glibc':
    for option, value in options.items():
      ctypes.CDLL(None).mallopt(option, value)


def known_options(options: Mapping[str, Any], where: Sharding) -> dict[str, Any]:
  """Those of `options` that the compiler for the devices of `where` knows; others are named, as they come and go."""
  known, number = {}, jax.ShapeDtypeStruct((), jnp.float32, sharding=where)
  for name, value in options.items():
    try:
      jax.jit(lambda x: x, compiler_options={name: value}).lower(number).compile()
      known[name] = value
    except Exception as e:  # XLA has no common class
      print(f'config.train.xla_options.{name} is left out: {" ".join(str(e).split())[:200]}', flush=True)
  return known
