"""The cores of the machine."""

import os


def num_cores() -> int:
  """Returns how many cores this process may use.

  They are fewer than the machine's where a job may use only some; macOS cannot tell.
  """
  may_tell = hasattr(os, "sched_getaffinity")
  return len(os.sched_getaffinity(0)) if may_tell else os.cpu_count() or 1
