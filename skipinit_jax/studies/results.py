"""`results.json`: what a finished study keeps, for reports and other programs."""

import dataclasses
import os
import pathlib
from typing import Any

from skipinit_jax.errors import UsageError
from skipinit_jax.files import RESULT, Path, read_json, workdir_path, write_json
from skipinit_jax.studies.statistics import Optimum, RateSummary
from skipinit_jax.studies.study import Run, SearchResult, StudyResults, get_kind

RESULTS = "results.json"


def write_results(
  results: StudyResults[Any], directory: str | os.PathLike[str]
) -> Path:
  """Writes `results.json` into an existing directory, and returns its path."""
  path = workdir_path(directory) / RESULTS
  write_json(path, dataclasses.asdict(results))
  return path


def read_results(workdir: str | os.PathLike[str]) -> StudyResults[Any]:
  """Reads `results.json`.

  Raises:
    UsageError: the directory holds no results, an unfinished study, or results of
      another version or of an unknown kind of study.
  """
  workdir = pathlib.Path(workdir)
  path = workdir / RESULTS
  if not path.exists():
    raise _no_results(workdir)
  fields = read_json(path)
  try:
    labels = get_kind(fields["name"]).labels
    return StudyResults(
      **fields
      | {
        "searches": [_read_search(search, labels) for search in fields["searches"]],
        "runs": [Run(**run) for run in fields["runs"]],
      }
    )
  except (KeyError, TypeError):
    raise UsageError(
      f"The file {path} holds no results of this version's: run the study again."
    ) from None


def _no_results(workdir: pathlib.Path) -> UsageError:
  """Returns an error that says what a directory without results holds."""
  if any((workdir / name).exists() for name in ("trials", "study.db")):
    paths = workdir.glob(f"trials/**/{RESULT}")
    finished = sum(read_json(path)["status"] != "interrupted" for path in paths)
    return UsageError(
      f"The study in {workdir} is not finished ({finished} of its runs are): run the "
      "same command again to go on, then make the report."
    )
  if (workdir / RESULT).exists():
    return UsageError(f"There is no study in {workdir}, but a single run.")
  return UsageError(
    f"There is neither a study nor a run in {workdir}: it has no {RESULTS} and no "
    f"{RESULT}."
  )


def _read_search(fields: dict[str, Any], labels: type) -> SearchResult[Any]:
  optimum = fields["optimum"]
  return SearchResult(
    **fields
    | {
      "labels": labels(**fields["labels"]),
      "rates": [RateSummary(**rate) for rate in fields["rates"]],
      "optimum": None if optimum is None else Optimum(**optimum),
    }
  )
