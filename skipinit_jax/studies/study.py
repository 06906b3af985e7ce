"""A study as data: what is searched, what the runs came to, and `results.json`."""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from skipinit_jax import methods
from skipinit_jax.errors import UsageError
from skipinit_jax.files import (
  RESULT,
  Path,
  read_json,
  to_json,
  workdir_path,
  write_json,
)
from skipinit_jax.studies.search import SearchConfig, summarize_rates, wanted_runs
from skipinit_jax.studies.statistics import (
  Optimum,
  Outcome,
  RateSummary,
  find_optimum,
  largest_stable_rate,
)
from skipinit_jax.training import TrainConfig

RESULTS = "results.json"


class Key(NamedTuple):
  """What identifies a run in its study.

  Attributes:
    search: the name of its search.
    learning_rate: its rate.
    seed: its seed, from 0.
  """

  search: str
  learning_rate: float
  seed: int


@dataclasses.dataclass(frozen=True)
class Search:
  """One learning-rate search of a study: one cell of its table.

  Attributes:
    name: unique in the study, and the directory of its runs, such as
      "wide_resnet_16_2/skipinit".
    row: the name of its row in the study's table, such as "Wide-ResNet 16-2".
    column: the name of its column, such as "Batch norm".
    labels: what it varies, as plain values: "method", "depth", "batch_size", ...
    config: its training runs, but for rate and seed: the search sets the rate, and its
      seeds count up from this one.
    protocol: which rates and seeds to run.
  """

  name: str
  row: str
  column: str
  labels: dict[str, Any]
  config: TrainConfig
  protocol: SearchConfig

  @property
  def title(self) -> str:
    """Its name for people."""
    return f"{self.row}, {self.column}"

  def run_config(self, learning_rate: float, seed: int) -> TrainConfig:
    """Returns the configuration of one run; seeds count from 0."""
    return dataclasses.replace(
      self.config, learning_rate=learning_rate, seed=self.config.seed + seed
    )


@dataclasses.dataclass(frozen=True)
class Study:
  """All searches of a study.

  Attributes:
    name: of the kind of study, such as "depth_study".
    config: its configuration, as plain values of JSON.
    searches: the searches, in the order of the tables.
  """

  name: str
  config: dict[str, Any]
  searches: tuple[Search, ...]


@dataclasses.dataclass(frozen=True)
class Run:
  """One finished run of a search.

  Attributes:
    search: the search's name.
    learning_rate: its rate.
    seed: its seed, from 0.
    status: "completed" or "diverged".
    step: optimizer steps taken.
    train_loss: mean over the last epoch; of a diverged run not finite.
    train_accuracy: likewise.
    test_loss: on the whole test set; None if the run diverged.
    test_accuracy: likewise, from 0 to 1.
    history: the learning curves and, if it was logged, the signal, as
      `history.make_history` returns them.
    seconds: that the process which finished it took for it.
    device: kind and number of its devices.
    versions: of the packages that decide the result.
    test_top5_accuracy: share of the test set whose label is among the five largest
      logits; None if the run diverged, or is of a version that did not measure it.
  """

  search: str
  learning_rate: float
  seed: int
  status: str
  step: int
  train_loss: float
  train_accuracy: float
  test_loss: float | None
  test_accuracy: float | None
  history: dict[str, dict[str, Any]]
  seconds: float
  device: str
  versions: dict[str, str]
  test_top5_accuracy: float | None = None

  @property
  def outcome(self) -> Outcome:
    """What the statistics need of it."""
    completed = self.status == "completed"
    return Outcome(self.test_accuracy, self.train_loss if completed else None)


@dataclasses.dataclass(frozen=True)
class SearchResult:
  """What a search came to.

  Attributes:
    name: of the search.
    row: of the search.
    column: of the search.
    labels: of the search.
    best_of: k, the number of best seeds that the statistics are over.
    extends: whether the search went on beyond its first rates.
    rates: the statistics of each rate that was tried, ascending.
    optimum: the best rate by the search's objective; None if too few runs completed
      at every rate.
    largest_stable_rate: the largest rate that trains; None if none does.
    test_accuracy: at the best rate: mean over the best k of n seeds, from 0 to 1.
    test_accuracy_deviation: its standard deviation.
    train_loss: likewise.
    train_loss_deviation: likewise.
    trains: whether that test accuracy is above chance, see `statistics.above_chance`.
    num_runs: over all rates and seeds.
    num_diverged: how many of them diverged.
  """

  name: str
  row: str
  column: str
  labels: dict[str, Any]
  best_of: int
  extends: bool
  rates: list[RateSummary]
  optimum: Optimum | None
  largest_stable_rate: float | None
  test_accuracy: float | None
  test_accuracy_deviation: float | None
  train_loss: float | None
  train_loss_deviation: float | None
  trains: bool
  num_runs: int
  num_diverged: int


