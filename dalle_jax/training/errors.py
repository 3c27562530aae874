"""How a script ends when something is wrong: with one line for a user's mistake, with a traceback for a bug of ours."""

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags

from dalle_jax.training import distributed
from dalle_jax.training.metrics import Diverged

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = (ValueError, OSError, flags.Error, Diverged)  # what a script catches and passes to `report`
DIVERGED = 3  # exit status of train.py; 1 is that of Python for an error that is not caught
STOPPED = 143  # exit status after Ctrl-C, and of train.py after SIGTERM
_interrupted = False


def tidy_output() -> None:
  """For scripts of our own: from now on names of files need not be Unicode to be printed, and echoes are hidden."""
  sys.unraisablehook = _show_unraisable
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='backslashreplace')


def _show_unraisable(args: Any, show: Callable[[Any], object] = sys.unraisablehook) -> None:
  """When a save fails, each of its other writes still reports to an event loop that has ended: that says nothing."""
  if not (isinstance(args.exc_value, RuntimeError) and str(args.exc_value) == 'Event loop is closed'):
    show(args)


def report(e: Exception, debug: bool) -> int:
  """Prints one line (and the traceback, with `debug`) and returns the exit status: `DIVERGED`, or 2 for all else.

  Errors raised by our own code are meant for the user; those from inside a library are bugs and keep their traceback.
  One of several processes does not return but ends here, with that status or `distributed.LOST`.
  """
  if distributed.is_loss(e):
    distributed.lost(str(e))
  file = traceback.extract_tb(e.__traceback__)[-1].filename
  ours = isinstance(e, (OSError, flags.Error)) or (str(ROOT) in file and 'site-packages' not in file)
  if debug or not ours:
    traceback.print_exception(e)
  text, status = ' '.join(str(e).split()), DIVERGED if isinstance(e, Diverged) else 2
  print(f'error: {distributed.who()}{text}', file=sys.stderr, flush=True)
  distributed.end(status, text)
  return status


def interrupted(text: str) -> int:
  """Prints one line after Ctrl-C and returns the exit status; one of several processes ends here, as in `report`."""
  global _interrupted
  print(text, file=sys.stderr, flush=True)
  distributed.end(STOPPED, text)
  _interrupted = True
  return STOPPED


def leave(status: int) -> NoReturn:
  """Ends the program like `sys.exit`, but at once after `interrupted`: XLA crashes if Python ends while it compiles.

  What must not be lost, such as a save in progress, has been waited for when KeyboardInterrupt left the loop.
  """
  if _interrupted:
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError):  # such as a closed pipe
        stream.flush()
    os._exit(status)
  sys.exit(status)


def command(
  argv: Sequence[str],
  values: flags.FlagValues,
  run: Callable[[], None],
  text: str,
  hint: str,
  stopped: str = 'stopped.',
) -> int:
  """Runs a script with the flags `values`, one of which is `debug`, or prints its help `text`; returns the exit status.

  `hint` completes the error about an argument that is not a flag: it says what it should have been. `stopped` is
  printed after Ctrl-C.
  """
  if {'-h', '--help'} & set(argv[1:]):
    print(f'{text}\n{values.get_help()}')
    return 0
  tidy_output()
  try:
    if rest := values(list(argv))[1:]:
      raise ValueError(f'arguments {rest} are not understood; {hint}')
    run()
  except EXPECTED as e:
    return report(e, '--debug' in argv)
  except KeyboardInterrupt:
    return interrupted(stopped)
  return 0
