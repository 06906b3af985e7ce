"""The records of a run: `metrics.jsonl` and TensorBoard events."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from typing import IO, Any, Self

import numpy as np

from skipinit_jax.errors import UsageError
from skipinit_jax.files import (
  METRICS,
  TENSORBOARD,
  Path,
  from_json,
  in_bucket,
  to_json,
  workdir_path,
)

# The bins of TensorBoard's own histograms. They end at 1e19, and tensorboardX raises an
# error if all numbers are beyond.
_BINS = 1e-12 * 1.1 ** np.arange(774)
_BINS = np.concatenate([-_BINS[::-1], [0], _BINS])
_LARGEST = 1e19
# Buckets take a file at most once a second, and each time costs money.
_BUCKET_SECONDS = 30.0


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Reads the rows of a run, finished or not.

  Returns:
    The rows in the order of writing, with non-finite numbers as floats again. A last
    line that is still being written is left out.

  Raises:
    UsageError: the file does not exist or holds a line that is no JSON object.
  """
  path = workdir_path(workdir) / METRICS
  if not path.is_file():
    raise UsageError(f"There are no metrics at {path}: it is not a run's workdir.")
  return _read_rows(path)


class MetricsWriter:
  """Appends the rows of one run to `metrics.jsonl` and to TensorBoard.

  A row is on its way to the disk when `write` returns, so that a killed process loses
  at most the row it was writing. In a bucket it loses the rows of half a minute, but
  none from before a `flush`.

  Attributes:
    kinds: the kinds of the rows that are in the file.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    resume_step: int | None,
    enabled: bool = True,
  ):
    """Opens the records, dropping the rows that the run will write again.

    Args:
      workdir: an existing directory; TensorBoard's events are in its `tensorboard`.
      resume_step: the step of the restored checkpoint: rows of later steps are
        dropped. None where training starts from the beginning: all rows are.
      enabled: False writes nothing, as in all processes of a run but one.

    Raises:
      UsageError: `metrics.jsonl` is damaged.
    """
    self.kinds: set[str] = set()
    self._enabled = enabled
    if not enabled:
      return
    workdir = workdir_path(workdir)
    path = workdir / METRICS
    first_step = 0 if resume_step is None else resume_step + 1
    rows = _read_rows(path) if path.exists() else []
    kept = [row for row in rows if row["step"] < first_step]
    self.kinds = {str(row.get("kind")) for row in kept}
    self._rows: IO[str] | _BucketFile
    if in_bucket(path):
      self._rows = _BucketFile(path, map(_to_line, kept))
    else:
      unfinished = path.with_name(path.name + ".tmp")
      unfinished.write_text("".join(map(_to_line, kept)), encoding="utf-8")
      os.replace(unfinished, path)
      # Line buffering hands each row to the system in one piece.
      self._rows = path.open("a", encoding="utf-8", buffering=1)
    self._tensorboard = _TensorBoard(workdir / TENSORBOARD, first_step)

  def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
    """Appends one row.

    The row has all values. TensorBoard gets the finite ones as `kind/name`, a list as a
    histogram of its numbers up to 1e19.

    Args:
      step: the number of training steps taken.
      kind: "train", "eval" or "signal".
      values: numbers by name, such as epoch, loss and accuracy; None where a number
        is not known; lists of numbers or of names, an entry for each block.
    """
    if not self._enabled:
      return
    self._rows.write(_to_line({"step": step, "kind": kind, **values}))
    self.kinds.add(kind)
    for name, value in values.items():
      if isinstance(value, list):
        shown = [each for each in value if _is_finite(each) and abs(each) < _LARGEST]
        if shown:
          self._tensorboard.write(step, f"{kind}/{name}", np.array(shown))
      elif _is_finite(value):
        self._tensorboard.write(step, f"{kind}/{name}", float(value))
    self._tensorboard.flush()

  def flush(self) -> None:
    """Writes out all rows, before a checkpoint from which a resumed run goes on."""
    if self._enabled:
      self._rows.flush()

  def close(self) -> None:
    """Writes out everything and closes the files."""
    if self._enabled:
      with contextlib.closing(self._tensorboard):
        self._rows.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


class _BucketFile:
  """A text file that grows, in a bucket, which takes a file as a whole."""

  def __init__(self, path: Path, lines: Iterable[str]):
    self._path = path
    self._lines = [*lines]
    self._is_written = False
    self._written_at = time.monotonic()

  def write(self, line: str) -> None:
    self._lines.append(line)
    self._is_written = False
    if time.monotonic() - self._written_at >= _BUCKET_SECONDS:
      self.flush()

  def flush(self) -> None:
    if not self._is_written:
      self._path.write_text("".join(self._lines), encoding="utf-8")
      self._is_written, self._written_at = True, time.monotonic()

  def close(self) -> None:
    self.flush()


class _TensorBoard:
  """Writes TensorBoard's events, in the calling thread.

  tensorboardX's `SummaryWriter` has a thread for it. On a full disk that thread ends
  with a stack trace, the caller sees no error, and the process never exits.
  """

  def __init__(self, directory: Path, first_step: int):
    """Opens a file of events; TensorBoard hides older ones from `first_step` on."""
    # Imported here: a study only reads metrics.
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    self._summary, self._event = summary, Event
    self._seconds = _BUCKET_SECONDS if in_bucket(directory) else 1.0
    if not in_bucket(directory):
      directory.mkdir(exist_ok=True)
    # The name holds only the second: a quick resume would overwrite what it follows.
    self._writer = EventsWriter(str(directory / "events"), f".{first_step}")
    start = SessionLog(status=SessionLog.START)
    self._writer.write_event(
      Event(wall_time=time.time(), step=first_step, session_log=start)
    )
    self._flushed_at = -math.inf

  def write(self, step: int, tag: str, value: float | np.ndarray) -> None:
    """Adds a scalar, or an array as a histogram."""
    if isinstance(value, np.ndarray):
      summary = self._summary.histogram(tag, value, _BINS)
    else:
      summary = self._summary.scalar(tag, value)
    self._writer.write_event(
      self._event(wall_time=time.time(), step=step, summary=summary)
    )

  def flush(self) -> None:
    """Writes out all events, unless it did so a moment ago."""
    # It waits for the disk, in network file systems for many milliseconds.
    if time.monotonic() - self._flushed_at >= self._seconds:
      self._writer.flush()
      self._flushed_at = time.monotonic()

  def close(self) -> None:
    """Writes out all events and closes the file."""
    self._writer.close()


def _is_finite(value: Any) -> bool:
  return value is not None and not isinstance(value, str) and math.isfinite(value)


def _to_line(row: Mapping[str, Any]) -> str:
  return json.dumps(to_json(row), allow_nan=False) + "\n"


def _read_rows(path: Path) -> list[dict[str, Any]]:
  # What follows the last newline is a row that a killed process did not finish.
  *lines, _ = path.read_bytes().decode("utf-8", "replace").split("\n")
  rows = []
  for number, line in enumerate(lines, start=1):
    try:
      row = from_json(json.loads(line))
      row["step"] = int(row["step"])
    except (ValueError, KeyError, TypeError):
      raise UsageError(
        f"Line {number} of {path} is damaged: remove that line, or the file."
      ) from None
    rows.append(row)
  return rows
