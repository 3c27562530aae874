"""What the host's memory allocator has to know about training on the CPU."""

import ctypes
import platform

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
