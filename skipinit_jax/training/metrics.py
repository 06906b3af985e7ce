"""The records of a run: `metrics.jsonl` and TensorBoard events."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any, Self

import numpy as np
from absl import logging

from skipinit_jax.errors import UsageError, extra
from skipinit_jax.files import (
  ABSENT,
  METRICS,
  RESULT,
  TENSORBOARD,
  Path,
  in_bucket,
  parse_json,
  reading,
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
_MOST_NAMED = 10
# The metrics by which TensorBoard compares runs.
_COMPARED = ("eval/accuracy", "eval/loss", "train/accuracy", "train/loss")


OnMetrics = Callable[[int, str, Mapping[str, Any]], None]
"""Takes a step, a kind of row and its values, as `MetricsWriter.write` does."""


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Reads the rows of a run, finished or not.

  Returns:
    The rows in the order of writing, with non-finite numbers as floats again. A last
    line that is still being written is left out, and so is a damaged one, with a
    warning.

  Raises:
    UsageError: the file cannot be read, or it does not exist and there is no result
      beside it.
  """
  workdir = workdir_path(workdir)
  path = workdir / METRICS
  try:
    return _read_rows(path)[0]
  except ABSENT:
    if not (workdir / RESULT).exists():
      raise UsageError(
        f"There are no metrics at {path}: it is not a run's workdir."
      ) from None
    logging.warning("The metrics of a run are lost: there is no file %s.", path)
    return []


def warn_of_lost_epochs(
  workdir: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]], epochs: int
) -> None:
  """Says which epochs of a run have no row, as where its file was cut.

  Args:
    rows: those that are left.
    epochs: how many have ended.
  """
  ended = [row.get("epoch") for row in rows if row["kind"] == "train"]
  found = {epoch for epoch in ended if isinstance(epoch, int | float)}
  lost = [str(epoch) for epoch in range(1, epochs + 1) if epoch not in found]
  if lost:
    logging.warning(
      "%s lacks the metrics of %d of %d epochs (%s): they are lost, the rest is not.",
      workdir_path(workdir) / METRICS,
      len(lost),
      epochs,
      ", ".join(lost[:_MOST_NAMED]) + ", ..." * (len(lost) > _MOST_NAMED),
    )


class MetricsWriter:
  """Appends the rows of one run to `metrics.jsonl` and to TensorBoard.

  A row is on its way to the disk when `write` returns, so that a killed process loses
  at most the row it was writing. In a bucket it loses the rows of half a minute, but
  none from before a `flush`.

  Attributes:
    kinds: the kinds of the rows that are in the file.
    kept: the rows that were in the file, and stay.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    resume_step: int | None,
    hyperparameters: Mapping[str, Any] | None = None,
    enabled: bool = True,
    on_metrics: OnMetrics | None = None,
  ):
    """Opens the records, dropping the rows that the run will write again.

    Args:
      workdir: an existing directory; TensorBoard's events are in its `tensorboard`.
      resume_step: the step of the restored checkpoint: rows of later steps are
        dropped. None where training starts from the beginning: all rows are.
      hyperparameters: values by name, by which TensorBoard compares runs: numbers,
        texts, tuples of texts, and None, which it is not told.
      enabled: False writes nothing, as in all processes of a run but one.
      on_metrics: is called with each row that is written.

    Raises:
      UsageError: `metrics.jsonl` cannot be read.
    """
    self.kinds: set[str] = set()
    self.kept: list[dict[str, Any]] = []
    self._enabled = enabled
    self._on_metrics = on_metrics
    if not enabled:
      return
    workdir = workdir_path(workdir)
    path = workdir / METRICS
    first_step = 0 if resume_step is None else resume_step + 1
    try:
      rows, damaged = _read_rows(path)
    except FileNotFoundError:
      rows, damaged = [], False
    if damaged:
      copy = path.with_name(path.name + ".damaged")
      copy.write_bytes(path.read_bytes())
      logging.warning("The file with those lines is kept as %s.", copy)
    self.kept = [row for row in rows if row["step"] < first_step]
    self.kinds = {row["kind"] for row in self.kept}
    self._rows: IO[str] | _BucketFile
    if in_bucket(path):
      self._rows = _BucketFile(path, map(_to_line, self.kept))
    else:
      unfinished = path.with_name(path.name + ".tmp")
      unfinished.write_text("".join(map(_to_line, self.kept)), encoding="utf-8")
      os.replace(unfinished, path)
      # Line buffering hands each row to the system in one piece.
      self._rows = path.open("a", encoding="utf-8", buffering=1)
    self._tensorboard = _TensorBoard(workdir / TENSORBOARD, first_step)
    if hyperparameters is not None:
      self._tensorboard.write_hyperparameters(hyperparameters)

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
    if self._on_metrics is not None:
      self._on_metrics(step, kind, values)

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


@contextlib.contextmanager
def hidden(package: str) -> Iterator[None]:
  """Lets what the block imports find that an optional package is missing.

  tensorboardX imports PyTorch where it is installed, for its annotations alone. That is
  half of the start of a run.
  """
  modules: dict[str, Any] = sys.modules
  hide = package not in modules
  if hide:
    modules[package] = None
  try:
    yield
  finally:
    if hide:
      del modules[package]


class _TensorBoard:
  """Writes TensorBoard's events, in the calling thread.

  tensorboardX's `SummaryWriter` has a thread for it. On a full disk that thread ends
  with a stack trace, the caller sees no error, and the process never exits.
  """

  def __init__(self, directory: Path, first_step: int):
    """Opens a file of events; TensorBoard hides older ones from `first_step` on."""
    # Imported here: a study only reads metrics.
    with extra("train"), hidden("torch"):
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

  def write_hyperparameters(self, values: Mapping[str, Any]) -> None:
    """Adds what the plugin "HParams" shows of a run, beside its last metrics."""
    texts = {n: ", ".join(v) if isinstance(v, tuple) else v for n, v in values.items()}
    for summary in self._summary.hparams(texts, dict.fromkeys(_COMPARED)):
      self._writer.write_event(self._event(wall_time=time.time(), summary=summary))

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


def _read_rows(path: Path) -> tuple[list[dict[str, Any]], bool]:
  """Returns the rows of a file, and whether damaged ones are missing there."""
  with reading(path):
    content = path.read_bytes()
  # What follows the last newline is a row that a killed process did not finish.
  *lines, _ = content.split(b"\n")
  rows, damaged = [], []
  for number, line in enumerate(lines, start=1):
    with contextlib.suppress(ValueError):
      row = parse_json(line)
      if _is_row(row):
        rows.append(row)
        continue
    damaged.append(str(number))
  if damaged:
    logging.warning(
      "%s is damaged: what its line%s %s said is lost, and left out.",
      path,
      "s" * (len(damaged) > 1),
      ", ".join(damaged),
    )
  return rows, bool(damaged)


def _is_row(row: Any) -> bool:
  """Tells whether a value of JSON is what `MetricsWriter.write` writes."""
  if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
    return False
  step = row.get("step")
  numbers: list[Any] = []
  for name in row.keys() - {"kind", "blocks"}:
    numbers += row[name] if isinstance(row[name], list) else [row[name]]
  return (
    isinstance(step, int)
    and step >= 0
    and all(each is None or type(each) in (int, float) for each in numbers)
  )
