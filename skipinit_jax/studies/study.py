"""A study as data: kinds of studies, what they search, and what the runs came to."""

import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from skipinit_jax.document import Figure, Finding, Section
from skipinit_jax.errors import UsageError, unknown_name
from skipinit_jax.fields import take_as_usual, unusual
from skipinit_jax.files import check_name, check_title, to_json
from skipinit_jax.studies.search import SearchConfig, summarize_rates, wanted_runs
from skipinit_jax.studies.statistics import (
  Optimum,
  Outcome,
  RateSummary,
  find_optimum,
  largest_stable_rate,
)
from skipinit_jax.training import TrainConfig
from skipinit_jax.training.optimizer import idle_field, idle_fields
from skipinit_jax.training.size import check_network

Labels = TypeVar("Labels")

# A database of more would be slow.
_MOST_RUNS = 100_000


class Interrupted(Exception):
  """A signal, or a lost database, stopped the study; the same call goes on."""


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
class Search(Generic[Labels]):
  """One learning-rate search of a study: one cell of its table.

  Attributes:
    name: unique in the study, and the directory of its runs, such as
      "wide_resnet_16_2/skipinit".
    row: the title of its row in the study's table, such as "Wide-ResNet 16-2".
    column: the title of its column, such as "Batch norm".
    labels: what it varies: a dataclass of numbers and names, see `StudyKind`.
    config: its training runs, but for rate and seed: the search sets the rate, and its
      seeds count up from this one.
    protocol: which rates and seeds to run.
  """

  name: str
  row: str
  column: str
  labels: Labels
  config: TrainConfig
  protocol: SearchConfig

  @property
  def title(self) -> str:
    """Its name for people."""
    return f"{self.row}, {self.column}"

  def run_config(self, learning_rate: float, seed: int) -> TrainConfig:
    """Returns the configuration of one run; seeds count from 0."""
    config = dataclasses.replace(
      self.config, learning_rate=learning_rate, seed=self.config.seed + seed
    )
    # What one search does not use another may, and the study is asked for both.
    return take_as_usual(config)

  @property
  def effect(self) -> tuple[Any, ...]:
    """All that it comes from: equal searches have equal results."""
    names = self.name, self.row, self.column, self.labels
    return *names, self.config.used(), self.protocol.used()


@dataclasses.dataclass(frozen=True)
class Study(Generic[Labels]):
  """All searches of a study.

  Attributes:
    name: the name of its kind, such as "depth_study".
    config: its configuration, a dataclass.
    searches: the searches, in the order of the tables.
  """

  name: str
  config: Any
  searches: tuple[Search[Labels], ...]

  @property
  def json_config(self) -> dict[str, Any]:
    """Its configuration as values of JSON."""
    return to_json(dataclasses.asdict(self.config))


@dataclasses.dataclass(frozen=True)
class Run:
  """One finished run of a search.

  Attributes:
    search: the search's name.
    learning_rate: its rate.
    seed: its seed, from 0.
    status: how it ended.
    step: optimizer steps taken.
    train_loss: mean over the last epoch; not finite if the run diverged.
    train_accuracy: mean over the last epoch.
    test_loss: on the whole test set; None if the run diverged.
    test_accuracy: from 0 to 1; None if the run diverged.
    history: the learning curves and, if it was logged, the signal, as
      `history.make_history` returns them.
    seconds: how long it took, from its speed where several processes worked on it.
    device: kind and number of its devices.
    versions: the versions of the packages that decide the result.
    test_top5_accuracy: share of the test set whose label is among the five largest
      logits; None if the run diverged, or did not measure it.
  """

  search: str
  learning_rate: float
  seed: int
  status: Literal["completed", "diverged"]
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
class SearchResult(Generic[Labels]):
  """What a search came to.

  Attributes:
    name: the search's name.
    row: the title of its row.
    column: the title of its column.
    labels: what it varied.
    best_of: k, the number of best seeds that the statistics are over.
    extends: whether the search went on beyond its first rates.
    rates: the statistics of each rate that was tried, ascending.
    optimum: the best rate by the search's objective; None if too few runs completed
      at every rate.
    largest_stable_rate: the largest rate that trains; None if none does.
    test_accuracy: at the best rate, as the three below: see `RateSummary`.
    test_accuracy_deviation: its deviation.
    train_loss: the training loss.
    train_loss_deviation: its deviation.
    trains: whether that test accuracy is above chance, see `statistics.above_chance`.
    num_runs: over all rates and seeds.
    num_diverged: how many of them diverged.
  """

  name: str
  row: str
  column: str
  labels: Labels
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

  @property
  def is_stable_throughout(self) -> bool:
    """Whether the highest rate that was tried still trains."""
    return self.largest_stable_rate == self.rates[-1].learning_rate


