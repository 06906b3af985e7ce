"""Locks on directories, which end with the process that holds them."""

import os
import sys
from typing import IO, Self

from skipinit_jax.errors import UsageError

# Windows has none: there two runs in one workdir go unnoticed.
if sys.platform != "win32":
  import fcntl


class LockedError(UsageError):
  """What a lock stands for is in use."""


class Lock:
  """Keeps a file locked, so that one process at a time uses what it stands for.

  Example::

    with Lock(workdir / "lock"):
      ...
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Takes the lock.

    Args:
      path: the file, in an existing directory. It stays when the lock ends.

    Raises:
      LockedError: another process or thread holds it.
    """
    self._file = open(path, "ab")  # noqa: SIM115
    if not _lock(self._file, exclusive=True):
      self._file.close()
      raise LockedError(
        f"The workdir {os.path.dirname(path)} is in use by another run: wait until "
        "that ends, or use another --workdir."
      )

  def close(self) -> None:
    """Ends the lock."""
    self._file.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


def is_locked(path: str | os.PathLike[str]) -> bool:
  """Returns whether a process holds the `Lock` on a file.

  Args:
    path: the file, which need not exist.
  """
  try:
    # A shared lock, because two processes may ask at the same time, and because network
    # file systems give no other on a file that is only read.
    with open(path, "rb") as file:
      return not _lock(file, exclusive=False)
  except OSError:
    return False


def _lock(file: IO[bytes], *, exclusive: bool) -> bool:
  if sys.platform == "win32":
    return True
  try:
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    fcntl.flock(file, kind | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError:
    # Some network file systems have no locks.
    return True
  return True
