"""A disk that is full."""

import contextlib
import errno
import os
from collections.abc import Iterator

from skipinit_jax.errors import UsageError

# The last one is that of a limit on the size of a file, as by `ulimit -f`.
_REASONS = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))


@contextlib.contextmanager
def full_disk_errors(workdir: str | os.PathLike[str]) -> Iterator[None]:
  """Makes a full disk's error in the block a `UsageError` that says how to go on.

  Args:
    workdir: the run's directory, to which the block writes.
  """
  try:
    yield
  except UsageError:
    raise
  except (OSError, ValueError) as error:
    # TensorStore, which writes the arrays of checkpoints, has the system's reason in
    # the text of a ValueError.
    reason = next((reason for reason in _REASONS if reason in str(error)), None)
    if reason is None:
      raise
    raise UsageError(
      f"The workdir {workdir} cannot be written ({reason}): make space, and the same "
      "command goes on from the last checkpoint."
    ) from error