@dataclasses.dataclass(frozen=True)
class StudyResults(Generic[Labels]):
  """A finished study; `results.json` holds the same fields.

  Attributes:
    name: the name of its kind.
    command: the command that ran it.
    config: its configuration, as values of JSON.
    threshold: the accuracy above which a network counts as trained.
    searches: what each search came to, in the order of the tables.
    runs: every run, search by search. The signal is kept only of the runs that the
      report draws, which `signal_run` names.
    versions: the versions of the packages that decide the results.
    devices: kinds and numbers of the devices of a run.
    predicted_rates: by the name of a search, for each seed, the largest rate that
      curvature at initialization allows: see `batch_size.predict_rates`. Empty where
      nobody has asked for it.
  """

  name: str
  command: str
  config: dict[str, Any]
  threshold: float
  searches: list[SearchResult[Labels]]
  runs: list[Run]
  versions: dict[str, str]
  devices: list[str]
  predicted_rates: dict[str, list[float]] = dataclasses.field(default_factory=dict)

  @property
  def rows(self) -> list[str]:
    """The titles of the table's rows, in its order."""
    return unique(search.row for search in self.searches)

  @property
  def columns(self) -> list[str]:
    """The titles of the table's columns, in its order."""
    return unique(search.column for search in self.searches)

  def in_row(self, row: str) -> list[SearchResult[Labels]]:
    """Returns the searches of one row of the table."""
    return [search for search in self.searches if search.row == row]

  def at_best_rate(self, search: SearchResult[Labels]) -> list[Run]:
    """Returns the completed runs of a search at its best rate, seed by seed."""
    return sorted(
      (
        run
        for run in self.runs
        if search.optimum is not None
        and run.search == search.name
        and run.learning_rate == search.optimum.learning_rate
        and run.status == "completed"
      ),
      key=lambda run: run.seed,
    )


@dataclasses.dataclass(frozen=True)
class StudyReport:
  """What a report says of its own kind of study, beside what all reports show.

  Attributes:
    title: the report's title.
    lead: one or two sentences: what was measured, on what, with what.
    figures: what stands below the main table of accuracies.
    sections: what follows it.
  """

  title: str
  lead: str
  figures: Sequence[Figure] = ()
  sections: Sequence[Section] = ()


@dataclasses.dataclass(frozen=True)
class StudyKind(Generic[Labels]):
  """A kind of study: what its searches vary, what it claims and how it is reported.

  Attributes:
    name: the name in `results.json`, such as "depth_study".
    labels: the dataclass of what its searches vary; its fields are values of JSON.
    header: what the rows and the columns of its table are.
    claims: checks what the study is about on its results.
    report: returns its own part of the report.
    make: returns the study of a configuration. With it, a field of the configuration
      that has no effect on the searches is an error.
  """

  name: str
  labels: type[Labels]
  header: tuple[str, str]
  claims: Callable[[StudyResults[Labels]], list[Finding]]
  report: Callable[[StudyResults[Labels]], StudyReport]
  make: Callable[[Any], Study[Labels]] | None = None


_kinds: dict[str, StudyKind[Any]] = {}


