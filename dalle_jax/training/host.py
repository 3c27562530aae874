"""Settings of the host's memory allocator and of the compiler."""

import ctypes
import platform
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -2, -3, -4, -8  # from glibc's malloc.h


def keep_memory() -> None:
  """Keeps freed memory in this process, for the next step; does nothing unless malloc is glibc's.

  XLA on the CPU frees its buffers after every step. By default glibc returns large ones to the kernel, which then has
  to clear each of their pages again: a quarter of the time of a step of the quickstart's DALL-E.
  """
  _mallopt({_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 2**26, _ARENA_MAX: 1})


def give_back_memory() -> None:
  """Returns freed memory to the kernel at once, for a process that handles large arrays one after the other."""
  _mallopt({_MMAP_THRESHOLD: 2**20, _ARENA_MAX: 2})


def _mallopt(options: Mapping[int, int]) -> None:
  if platform.libc_ver()[0] == 'glibc':
    for option, value in options.items():
      ctypes.CDLL(None).mallopt(option, value)


def known_options(options: Mapping[str, Any], where: Sharding) -> dict[str, Any]:
  """The `options` that the compiler for the devices of `where` accepts; prints the others, as flags come and go."""
  known = {}
  for name, value in options.items():
    if error := _refusal(name, value, where):
      print(f'config.train.xla_options.{name} is left out: {error[:200]}', flush=True)
    else:
      known[name] = value
  return known


def convolution_options(where: Sharding) -> dict[str, Any]:
  """The options with which convolutional networks train fastest, as far as the compiler for `where` has them.

  On CPUs, XLA of jax 0.10 hands more than matrix products to YNNPACK otherwise: steps of a VQGAN then take up to twice
  as long, but those of a transformer a tenth less.
  """
  if next(iter(where.device_set)).platform != 'cpu':
    return {}
  options = {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT'}
  return {name: value for name, value in options.items() if not _refusal(name, value, where)}


def _refusal(name: str, value: Any, where: Sharding) -> str:
  """What the compiler for the devices of `where` says against an option, in one line; '' if it accepts it."""
  number = jax.ShapeDtypeStruct((), jnp.float32, sharding=where)
  try:
    jax.jit(lambda x: x, compiler_options={name: value}).lower(number).compile()
  except Exception as e:  # XLA's errors have no common class
    return ' '.join(str(e).split())
  return ''
