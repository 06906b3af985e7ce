"""A profile of some steps, by JAX's profiler."""

import sys
from typing import Any, Self

import jax

from skipinit_jax.errors import UsageError
from skipinit_jax.files import PROFILE, Path, in_bucket


class Profile:
  """Records steps of a run, from its second dispatch on: the first one is slower.

  The record is of one stretch of the run, with what lies between its steps, such as an
  evaluation. It ends with the run, if that is earlier.
  """

  def __init__(self, workdir: Path, num_steps: int, *, enabled: bool):
    """Records nothing yet.

    Args:
      workdir: the record will be in its folder `files.PROFILE`.
      num_steps: how many steps to record.
      enabled: False records nothing, as in all processes of a run but one.

    Raises:
      UsageError: steps are to be recorded in a bucket.
    """
    if num_steps and in_bucket(workdir):
      raise UsageError(
        f"profile_steps is {num_steps}: JAX writes profiles to directories, and the "
        f"workdir {workdir} is in a bucket."
      )
    self._folder = workdir / PROFILE
    self._left = num_steps if enabled else 0
    self._is_first, self._records = True, False

  @property
  def most_steps(self) -> int:
    """How many steps the next dispatch may take."""
    return self._left or sys.maxsize

  def begin(self) -> None:
    """Is called before each dispatch."""
    if self._left and not self._is_first and not self._records:
      jax.profiler.start_trace(str(self._folder))
      self._records = True
    self._is_first = False

  def end(self, num_steps: int) -> str:
    """Is called after each dispatch.

    Args:
      num_steps: how many steps it took.

    Returns:
      Where the record is, in words, if it ended here; else nothing.
    """
    if not self._records:
      return ""
    self._left -= num_steps
    if self._left > 0:
      return ""
    self.close()
    return f"profile: {self._folder}"

  def close(self) -> None:
    """Ends and writes the record, if there is one."""
    if self._records:
      self._records, self._left = False, 0
      jax.profiler.stop_trace()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: Any) -> None:
    self.close()
