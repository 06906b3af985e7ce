"""Runs the trials of a study one after the other, each on all devices of all hosts."""

import os

import jax

from skipinit_jax.document import command_line
from skipinit_jax.errors import UsageError
from skipinit_jax.studies.runner import Interrupted, record, trains_above
from skipinit_jax.studies.storage import run_dir
from skipinit_jax.studies.study import (
  Key,
  Run,
  Study,
  StudyResults,
  check,
  missing_runs,
  summarize,
)
from skipinit_jax.training import Result, distributed, train
from skipinit_jax.training.metrics import read_metrics


def run_sequentially(study: Study, workdir: str | os.PathLike[str]) -> StudyResults:
  """Runs a study to its end, where every trial needs all that there is.

  The same call goes on with an interrupted study. After
  `training.distributed.initialize` every process makes the same call. Calls with other
  parts of a study may share its workdir.

  Args:
    workdir: directory of the runs' own directories (under `trials`), or a folder of a
      bucket.

  Returns:
    The results; the runs have their histories on process 0 alone.

  Raises:
    UsageError: a configuration, the data or the workdir cannot be used.
    Interrupted: a signal asked to stop; the running trial was saved.
  """
  check(study)
  for search in study.searches:
    try:
      search.config.validate(jax.device_count())
    except UsageError as error:
      raise UsageError(f"{search.title}: {error}") from None
  with distributed.share_errors():
    threshold = trains_above(study)
  first = distributed.is_first()
  runs: dict[Key, Run] = {}
  while missing := missing_runs(study, runs, threshold):
    total = len(runs) + len(missing)
    for search, key in missing:
      if first:
        print(f"Run {len(runs) + 1} of {total}: {search.title}, seed {key.seed}")
      directory = os.path.join(workdir, run_dir("trials", key))
      result = train(search.run_config(key.learning_rate, key.seed), directory)
      if result.status == "interrupted":
        raise Interrupted
      rows = read_metrics(directory) if first else []
      runs[key] = record(key, result, rows, _seconds(result))
  return summarize(study, runs, threshold, command_line())


def _seconds(result: Result) -> float:
  """Returns what a run took, finished by this call or by an earlier one."""
  speed, begin = result.images_per_second, result.seconds_to_first_step
  steps = 0.0 if speed is None else result.step * result.config["batch_size"] / speed
  return steps + (begin or 0.0)
