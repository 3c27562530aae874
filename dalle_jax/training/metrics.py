"""Where the metrics and images of a run go: metrics.jsonl (the source of truth), TensorBoard, PNGs, the terminal."""

import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from PIL import Image
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

# Dense bf16 FLOP/s of one device, a chip (vendors' data sheets) or on TPU v3 half of one, by whole words of
# jax.Device.device_kind; the first match wins.
PEAK_FLOPS = {
  'TPU v6': 918e12, 'TPU v6e': 918e12, 'TPU v5 lite': 197e12, 'TPU v5e': 197e12, 'TPU v5': 459e12, 'TPU v5p': 459e12,
  'TPU v4': 275e12, 'TPU v3': 61.5e12,
  'GB200': 2500e12, 'B200': 2250e12, 'GH200': 989e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100': 989e12,
  'A100': 312e12, 'L40S': 362e12, 'L40': 181e12, 'L4': 121e12, 'A10G': 70e12, 'A10': 125e12,
  'V100': 125e12, 'T4': 65e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12,
}  # fmt: skip


def peak_flops(device: jax.Device) -> float | None:
  """Peak dense bf16 FLOP/s of a device, or None for a CPU or an unknown device."""
  named = lambda kind: re.search(rf'\b{kind}\b', device.device_kind, re.IGNORECASE)
  return next((flops for kind, flops in PEAK_FLOPS.items() if named(kind)), None)


class Board:
  """Event files in `path` for TensorBoard, which discards what earlier files hold from step `purge` on.

  The metrics are stored elsewhere too, so an error while writing here ends the board with a warning, not the run.
  Events are written in this thread: tensorboardX's SummaryWriter hands them to one of its own, and once that thread has
  died of a full disk, the next events block the training loop for ever.
  """

  FLUSH_EVERY = 30.0  # seconds

  def __init__(self, path: Path, purge: int):
    self.events: EventsWriter | None = None
    self.flushed = time.monotonic()
    try:
      path.mkdir(parents=True, exist_ok=True)
      self.events = EventsWriter(str(path / 'events'))
    except OSError as e:
      self._give_up(e)
    self.add(purge, session_log=SessionLog(status=SessionLog.START))

  def add(self, step: int, **content: Any) -> None:
    if self.events is None:
      return
    try:
      self.events.write_event(Event(wall_time=time.time(), step=step, **content))
      if time.monotonic() - self.flushed > self.FLUSH_EVERY:
        self.events.flush()
        self.flushed = time.monotonic()
    except OSError as e:
      self._give_up(e)

  def close(self) -> None:
    events, self.events = self.events, None
    if events is not None:
      try:
        events.close()
      except OSError as e:
        self._give_up(e)

  def _give_up(self, e: OSError) -> None:
    self.events = None
    print(f'warning: TensorBoard events cannot be written ({e}); metrics.jsonl continues without them', flush=True)