@dataclasses.dataclass(frozen=True)
class StudyResults:
  """A finished study; `results.json` holds the same fields.

  Attributes:
    name: of the kind of study.
    command: the command that ran it.
    config: its configuration.
    threshold: the accuracy above which a network counts as trained.
    searches: what each search came to, in the order of the tables.
    runs: every run, search by search. The signal is kept only of the runs that the
      report draws: those of `signal_run`.
    versions: of the packages that decide the results.
    devices: kinds and numbers of the devices of a run.
  """

  name: str
  command: str
  config: dict[str, Any]
  threshold: float
  searches: list[SearchResult]
  runs: list[Run]
  versions: dict[str, str]
  devices: list[str]


def check(study: Study) -> None:
  """Checks everything that can be checked before the first run.

  Raises:
    UsageError: there is no search, or a search or a run's configuration is not allowed.
  """
  if not study.searches:
    raise UsageError(f"The {study.name} has no runs: name at least one of each list.")
  for search in study.searches:
    search.protocol.validate(search.name)
    # Seeds count up from the configuration's: the last one has to be allowed too.
    last_seed = search.protocol.num_seeds - 1
    search.run_config(search.protocol.learning_rates[0], last_seed).validate()
    search.config.make_model(num_classes=1)
  names = [search.name for search in study.searches]
  for name, group in itertools.groupby(sorted(names)):
    if len(list(group)) > 1:
      raise UsageError(f"The {study.name} would run {name} twice: name it once.")


def missing_runs(
  study: Study, runs: Mapping[Key, Run], threshold: float
) -> list[tuple[Search, Key]]:
  """Returns the runs that the study asks for and that are not finished.

  Args:
    study: the study.
    runs: the finished runs, by search, rate and seed.
    threshold: the accuracy above which a network trains.

  Returns:
    The runs with their searches, in the order in which to run them; empty when the
    study is finished.
  """
  outcomes = _outcomes(runs)
  wanted = [
    (search, key)
    for search in study.searches
    for rate, seed in wanted_runs(
      search.protocol, outcomes.get(search.name, {}), threshold
    )
    if (key := Key(search.name, rate, seed)) not in runs
  ]
  # Rates vary slower than searches: the second rate of a network then finds the
  # program compiled that its first one was, also where runs go side by side.
  rates: dict[str, list[float]] = {}
  for _, key in wanted:
    of_search = rates.setdefault(key.search, [])
    if key.learning_rate not in of_search:
      of_search.append(key.learning_rate)
  return sorted(
    wanted, key=lambda run: rates[run[1].search].index(run[1].learning_rate)
  )


def summarize(
  study: Study,
  runs: Mapping[Key, Run],
  threshold: float,
  command: str,
) -> StudyResults:
  """Returns the results of a finished study.

  Args:
    study: the study.
    runs: the finished runs, by search, rate and seed; those that the study does not
      ask for are left out.
    threshold: the accuracy above which a network trains.
    command: the command that ran it.
  """
  outcomes = _outcomes(runs)
  searches, kept = [], []
  for search in study.searches:
    mine = outcomes.get(search.name, {})
    wanted = sorted(wanted_runs(search.protocol, mine, threshold))
    searches.append(_result(search, {key: mine[key] for key in wanted}, threshold))
    kept += _without_signals(
      searches[-1], [runs[Key(search.name, rate, seed)] for rate, seed in wanted]
    )
  # Those of a study that went on with newer packages are several.
  versions: dict[str, set[str]] = {}
  for run in kept:
    for package, version in run.versions.items():
      versions.setdefault(package, set()).add(version)
  return StudyResults(
    name=study.name,
    command=command,
    config=study.config,
    threshold=threshold,
    searches=searches,
    runs=kept,
    versions={name: ", ".join(sorted(each)) for name, each in versions.items()},
    devices=sorted({run.device for run in kept}),
  )


