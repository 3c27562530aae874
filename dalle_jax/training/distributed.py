"""Runs several processes as one: they find each other, agree on where to stop, and end together.

`jax.distributed` has a key-value store on process 0. The keys used here are 'stop', with which one process asks all to
stop at the same step; 'at/I', the step that process I had reached by then; 'written', to wait for process 0; and
'failed', with which a process that ends early tells the others why. A killed process says nothing; the others notice a
broken connection, or its silence.
"""

import atexit
import contextlib
import ctypes
import hashlib
import itertools
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from absl import flags
from jax._src import distributed as runtime  # JAX has no public name for the store
from jax.experimental import multihost_utils

LOST = 75  # exit status when other processes are gone: the run should be started again
# How JAX's errors begin that mean the loss of a process or of the network. The unclear ones may have other causes, and
# count only if one of the words below is in their text.
LOSS_CODES = ('UNAVAILABLE', 'DEADLINE_EXCEEDED', 'ABORTED', 'CANCELLED', 'DATA_LOSS')
UNCLEAR_CODES = ('INTERNAL', 'UNKNOWN', 'FAILED_PRECONDITION')
LOSS_WORDS = ('nccl', 'gloo', 'connect', 'peer', 'remote', 'socket', 'network', 'heartbeat', 'timed out', 'timeout')
HEARD = 0.5  # seconds in which the others learn why this process ends, and print it
FOREVER = 2**31 - 1  # milliseconds
PREFIX = 'dalle_jax/'
_ending = threading.Lock()  # whoever ends this process never releases it, so that only one line is printed


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags that `join` reads."""
  flags.DEFINE_bool('distributed', False, 'join the processes of Slurm, a TPU pod or Open MPI', flag_values=values)
  flags.DEFINE_string('coordinator', '', 'HOST:PORT of process 0, with --processes and --process', flag_values=values)
  flags.DEFINE_integer('processes', 0, 'number of processes', 0, flag_values=values)
  flags.DEFINE_integer('process', -1, 'index of this process, from 0', -1, flag_values=values)
  flags.DEFINE_integer('join_timeout', 300, 'seconds to wait for all processes', 1, flag_values=values)
  flags.DEFINE_integer('silence', 60, 'seconds after which a silent process counts as lost', 1, flag_values=values)


def _runtime() -> Any:
  return runtime.global_state


def joined() -> bool:
  """Whether `join` has made this process one of several."""
  return jax.distributed.is_initialized()


def who() -> str:
  """A prefix for messages: 'process 1 of 2: ', or '' for a single process."""
  return f'process {_runtime().process_id} of {_runtime().num_processes}: ' if joined() else ''


def join(options: Any) -> None:
  """Joins the other processes if the flags say that there are any; from then on only process 0 prints.

  Raises ValueError for flags that do not go together or an environment that does not name the other processes, OSError
  if process 0 cannot be reached within `join_timeout` seconds. If it can be but others do not come, this process ends.
  """
  explicit = {'coordinator': options.coordinator, 'processes': options.processes, 'process': options.process >= 0}
  if not (options.distributed or any(explicit.values())):
    return
  given: dict[str, Any] = {}
  if any(explicit.values()):
    if missing := [f'--{name}' for name, value in explicit.items() if not value]:
      raise ValueError(
        f'missing {" and ".join(missing)}; give --coordinator=HOST:PORT, --processes=N and --process=I together.'
      )
    host, _, port = options.coordinator.rpartition(':')
    if not host or not port.isdigit():
      raise ValueError(
        f'--coordinator {options.coordinator!r} is not a HOST:PORT; give that of process 0, e.g. node1:7733.'
      )
    if options.process >= options.processes:
      raise ValueError(f'--process {options.process} is not one of {options.processes}; processes are numbered from 0.')
    given = dict(coordinator_address=options.coordinator, num_processes=options.processes, process_id=options.process)
    given['cluster_detection_method'] = 'deactivate'
    if options.process:
      _reach(host, int(port), options.join_timeout)
  jax.config.update('jax_enable_preemption_service', False)  # it would intercept SIGTERM, and handles nothing else
  _on_abort(
    f'the others are gone, have been silent for {options.silence} s, or did not come within {options.join_timeout} s'
  )
  try:
    jax.distributed.initialize(
      **given,
      initialization_timeout=options.join_timeout,
      heartbeat_timeout_seconds=options.silence,
      shutdown_timeout_seconds=options.silence,
    )
  except ValueError as e:
    raise ValueError(
      '--distributed found neither Slurm nor a TPU pod nor Open MPI, which would say which processes there are; '
      f'give --coordinator=HOST:PORT --processes=N --process=I ({e}).'
    ) from e
  except jax.errors.JaxRuntimeError as e:
    raise OSError(f'the processes cannot be joined: {" ".join(str(e).split())[:400]}') from e
  if _runtime().process_id:
    sys.stdout = open(os.devnull, 'w')  # noqa: SIM115 (for as long as the process lives)
  sys.excepthook = _excepthook
  listeners = [threading.Thread(target=target, daemon=True) for target in (_await_failure, _await_stop)]
  for listener in listeners:
    listener.start()
  atexit.register(_leave, listeners)


def _reach(host: str, port: int, seconds: float) -> None:
  """Waits for process 0. Raises OSError with one line, where the runtime would abort with a page of text."""
  end = time.monotonic() + seconds
  while True:
    try:
      # An IPv6 address is in brackets before its port, but not here.
      socket.create_connection((host.strip('[]'), port), timeout=max(end - time.monotonic(), 0.1)).close()
      return
    except OSError as e:
      if time.monotonic() >= end:
        raise OSError(
          f'process 0 does not answer at {host}:{port} within {seconds} s ({e}); start it with the same flags and '
          '--process=0, or correct --coordinator.'
        ) from e
      time.sleep(0.2)


# --- The end


_saved: Callable[[], str] = lambda: 'nothing is saved yet'
_left = threading.Event()  # an orderly shutdown: what the threads below receive from then on is not a failure


def keeps(describe: Callable[[], str]) -> None:
  """Registers a description of what is left of the run when other processes are lost, for the message."""
  global _saved
  _saved = describe


def end(status: int, reason: str) -> None:
  """Ends this process at once, telling the others why; does nothing for a single process. The caller prints the error.

  It does so at once because an orderly end would wait for the others, and they wait for this process.
  """
  if not joined():
    return
  _ending.acquire()
  with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first
    _runtime().client.key_value_set(f'{PREFIX}failed', f'{status} {who()}{reason}')
  time.sleep(HEARD)
  _exit(status)


def lost(why: str, status: int = LOST) -> NoReturn:
  """Ends this process with a line about the loss of others; `status` is that of the process that failed, if known."""
  _ending.acquire()
  again = ' Start all processes again to resume from there.' if status == LOST else ''
  print(f'error: {who()}{" ".join(why.split())[:400]}; {_saved()}.{again}', file=sys.stderr)
  _exit(status)


def is_loss(e: BaseException) -> bool:
  """Whether this error is how the loss of another process shows up in the middle of a joint computation.

  Errors that every new start would repeat, such as running out of memory, do not count: starting again would not help.
  """
  if not joined() or not isinstance(e, jax.errors.JaxRuntimeError):
    return False
  code, _, text = str(e).partition(':')
  return code in LOSS_CODES or (code in UNCLEAR_CODES and any(word in text.lower() for word in LOSS_WORDS))


def _exit(status: int) -> NoReturn:
  if _runtime().process_id == 0:  # the store goes with it, and then the runtime of the others aborts
    time.sleep(2 * HEARD)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def _leave(listeners: Sequence[threading.Thread]) -> None:
  """Waits for the others to reach the end of the program, too, and ends the threads that listen to them."""
  _left.set()
  jax.distributed.shutdown()
  for listener in listeners:
    listener.join()
  signal.signal(signal.SIGABRT, signal.SIG_DFL)


def _excepthook(kind: type[BaseException], e: BaseException, trace: Any) -> None:
  if is_loss(e):
    lost(str(e))
  traceback.print_exception(kind, e, trace)
  end(1, f'{kind.__name__}: {e}')


def _await_failure() -> None:
  try:
    status, _, reason = _runtime().client.blocking_key_value_get(f'{PREFIX}failed', FOREVER).partition(' ')
  except jax.errors.JaxRuntimeError as e:
    status, reason = LOST, f'process 0 is gone ({e})'
  if not _left.wait(0.1):
    lost(reason, int(status))


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(number: int) -> None:
  lost(_abort_reason)


_abort_reason = ''


def _on_abort(reason: str) -> None:
  """Prints our line when the runtime gives up: it calls abort() from its own thread, and has no hook for that."""
  global _abort_reason
  _abort_reason = reason
  ctypes.CDLL(None).signal(signal.SIGABRT, _aborted)


# --- Stopping at the same step

_step_lock = threading.Lock()
_steps, _step, _stop_at = itertools.count(1), 0, 0


def ask_to_stop() -> None:
  """Makes all processes stop at a step that none of them has begun."""
  _runtime().client.key_value_set(f'{PREFIX}stop', 'now', allow_overwrite=True)


def reached_stop() -> bool:
  """Whether to stop at this step; every process calls it once per step. It does not use the network."""
  global _step
  with _step_lock:
    _step = next(_steps)
    return _step == _stop_at


def _await_stop() -> None:
  """When asked to stop, all processes publish their step while none proceeds; they stop one step after the farthest."""
  global _stop_at
  client, index, count = _runtime().client, _runtime().process_id, _runtime().num_processes
  try:
    client.blocking_key_value_get(f'{PREFIX}stop', FOREVER)
    with _step_lock:
      client.key_value_set(f'{PREFIX}at/{index}', str(_step))
      others = (client.blocking_key_value_get(f'{PREFIX}at/{i}', FOREVER) for i in range(count))
      _stop_at = max(map(int, others)) + 1
  except jax.errors.JaxRuntimeError:
    return  # the end of the run, or a failure that the other thread reports


# --- Agreement


def check_same(facts: Mapping[str, str], among: int = 0) -> None:
  """Raises ValueError naming those `facts` in which processes that pass the same number `among` differ."""
  if joined():
    sums = [int(hashlib.sha256(v.encode()).hexdigest()[:8], 16) for v in facts.values()]
    everyone = multihost_utils.process_allgather(np.array([among, *sums], np.uint32)).reshape(-1, 1 + len(facts))
    groups, columns = everyone[:, 0].tolist(), everyone[:, 1:].T.tolist()
    agree = lambda column: len(set(zip(groups, column, strict=True))) == len(set(groups))
    if differing := [name for name, column in zip(facts, columns, strict=True) if not agree(column)]:
      raise ValueError(
        f'the processes differ in {", ".join(differing)}; start all of them with the same flags, code and data.'
      )


_written = itertools.count(1)


def wait_for_first() -> None:
  """Makes the others wait until process 0 gets here too, however long it takes to write the results.

  At the end of the program all wait for each other as well, but only for `silence` seconds.
  """
  if not joined():
    return
  written = f'{PREFIX}written/{next(_written)}'
  if _runtime().process_id == 0:
    _runtime().client.key_value_set(written, 'yes')
  else:
    _runtime().client.blocking_key_value_get(written, FOREVER)


def check_shared(directory: Path, seconds: float = 10.0) -> None:
  """Raises OSError unless all processes see the same `directory`, if only with a delay."""
  if not joined():
    return
  mark = int(multihost_utils.broadcast_one_to_all(np.int32(time.time() % 2**31)))
  path = directory / f'.shared_{mark}'
  if jax.process_index() == 0:
    path.touch()
  multihost_utils.sync_global_devices('marked')
  end = time.monotonic() + seconds
  while not path.exists() and time.monotonic() < end:
    time.sleep(0.1)
  shared = path.exists()
  multihost_utils.sync_global_devices('seen')
  if jax.process_index() == 0:
    path.unlink()
  if not shared:
    raise OSError(
      f'{directory.absolute()} is not the same as on process 0; it must be on storage that all processes share.'
    )