class Writer:
  """Writes a run's metrics after step `resumed`, in process 0 only. Every step is in the file at most once.

  Removes lines past `resumed` (steps that a crash has undone and that are about to be repeated) and a torn last line.
  """

  def __init__(self, run_dir: str | Path, resumed: int):
    self.active = jax.process_index() == 0
    if not self.active:
      return
    self.run_dir = Path(run_dir)
    path = self.run_dir / 'metrics.jsonl'
    lines = [json.dumps(line) + '\n' for line in read(path) if line['step'] <= resumed]
    partial = path.with_suffix('.tmp')
    partial.write_text(''.join(lines))
    os.replace(partial, path)
    self.file = path.open('a')
    self.board = Board(self.run_dir / 'tb', purge=resumed + 1)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Raises OSError of one line when metrics.jsonl cannot be written, as `close` does."""
    if self.active:
      rounded = {k: v if isinstance(v, int) else float(f'{v:.6g}') for k, v in values.items()}
      with self._named_errors():
        self.file.write(json.dumps({'step': step, **rounded}) + '\n')
        self.file.flush()
      for name, value in values.items():
        self.board.add(step, summary=summary.scalar(name, value))

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """Writes `image` uint8[H, W, 3] to pictures/NAME_STEP.png and TensorBoard."""
    if self.active:
      path = self.run_dir / 'pictures' / f'{name}_{step:07d}.png'
      path.parent.mkdir(exist_ok=True)
      Image.fromarray(image).save(path)
      self.board.add(step, summary=summary.image(name, image, dataformats='HWC'))

  def close(self) -> None:
    if self.active:
      self.board.close()
      with self._named_errors():
        self.file.close()

  @contextlib.contextmanager
  def _named_errors(self) -> Iterator[None]:
    try:
      yield
    except OSError as e:
      text = f'{self.file.name} cannot be written ({e.strerror}); fix this, then run the same command again.'
      raise OSError(text) from e


def read(path: str | Path) -> list[dict]:
  """The lines of a metrics.jsonl, or [] if there is no file; skips lines torn by a crash, which have no step."""
  lines = []
  for text in Path(path).read_text().splitlines() if Path(path).exists() else []:
    try:
      line = json.loads(text)
    except json.JSONDecodeError:
      continue
    if isinstance(line, dict) and isinstance(line.get('step'), int):
      lines.append(line)
  return lines


def logged(run_dir: str | Path, step: int) -> bool:
  """Whether a run has logged metrics for `step`; if not, an evaluation due at that step is still missing."""
  return any(line['step'] == step for line in read(Path(run_dir) / 'metrics.jsonl'))


class Progress:
  """Shows progress and the time left: as a bar on a terminal, otherwise as plain lines; only process 0 prints."""

  def __init__(self, start: int, total: int):
    self.start, self.total, self.begun = start, total, time.monotonic()
    quiet = jax.process_index() != 0
    self.plain = not quiet and not sys.stderr.isatty()
    self.bar = tqdm.tqdm(initial=start, total=total, unit='step', disable=quiet or self.plain, dynamic_ncols=True)

  def print(self, text: str) -> None:
    if jax.process_index() == 0:
      self.bar.write(text) if not self.plain else print(text, flush=True)

  def update(self) -> None:
    self.bar.update()

  def log(self, step: int, values: Mapping[str, float]) -> None:
    text = '  '.join(f'{k} {v:,.0f}' if abs(v) >= 1e4 else f'{k} {v:.4g}' for k, v in values.items() if k != 'seconds')
    left = (time.monotonic() - self.begun) / max(step - self.start, 1) * (self.total - step)
    self.print(
      f'step {step}/{self.total}  {text}' + (f'  {tqdm.tqdm.format_interval(left)} left' if self.plain else '')
    )

  def close(self) -> None:
    self.bar.close()


class SpeedMeter:
  """Measures the speed of training itself: the time spent inside `pause()` does not count.

  `tokens` and `flops` are those of one step, `peak` is the FLOP/s of the whole mesh; each may be 0 or None if unknown.
  """

  def __init__(self, step: int, tokens: int, flops: float, peak: float | None):
    self.tokens, self.flops, self.peak = tokens, flops, peak
    self.restart(step)

  def restart(self, step: int) -> None:
    """Measures from here on."""
    self.step, self.time = step, time.monotonic()

  @contextlib.contextmanager
  def pause(self, pending: jax.Array) -> Iterator[None]:
    """Stops the clock, once `pending` is there: the steps that the device still has to finish count as training."""
    jax.block_until_ready(pending)
    begun = time.monotonic()
    yield
    self.time += time.monotonic() - begun

  def read(self, step: int) -> dict[str, float]:
    """The mean speed since the last reading."""
    rate = (step - self.step) / max(time.monotonic() - self.time, 1e-9)  # steps/s
    self.restart(step)
    values = {'steps_per_second': rate}
    if self.tokens:
      values['tokens_per_second'] = rate * self.tokens
    if self.flops and self.peak:
      values['utilisation'] = rate * self.flops / self.peak
    return values


class Diverged(Exception):
  """A metric or parameter is no longer finite."""


class Log:
  """Logs metrics, and stops at NaN with `guard`; reads them back one step late, so that the device never waits."""

  def __init__(self, writer: Writer, progress: Progress, guard: bool):
    self.writer, self.progress, self.guard = writer, progress, guard
    self.window: list[tuple[int, dict, jax.Array]] = []  # every step since the last check
    self.due: Callable[[], None] | None = None

  def push(self, step: int, metrics: dict[str, jax.Array], finite: jax.Array) -> None:
    self.window.append((step, metrics, finite))

  def schedule(self, derive: Callable[[], dict[str, float]]) -> None:
    """Schedules the newest metrics for logging by the next `read`, which then adds the numbers of `derive()`."""
    window, self.window = self.window, []
    step, metrics, _ = window[-1]
    jax.tree.map(lambda x: x.copy_to_host_async(), (metrics, [finite for _, _, finite in window]))

    def write():
      values = {k: float(v) for k, v in jax.device_get(metrics).items()} | derive()
      self._check(window)
      self.writer.write(step, values)
      self.progress.log(step, values)

    self.due = write

  def read(self) -> None:
    """Writes the metrics that are due, if any."""
    if self.due:
      due, self.due = self.due, None
      due()

  def check(self) -> None:
    """Waits for the newest step. Raises Diverged naming the first step and its metrics that are not finite."""
    self._check(self.window)

  def _check(self, window: list[tuple[int, dict, jax.Array]]) -> None:
    finite = jax.device_get([finite for _, _, finite in window]) if self.guard else []
    if not all(finite):
      step, metrics, _ = window[finite.index(False)]
      bad = [k for k, v in jax.device_get(metrics).items() if not math.isfinite(v)]
      raise Diverged(f'{", ".join(bad)} is not finite at step {step}')