def register(kind: StudyKind[Any]) -> None:
  """Makes a kind of study known, so that its results can be read and reported.

  Raises:
    UsageError: a file cannot have its name, or a field is of another type.
  """
  check_name("kind of study", kind.name)
  if not dataclasses.is_dataclass(kind.labels):
    raise UsageError(
      f"labels of {kind.name} is {kind.labels!r}: it must be a dataclass."
    )
  for title in kind.header:
    check_title(f"header of {kind.name}", title)
  if not (len(kind.header) == 2 and callable(kind.claims) and callable(kind.report)):
    raise UsageError(
      f"{kind.name} needs two headers, and functions of claims and report."
    )
  _kinds[kind.name] = kind


def get_kind(name: str) -> StudyKind[Any]:
  """Returns the kind of study of this name.

  Raises:
    UsageError: no kind of this name is registered.
  """
  if name not in _kinds:
    raise unknown_name("kind of study", name, _kinds)
  return _kinds[name]


def check(study: Study[Any]) -> None:
  """Checks everything that can be checked before the first run.

  Raises:
    UsageError: there is no search, its kind is not known, it asks for too many runs, a
      search or a run's configuration is not allowed, or a field of the study's has no
      effect.
  """
  kind = get_kind(study.name)
  if not study.searches:
    raise UsageError(f"The {study.name} has no runs: name at least one of each list.")
  # Before anything is built of them.
  count = sum(
    len(search.protocol.learning_rates) * search.protocol.num_seeds
    for search in study.searches
  )
  if count > _MOST_RUNS:
    raise UsageError(f"The {study.name} asks for {count} runs: at most {_MOST_RUNS}.")
  idle: list[set[str]] = []
  sizes: set[tuple[Any, ...]] = set()
  image_shapes: dict[tuple[Any, ...], tuple[int, ...]] = {}
  for search in study.searches:
    for part in search.name.split("/"):
      check_name("search", part)
    for title in (search.row, search.column):
      check_title(f"title of search {search.name}", title)
    search.protocol.validate(search.name)
    # Seeds count up from the configuration's: the last one has to be allowed too.
    last_seed = search.protocol.num_seeds - 1
    config = search.run_config(search.protocol.learning_rates[0], last_seed)
    config.validate()
    model = config.make_model(num_classes=1)
    # Reading the data for each of hundreds of searches would take minutes.
    of_data = (config.dataset, config.data_dir, config.image_size, config.patch_size)
    if of_data not in image_shapes:
      image_shapes[of_data] = _image_shape(config)
    image_shape = image_shapes[of_data]
    itemsize = jnp.dtype(config.param_dtype).itemsize
    shards = jax.device_count() if config.shard_params else 1
    # Methods differ in little: one of each size stands for all.
    size = (config.model, config.depth, config.width, config.layers_per_block)
    if (*size, itemsize / shards) not in sizes:
      sizes.add((*size, itemsize / shards))
      check_network(model, image_shape, itemsize / shards)
    idle.append(idle_fields(config, model, image_shape))
  names = [search.name for search in study.searches]
  for name in names:
    if names.count(name) > 1:
      raise UsageError(f"The {study.name} would run {name} twice: name it once.")
  for name, _ in unusual(study.config):
    value = operator.attrgetter(name)(study.config)
    if value and name.split(".")[-1] in set.intersection(*idle):
      raise idle_field(name, value)
  if kind.make is not None:
    _check_effects(study, kind.make)


def _image_shape(config: TrainConfig) -> tuple[int, ...]:
  """Returns height, width and channels of the images that a network gets."""
  try:
    return config.load_dataset().image_shape
  except UsageError:
    # Whoever starts the study learns that. Two patches a side do for any network of the
    # package, and add little to the parameters.
    return (2 * config.patch_size, 2 * config.patch_size, 1)


