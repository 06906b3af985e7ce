"""Live progress on a terminal or in a log: of any task, and of one training run."""

import datetime
import math
import sys
import time
from typing import Self, TextIO

from skipinit_jax.errors import extra

with extra("train"):
  import rich.console
  import rich.progress

# A log has at most so many plain lines, however long the run, and so many seconds
# between two of them.
_MAX_LINES = 100
_MIN_SECONDS = 10.0


class Display:
  """A live bar of one task on a terminal, and lines that stay above it.

  Elsewhere, there are only the lines.
  """

  def __init__(
    self, total: int | None, *, stream: TextIO | None = None, enabled: bool = True
  ):
    """Starts the display.

    Args:
      total: what completes the task; None: not known yet.
      stream: where to write; None is standard error.
      enabled: False shows nothing at all.
    """
    self._stream = sys.stderr if stream is None else stream
    self._enabled = enabled
    self._bar = _start_bar(self._stream, total) if enabled else None

  def message(self, text: str) -> None:
    """Prints a line that stays, above the bar where there is one."""
    if self._bar is not None:
      self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
    elif self._enabled:
      print(text, file=self._stream, flush=True)

  def close(self) -> None:
    """Ends the display, leaving its last state on the terminal."""
    if self._bar is not None:
      self._bar.stop()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


def _start_bar(stream: TextIO, total: int | None) -> rich.progress.Progress | None:
  """Starts a bar with its description beside it; None: the stream cannot show it."""
  if not stream.isatty():
    return None
  # Only whether the stream is a terminal counts: rich also believes variables such as
  # FORCE_COLOR, which would put control characters into a log file.
  console = rich.console.Console(file=stream, force_terminal=True)
  if console.is_dumb_terminal:
    return None
  bar = rich.progress.Progress(
    rich.progress.BarColumn(bar_width=None),
    rich.progress.TextColumn("{task.description}", markup=False),
    console=console,
    expand=True,
    refresh_per_second=4,
    # Standard output may be a file even where standard error is a terminal.
    redirect_stdout=False,
    redirect_stderr=stream is sys.stderr,
  )
  bar.add_task("starting", total=total)
  bar.start()
  return bar


class Progress(Display):
  """Shows the epoch, loss, accuracy, speed and time left of one training run.

  On a terminal that is a live bar. Elsewhere it is a plain line for the first update
  and the last, and in between whenever ten seconds and a hundredth of the run have
  passed, so that short and long logs stay readable.

  Example::

    with Progress(total_steps=1000, steps_per_epoch=100) as progress:
      progress.update(100, loss=2.3, accuracy=0.1, images_per_second=5000.0)
  """

  def __init__(
    self,
    total_steps: int,
    steps_per_epoch: int,
    *,
    title: str = "",
    stream: TextIO | None = None,
    enabled: bool = True,
  ):
    """Starts the display.

    Args:
      total_steps: the steps of the whole run, those before a resume included.
      title: what is trained, to be shown while it is compiled; empty: not shown.
      stream: where to write; None is standard error.
      enabled: False shows nothing at all, as in a study of many runs.
    """
    super().__init__(total_steps, stream=stream, enabled=enabled)
    if title:
      self.message(f"{title}: compiling")
    self._total_steps = total_steps
    self._steps_per_epoch = steps_per_epoch
    self._first: tuple[int, float] | None = None
    self._last_line = (0, -math.inf)

  def update(
    self, step: int, loss: float, accuracy: float, images_per_second: float
  ) -> None:
    """Shows the state of training.

    Args:
      loss: the training loss, which may be non-finite.
      accuracy: the training accuracy, from 0 to 1.
    """
    if not self._enabled:
      return
    now = time.monotonic()
    # Time left counts from the first update: the time before holds compilation, and
    # a resumed run's earlier steps took none.
    self._first = self._first or (step, now)
    epochs = math.ceil(self._total_steps / self._steps_per_epoch)
    status = (
      f"epoch {math.ceil(step / self._steps_per_epoch)}/{epochs}, "
      f"loss {loss:.4f}, accuracy {100 * accuracy:.1f} %, "
      f"{images_per_second:,.0f} images/s, {self._time_left(step, now)} left"
    )
    if self._bar is not None:
      self._bar.update(self._bar.task_ids[0], completed=step, description=status)
    elif self._is_line_due(step, now):
      self._last_line = (step, now)
      self.message(f"step {step}/{self._total_steps}, {status}")

  def _time_left(self, step: int, now: float) -> str:
    assert self._first is not None
    first_step, start = self._first
    if step == first_step:
      return "-:--:--" if step < self._total_steps else "0:00:00"
    seconds = (now - start) / (step - first_step) * (self._total_steps - step)
    return str(datetime.timedelta(seconds=round(seconds)))

  def _is_line_due(self, step: int, now: float) -> bool:
    last_step, last_time = self._last_line
    return (
      math.isinf(last_time)
      or step >= self._total_steps
      or (
        now - last_time >= _MIN_SECONDS
        and (step - last_step) * _MAX_LINES >= self._total_steps
      )
    )
