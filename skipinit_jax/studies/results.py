"""`results.json`: what a finished study keeps, for reports and other programs."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from skipinit_jax.errors import UsageError
from skipinit_jax.files import (
  RESULT,
  Path,
  as_type,
  local_path,
  read_json,
  reading,
  workdir_path,
  write_json,
)
from skipinit_jax.studies.history import check_history
from skipinit_jax.studies.study import Run, StudyResults, get_kind

RESULTS = "results.json"


def write_results(
  results: StudyResults[Any], directory: str | os.PathLike[str]
) -> Path:
  """Writes `results.json` into an existing directory, and returns its path."""
  path = workdir_path(directory) / RESULTS
  fields = dataclasses.asdict(results)
  for run in fields["runs"]:
    # Said once, unless the packages changed during the study: runs are many.
    if run["versions"] == results.versions:
      del run["versions"]
  write_json(path, fields, indent=None)
  return path


def read_results(workdir: str | os.PathLike[str]) -> StudyResults[Any]:
  """Reads `results.json`.

  Raises:
    UsageError: the directory holds no results, an unfinished study, or results of
      another version or of an unknown kind of study.
  """
  workdir = local_path(workdir)
  path = workdir / RESULTS
  with reading(workdir):
    exists = path.exists()
  if not exists:
    raise _no_results(workdir)
  fields = read_json(path)
  try:
    kind: Any = StudyResults
    labels = get_kind(as_type(dict[str, Any], fields)["name"]).labels
    for run in fields["runs"]:
      run.setdefault("versions", fields["versions"])
    results: StudyResults[Any] = as_type(kind[labels], fields)
    for each in results.runs:
      _check_run(each)
    if all(search.rates for search in results.searches) and results.searches:
      return results
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    if isinstance(error, UsageError):
      raise
  raise UsageError(
    f"The file {path} holds no results of this version's: run the study again."
  )


def keep_predictions(
  results: StudyResults[Any], directory: str | os.PathLike[str]
) -> StudyResults[Any]:
  """Returns results with the `predicted_rates` that `results.json` already has.

  They stay true where a study goes on, because they depend on networks and data alone.
  """
  try:
    before = read_results(directory)
  except UsageError:
    return results
  if (before.name, _networks(before)) != (results.name, _networks(results)):
    return results
  names = {search.name for search in results.searches}
  predicted = {
    name: rates for name, rates in before.predicted_rates.items() if name in names
  }
  return dataclasses.replace(results, predicted_rates=predicted)


def _networks(results: StudyResults[Any]) -> dict[str, Any]:
  """Returns the configuration without which searches there are, and their protocol."""
  return {
    name: value
    for name, value in results.config.items()
    if name == "train" or not isinstance(value, list | tuple | dict)
  }


def read_run(fields: Mapping[str, Any]) -> Run:
  """Returns a run from its fields.

  Raises:
    ValueError: they are of another version, or changed.
  """
  run: Run = as_type(Run, dict(fields))
  _check_run(run)
  return run


def _check_run(run: Run) -> None:
  """Raises a ValueError for what would break or falsify a report."""
  accuracy, completed = run.test_accuracy, run.status == "completed"
  if completed != (accuracy is not None and 0 <= accuracy <= 1):
    raise ValueError(f"a {run.status} run has the test accuracy {accuracy}")
  if not 0 <= run.seconds < math.inf:
    raise ValueError(f"it took {run.seconds} seconds")
  check_history(run.history)


def _no_results(workdir: pathlib.Path) -> UsageError:
  """Returns an error that says what a directory without results holds."""
  if any(os.path.exists(workdir / name) for name in ("trials", "study.db")):
    finished = sum(map(_is_finished, workdir.glob(f"trials/**/{RESULT}")))
    return UsageError(
      f"The study in {workdir} is not finished ({finished} of its runs are): run the "
      "same command again to go on, then make the report."
    )
  if os.path.exists(workdir / RESULT):
    return UsageError(f"There is no study in {workdir}, but a single run.")
  return UsageError(
    f"There is neither a study nor a run in {workdir}: it has no {RESULTS} and no "
    f"{RESULT}."
  )


def _is_finished(path: pathlib.Path) -> bool:
  try:
    return as_type(dict[str, Any], read_json(path))["status"] != "interrupted"
  except (KeyError, ValueError):
    return False
