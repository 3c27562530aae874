"""How a run is asked to stop: by SIGTERM or Ctrl-C, at the same step in all of its processes."""

import contextlib
import signal
import threading
from collections.abc import Iterator

import numpy as np
from jax.experimental import multihost_utils

from dalle_jax.training import distributed


class StopSignal:
  """Catches SIGTERM and the first Ctrl-C; a second one acts as usual. With several processes, one stops all of them.

  Within `deferred` they only set `received`. Elsewhere they raise KeyboardInterrupt, too, which may get lost: Python
  ignores exceptions in callbacks, such as that of JAX in the garbage collector.
  """

  def __enter__(self):
    self.received, self.announced, self.raises, self.previous = False, False, True, {}
    if threading.current_thread() is threading.main_thread():
      self.previous = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}
    return self

  def _receive(self, number, frame):
    self.received = True
    self.__exit__()
    if self.raises:
      raise KeyboardInterrupt

  def __exit__(self, *_):
    for number, handler in self.previous.items():
      signal.signal(number, handler)

  @contextlib.contextmanager
  def deferred(self) -> Iterator[None]:
    """Signals wait until `received` is looked at."""
    self.raises = False
    try:
      yield
    finally:
      self.raises = True

  def agreed(self) -> bool:
    """Whether to stop now, which is at the same step in all processes; each of them must call it once per step."""
    if not distributed.joined():
      return self.received
    if self.received and not self.announced:
      self.announced = True
      distributed.ask_to_stop()
    return distributed.reached_stop()

  def received_by_any(self) -> bool:
    """Whether any process has been asked to stop; all processes must call it together."""
    if not distributed.joined():
      return self.received
    return bool(multihost_utils.process_allgather(np.array(self.received)).any())