def _result(
  search: Search, outcomes: Mapping[tuple[float, int], Outcome], threshold: float
) -> SearchResult:
  rates = summarize_rates(search.protocol, outcomes)
  optimum = find_optimum(rates, search.protocol.objective)
  best = next(
    (rate for rate in rates if optimum and rate.learning_rate == optimum.learning_rate),
    None,
  )
  return SearchResult(
    name=search.name,
    row=search.row,
    column=search.column,
    labels=search.labels,
    best_of=search.protocol.best_of,
    extends=search.protocol.extend,
    rates=rates,
    optimum=optimum,
    largest_stable_rate=largest_stable_rate(rates, threshold),
    test_accuracy=best.test_accuracy if best else None,
    test_accuracy_deviation=best.test_accuracy_deviation if best else None,
    train_loss=best.train_loss if best else None,
    train_loss_deviation=best.train_loss_deviation if best else None,
    trains=bool(best and best.test_accuracy and best.test_accuracy > threshold),
    num_runs=len(outcomes),
    num_diverged=sum(rate.num_diverged for rate in rates),
  )


def signal_run(search: SearchResult, runs: Sequence[Run]) -> Run | None:
  """Returns the run whose signal stands for its search.

  Args:
    search: the search.
    runs: of the study.

  Returns:
    The first completed seed at the best rate; None if too few seeds completed at every
    rate.
  """
  return next(
    (
      run
      for run in sorted(runs, key=lambda run: run.seed)
      if search.optimum is not None
      and run.search == search.name
      and run.learning_rate == search.optimum.learning_rate
      and run.status == "completed"
    ),
    None,
  )


def _without_signals(search: SearchResult, runs: Sequence[Run]) -> list[Run]:
  """Returns the runs of a search without the signals that nobody draws."""
  drawn = signal_run(search, runs)
  return [
    run
    if run is drawn or "signal" not in run.history
    else dataclasses.replace(
      run, history={name: run.history[name] for name in ("train", "test")}
    )
    for run in runs
  ]


def _outcomes(
  runs: Mapping[Key, Run],
) -> dict[str, dict[tuple[float, int], Outcome]]:
  outcomes: dict[str, dict[tuple[float, int], Outcome]] = {}
  for (name, rate, seed), run in runs.items():
    outcomes.setdefault(name, {})[rate, seed] = run.outcome
  return outcomes


def write_results(results: StudyResults, directory: str | os.PathLike[str]) -> Path:
  """Writes `results.json` into an existing directory, and returns its path."""
  path = workdir_path(directory) / RESULTS
  write_json(path, dataclasses.asdict(results))
  return path


def read_results(workdir: str | os.PathLike[str]) -> StudyResults:
  """Reads `results.json`.

  Args:
    workdir: a study's directory.

  Raises:
    UsageError: the directory holds no results, those of an unfinished study, or
      results of another version.
  """
  workdir = pathlib.Path(workdir)
  path = workdir / RESULTS
  if not path.exists():
    if any((workdir / name).exists() for name in ("trials", "study.db")):
      paths = workdir.glob(f"trials/**/{RESULT}")
      finished = sum(read_json(path)["status"] != "interrupted" for path in paths)
      raise UsageError(
        f"The study in {workdir} is not finished ({finished} of its runs are): run the "
        "same command again to go on, then make the report."
      )
    if (workdir / RESULT).exists():
      raise UsageError(f"There is no study in {workdir}, but a single run.")
    raise UsageError(
      f"There is neither a study nor a run in {workdir}: it has no {RESULTS} and no "
      f"{RESULT}."
    )
  fields = read_json(path)
  try:
    fields["searches"] = [_read_search(search) for search in fields["searches"]]
    fields["runs"] = [Run(**run) for run in fields["runs"]]
    return StudyResults(**fields)
  except (KeyError, TypeError):
    raise UsageError(
      f"The file {path} holds no results of this version's: run the study again."
    ) from None


def _read_search(fields: dict[str, Any]) -> SearchResult:
  optimum = fields["optimum"]
  return SearchResult(
    **{
      **fields,
      "rates": [RateSummary(**rate) for rate in fields["rates"]],
      "optimum": None if optimum is None else Optimum(**optimum),
    }
  )


def ghost_batch_size(largest: int | None, method: str, batch_size: int) -> int | None:
  """Returns the ghost batch size of a run of a study that has several batch sizes.

  Args:
    largest: examples of a ghost batch, for larger batches; None: whole batches.
    method: the method's name.
    batch_size: examples of a step.

  Returns:
    The size; None: normalize whole batches, or the method has no batch norm.
  """
  if largest is None or batch_size <= largest:
    return None
  return largest if methods.get(method).has_batch_norm else None


def plain(config: Any) -> dict[str, Any]:
  """Returns a configuration dataclass as plain values of JSON."""
  plain_values: dict[str, Any] = to_json(dataclasses.asdict(config))
  return plain_values


def unique(values: Sequence[Any]) -> list[Any]:
  """Returns the values in the order of their first occurrence."""
  return list(dict.fromkeys(values))
