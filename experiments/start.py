"""What comes before anything else in a program: its streams and its signals.

It imports nothing that takes time, so that a signal finds it in place.
"""

import contextlib
import errno
import os
import signal
import sys
from types import FrameType
from typing import Any, TextIO

INTERRUPTED_STATUS = 4
_STOPPED_STATUS = 128 + signal.SIGINT
INTERRUPTED = "Interrupted with nothing to save: the same command goes on."
STOPPED = "Stopped without saving: the same command goes on from the last checkpoint."


class Output:
  """A stream that ends no run because nobody can read it any more.

  What cannot be written is dropped. All else is as the stream has it.

  Attributes:
    error: why something was dropped; None: nothing was.
  """

  def __init__(self, stream: TextIO) -> None:
    self._stream = stream
    self.error: OSError | None = None

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    """Writes as the stream does."""
    try:
      return self._stream.write(text)
    except OSError as error:
      self._drop(error)
      return len(text)

  def flush(self) -> None:
    """Flushes as the stream does."""
    try:
      self._stream.flush()
    except OSError as error:
      self._drop(error)

  def _drop(self, error: OSError) -> None:
    self.error = self.error or error
    # What the stream still holds, and what libraries write, would fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

  @property
  def is_full(self) -> bool:
    """Whether something was dropped that a reader would have liked to read."""
    return self.error is not None and self.error.errno != errno.EPIPE


def open_streams() -> None:
  """Gives the program each standard stream that its caller has closed."""
  for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
    try:
      os.fstat(descriptor)
    except OSError:
      # The lowest free number, which is this one: a file that is opened later would
      # get it otherwise, and what libraries print.
      os.open(os.devnull, os.O_RDWR)
      os.set_inheritable(descriptor, True)
    stream = getattr(sys, name)
    if stream is None:
      stream = os.fdopen(descriptor, "w" if descriptor else "r", closefd=False)
    wrapped = isinstance(stream, Output) or descriptor == 0
    setattr(sys, name, stream if wrapped else Output(stream))


def end_at_signals() -> None:
  """Ends the program with its documented status, at once, where nobody saves.

  `training.StopRequest` takes the signals for itself meanwhile. An exception would be
  lost in some of the places where a signal finds Python.
  """

  def end(number: int, _: FrameType | None) -> None:
    stopped = number == signal.SIGINT
    with contextlib.suppress(Exception):
      sys.stdout.flush()
      os.write(1, f"{STOPPED if stopped else INTERRUPTED}\n".encode())
    os._exit(_STOPPED_STATUS if stopped else INTERRUPTED_STATUS)

  signal.signal(signal.SIGTERM, end)
  # A shell starts what runs in the background with SIGINT ignored.
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end)


def import_jax() -> None:
  """Imports JAX, which reads its variables of the environment then."""
  try:
    import jax  # noqa: F401
  except ValueError as error:
    sys.exit(f"error: JAX cannot start ({error}): correct that variable.")