def _check_effects(study: Study[Any], make: Callable[[Any], Study[Any]]) -> None:
  """Raises a UsageError for a field that could as well have its usual value."""
  effects = [search.effect for search in study.searches]
  for name, changed in unusual(study.config):
    try:
      searches = make(changed).searches
    except UsageError:
      continue
    if [search.effect for search in searches] == effects:
      value = operator.attrgetter(name)(study.config)
      raise UsageError(
        f"{name} is {value!r}, which changes no run of this study: leave it out."
      )


def missing_runs(
  study: Study[Labels], runs: Mapping[Key, Run], threshold: float
) -> list[tuple[Search[Labels], Key]]:
  """Returns the runs that the study asks for and that are not finished.

  They come with their searches, in the order in which to run them. There are none when
  the study is finished.
  """
  outcomes = _outcomes(runs)
  # Rates vary slower than searches: the second rate of a network then finds the
  # program compiled that its first one was, also where runs go side by side.
  rounds: dict[int, list[tuple[Search[Labels], Key]]] = {}
  for search in study.searches:
    wanted = wanted_runs(search.protocol, outcomes.get(search.name, {}), threshold)
    keys = [Key(search.name, rate, seed) for rate, seed in wanted]
    missing = [key for key in keys if key not in runs]
    rates = unique(key.learning_rate for key in missing)
    for key in missing:
      turn = rates.index(key.learning_rate)
      rounds.setdefault(turn, []).append((search, key))
  return list(itertools.chain.from_iterable(rounds[turn] for turn in sorted(rounds)))


def summarize(
  study: Study[Labels], runs: Mapping[Key, Run], threshold: float, command: str
) -> StudyResults[Labels]:
  """Returns the results of a finished study, without runs that it does not ask for."""
  outcomes = _outcomes(runs)
  searches, kept = [], []
  for search in study.searches:
    mine = outcomes.get(search.name, {})
    wanted = sorted(wanted_runs(search.protocol, mine, threshold))
    searches.append(_result(search, {key: mine[key] for key in wanted}, threshold))
    kept += [runs[Key(search.name, rate, seed)] for rate, seed in wanted]
  # A study may have gone on with newer packages.
  versions: dict[str, set[str]] = {}
  for run in kept:
    for package, version in run.versions.items():
      versions.setdefault(package, set()).add(version)
  results = StudyResults(
    name=study.name,
    command=command,
    config=study.json_config,
    threshold=threshold,
    searches=searches,
    runs=kept,
    versions={name: ", ".join(sorted(each)) for name, each in versions.items()},
    devices=sorted({run.device for run in kept}),
  )
  drawn = [signal_run(results, search) for search in searches]
  for index, run in enumerate(kept):
    if "signal" in run.history and not any(run is each for each in drawn):
      history = {name: run.history[name] for name in ("train", "test")}
      kept[index] = dataclasses.replace(run, history=history)
  return results


def _result(
  search: Search[Labels],
  outcomes: Mapping[tuple[float, int], Outcome],
  threshold: float,
) -> SearchResult[Labels]:
  rates = summarize_rates(search.protocol, outcomes)
  optimum = find_optimum(rates, search.protocol.objective)
  by_rate = {rate.learning_rate: rate for rate in rates}
  best = by_rate[optimum.learning_rate] if optimum else None
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


def signal_run(
  results: StudyResults[Labels], search: SearchResult[Labels]
) -> Run | None:
  """Returns the run whose signal is drawn: the first complete at the best rate."""
  return next(iter(results.at_best_rate(search)), None)


def _outcomes(
  runs: Mapping[Key, Run],
) -> dict[str, dict[tuple[float, int], Outcome]]:
  outcomes: dict[str, dict[tuple[float, int], Outcome]] = {}
  for (name, rate, seed), run in runs.items():
    outcomes.setdefault(name, {})[rate, seed] = run.outcome
  return outcomes


Value = TypeVar("Value")


def unique(values: Iterable[Value]) -> list[Value]:
  """Returns the values in the order of their first occurrence."""
  return list(dict.fromkeys(values))
