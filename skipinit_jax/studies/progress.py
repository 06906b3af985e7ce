"""Progress of a study, on a terminal or in a log file."""

import datetime
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from skipinit_jax.studies.formatting import format_rate
from skipinit_jax.studies.study import Key, Run, Study
from skipinit_jax.training.progress import Display


class StudyProgress(Display):
  """Shows the trials done, running and left, the best so far, and the time left.

  Each finished trial is a line. On a terminal a live bar stands below the lines.

  Example::

    with StudyProgress(study, capacity=2) as progress:
      progress.update(runs, missing, num_running=2)
  """

  def __init__(self, study: Study, capacity: int, *, stream: TextIO | None = None):
    """Starts the display, for a process that runs `capacity` trials side by side."""
    super().__init__(None, stream=stream)
    self._searches = {search.name: search for search in study.searches}
    self._capacity = capacity
    self._start = time.monotonic()
    self._seen: set[Key] | None = None

  def update(
    self, runs: Mapping[Key, Run], missing: Sequence[Key], num_running: int
  ) -> None:
    """Shows the state of the study.

    Args:
      runs: the finished runs, of any process.
      missing: the runs that the study asks for so far and that are not finished. A
        search may ask for more when it has seen their outcomes.
      num_running: how many of them this process runs now.
    """
    # A study that shrank leaves runs behind that tell nothing about what is left.
    runs = {key: run for key, run in runs.items() if key.search in self._searches}
    if self._seen is None:
      self._seen = set(runs)
      if runs:
        self.message(f"{len(runs)} trials are done already.")
    status = self._status(runs, missing, num_running)
    for key in [key for key in runs if key not in self._seen]:
      self._seen.add(key)
      self.message(self._line(key, runs, status))
    if self._bar is not None:
      total = len(runs) + len(missing)
      task = self._bar.task_ids[0]
      self._bar.update(task, total=total, completed=len(runs), description=status)

  def _status(
    self, runs: Mapping[Key, Run], missing: Sequence[Key], num_running: int
  ) -> str:
    elapsed = _format_seconds(time.monotonic() - self._start)
    waiting = len(missing) - num_running
    return (
      f"{len(runs)} done, {num_running} running, {waiting} left, "
      f"{elapsed} passed, {self._time_left(runs, missing)} left"
    )

  def _time_left(self, runs: Mapping[Key, Run], missing: Sequence[Key]) -> str:
    """Returns the time that the missing runs take if they are like the finished."""
    if not missing:
      return "0:00:00"
    by_search: dict[str, list[float]] = {}
    for key, run in runs.items():
      by_search.setdefault(key.search, []).append(run.seconds)
    if not by_search:
      return "-:--:--"
    means = {name: statistics.fmean(seconds) for name, seconds in by_search.items()}
    of_others = statistics.fmean(means.values())
    total = sum(means.get(key.search, of_others) for key in missing)
    return "about " + _format_seconds(total / self._capacity)

  def _line(self, key: Key, runs: Mapping[Key, Run], status: str) -> str:
    run = runs[key]
    outcome = (
      f"{100 * run.test_accuracy:.1f} %"
      if run.test_accuracy is not None
      else f"diverged at step {run.step}"
    )
    best = max(
      (
        (other.test_accuracy, other.learning_rate)
        for other in runs.values()
        if other.search == key.search and other.test_accuracy is not None
      ),
      default=None,
    )
    so_far = f", best {100 * best[0]:.1f} % at {format_rate(best[1])}" if best else ""
    return (
      f"[{status}] {self._searches[key.search].title}, "
      f"rate {format_rate(key.learning_rate)}, seed {key.seed}: {outcome}{so_far}"
    )


def _format_seconds(seconds: float) -> str:
  return str(datetime.timedelta(seconds=round(seconds)))
