"""How long a study takes at least, known before it starts."""

import tempfile
import time

from skipinit_jax.data import in_memory
from skipinit_jax.document import Entry, Table
from skipinit_jax.studies import study
from skipinit_jax.training import train
from skipinit_jax.training.stop import StopRequest

_PROBE_SECONDS = 3.0


def plan_table(planned: study.Study) -> Table:
  """Returns the runs of a study and the hours that they take at least.

  One run of each row of the table, that of its first method, trains for some seconds
  with all cores and devices. A search may extend its rates: each further rate adds a
  run for each seed.

  Raises:
    UsageError: a configuration or the data cannot be used.
  """
  study.check(planned)
  rows: list[list[str | Entry]] = []
  total_runs, total_hours = 0, 0.0
  for row in study.unique(search.row for search in planned.searches):
    searches = [search for search in planned.searches if search.row == row]
    runs = sum(
      len(each.protocol.learning_rates) * each.protocol.num_seeds for each in searches
    )
    start, training = _probe(searches[0])
    hours = runs * (start + training) / 3600
    rows.append([row, f"{runs}", f"{start:.1f}", f"{training:.1f}", f"{hours:.2f}"])
    total_runs += runs
    total_hours += hours
  rows.append(["all", f"{total_runs}", "", "", f"{total_hours:.2f}"])
  return Table(
    name="plan",
    title="Runs and time at least",
    header=["", "runs", "seconds to the first step", "of training", "hours"],
    rows=rows,
    note="Measured on one run of each row, with all cores and devices, evaluation "
    "excluded. A rate that a search adds is as many runs as there are seeds.",
  )


def _probe(search: study.Search) -> tuple[float, float]:
  """Returns a run's seconds to its first step, and behind it."""
  config = search.run_config(search.protocol.learning_rates[0], 0)
  with tempfile.TemporaryDirectory() as workdir:
    result = train(config, workdir, show_progress=False, stop=_Timer())
  num_examples = config.load_dataset().train.num_examples
  steps = config.epochs * in_memory.steps_per_epoch(num_examples, config.batch_size)
  start, speed = result.seconds_to_first_step, result.images_per_second
  assert start is not None
  return start, 0.0 if speed is None else (steps - 1) * config.batch_size / speed


class _Timer(StopRequest):
  """Asks a run to stop some seconds after its first dispatches, which are slower."""

  def __init__(self) -> None:
    self._asked: list[float] = []
    super().__init__()

  @property
  def requested(self) -> bool:
    self._asked.append(time.monotonic())
    return len(self._asked) > 3 and self._asked[-1] - self._asked[2] > _PROBE_SECONDS

  @requested.setter
  def requested(self, _: bool) -> None:
    """Signals end the program instead."""
