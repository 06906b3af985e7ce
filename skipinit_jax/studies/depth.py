"""The depth study: test accuracy by depth and method, the paper's headline."""

import dataclasses
import itertools
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from skipinit_jax import data, methods
from skipinit_jax.errors import UsageError
from skipinit_jax.studies.names import format_rate, network_name
from skipinit_jax.studies.statistics import above_chance
from skipinit_jax.studies.trials import Trial, run_trials
from skipinit_jax.training import Result, TrainConfig


@dataclasses.dataclass
class DepthStudyConfig:
  """A grid of networks, methods, learning rates and seeds.

  Attributes:
    methods: names in `skipinit_jax.methods.NAMES`.
    wide_resnet_depths: layers of the convolutional networks, each 6 n + 4.
    residual_mlp_depths: blocks of the fully connected networks.
    wide_resnet_learning_rates: rates to try on each convolutional network.
    residual_mlp_learning_rates: rates to try on each fully connected network.
    num_seeds: runs at each rate; their seeds count up from that of the network.
    wide_resnet: everything else of the convolutional networks.
    residual_mlp: everything else of the fully connected networks.
  """

  methods: tuple[str, ...] = (
    "batch_norm",
    "skipinit",
    "divide_by_sqrt2",
    "skipinit_one",
  )
  wide_resnet_depths: tuple[int, ...] = ()
  residual_mlp_depths: tuple[int, ...] = ()
  wide_resnet_learning_rates: tuple[float, ...] = ()
  residual_mlp_learning_rates: tuple[float, ...] = ()
  num_seeds: int = 1
  wide_resnet: TrainConfig = dataclasses.field(
    default_factory=lambda: TrainConfig(model="wide_resnet")
  )
  residual_mlp: TrainConfig = dataclasses.field(
    default_factory=lambda: TrainConfig(model="residual_mlp", width=64)
  )


@dataclasses.dataclass(frozen=True)
class Cell:
  """What one method came to on one network.

  Attributes:
    network: the network's name, with its depth and width.
    depth: its depth.
    method: the method's name.
    test_accuracy: mean over the seeds at the best rate, from 0 to 1; None if no rate
      has a seed that completed.
    deviation: standard deviation over those seeds; None for fewer than two.
    learning_rate: the rate with the best mean; None as above.
    num_trials: runs over all rates and seeds.
    num_diverged: how many of them diverged.
    trains: whether the accuracy is above chance: above always naming the test set's
      most frequent class, by three standard errors of that share.
  """

  network: str
  depth: int
  method: str
  test_accuracy: float | None
  deviation: float | None
  learning_rate: float | None
  num_trials: int
  num_diverged: int
  trains: bool


@dataclasses.dataclass(frozen=True)
class DepthStudy:
  """A finished study; `results.json` holds the same fields.

  Attributes:
    cells: what each method came to on each network.
    config: the study's configuration.
    versions: of the packages that decide the results.
    device: kind and number of the devices of a run.
  """

  cells: list[Cell]
  config: dict[str, Any]
  versions: dict[str, str]
  device: str


def trial_configs(config: DepthStudyConfig) -> list[TrainConfig]:
  """Returns the configurations of all runs of a study, all of them valid.

  Raises:
    UsageError: a list is empty, or a run's configuration is not allowed.
  """
  if config.num_seeds < 1:
    raise UsageError(f"num_seeds is {config.num_seeds}: it must be at least 1.")
  if not config.methods:
    raise UsageError("methods is empty: name at least one method.")
  networks = [
    ("wide_resnet", config.wide_resnet),
    ("residual_mlp", config.residual_mlp),
  ]
  runs = []
  for model, base in networks:
    depths = getattr(config, f"{model}_depths")
    rates = getattr(config, f"{model}_learning_rates")
    for name in ("model", "depth", "method", "learning_rate"):
      value, default = getattr(base, name), getattr(TrainConfig(model=model), name)
      if value != default:
        raise UsageError(
          f"{model}.{name} is {value}, which a depth study sets itself: use methods, "
          f"{model}_depths and {model}_learning_rates."
        )
    if depths and not rates:
      raise UsageError(f"{model}_learning_rates is empty: name at least one rate.")
    # Rates vary slower than methods: the second rate of a method then finds the
    # program compiled that its first one was, also where runs go side by side.
    for depth, rate, method, seed in itertools.product(
      depths, rates, config.methods, range(config.num_seeds)
    ):
      run = dataclasses.replace(
        base,
        model=model,
        depth=depth,
        method=method,
        learning_rate=rate,
        seed=base.seed + seed,
      )
      run.validate()
      run.make_model(num_classes=1)
      runs.append(run)
  for field in dataclasses.fields(config):
    values = getattr(config, field.name)
    if isinstance(values, tuple) and len(set(values)) < len(values):
      raise UsageError(f"{field.name} is {values}: it names a value twice.")
  if not runs:
    raise UsageError(
      "wide_resnet_depths and residual_mlp_depths are empty: name at least one depth."
    )
  return runs


def run(
  config: DepthStudyConfig,
  workdir: str | os.PathLike[str],
  *,
  num_workers: int = 1,
  report: Callable[[str], None] = print,
) -> DepthStudy:
  """Runs a study; runs that `workdir` already holds are not repeated.

  Args:
    config: the study.
    workdir: directory of the runs' own workdirs, under `trials`.
    num_workers: processes that share the runs.
    report: is told of every finished run, one line each.

  Returns:
    The study, its cells in the order of networks and methods.

  Raises:
    UsageError: a configuration, the data or the workdir cannot be used.
    Interrupted: a signal asked to stop.
  """
  start = time.monotonic()
  runs = [Trial(trial, _trial_dir(workdir, trial)) for trial in trial_configs(config)]
  thresholds = {
    base.dataset: above_chance(
      data.load(base.dataset, data_dir=base.data_dir).test.labels
    )
    for base in (trial.config for trial in runs)
  }
  finished = itertools.count(1)

  def report_result(trial: Trial, result: Result) -> None:
    outcome = (
      f"{100 * result.test_accuracy:.1f} %"
      if result.test_accuracy is not None
      else f"diverged at step {result.step}"
    )
    report(
      f"[{next(finished)}/{len(runs)}, {time.monotonic() - start:.0f} s] "
      f"{network_name(trial.config)}, {methods.get(trial.config.method).title}, "
      f"rate {format_rate(trial.config.learning_rate)}, seed {trial.config.seed}: "
      f"{outcome}"
    )

  results = run_trials(runs, num_workers, report_result)
  return DepthStudy(
    cells=summarize(results, thresholds),
    config=dataclasses.asdict(config),
    versions=results[0].versions,
    device=results[0].device,
  )


def summarize(results: Sequence[Result], thresholds: Mapping[str, float]) -> list[Cell]:
  """Returns the cells of finished runs, in the order of networks and methods.

  A diverged seed counts as accuracy 0 in its rate's mean, so that a rate that
  diverges now and then is not the best one by its lucky seeds.

  Args:
    results: the runs' results.
    thresholds: the accuracy above which a network trains, by data set; see
      `statistics.above_chance`.
  """
  by_cell: dict[tuple[str, str], list[Result]] = {}
  for result in results:
    trial = TrainConfig(**result.config)
    by_cell.setdefault((network_name(trial), trial.method), []).append(result)
  return [
    _cell(name, method, cell, thresholds[cell[0].config["dataset"]])
    for (name, method), cell in by_cell.items()
  ]


def _cell(
  network: str, method: str, results: Sequence[Result], threshold: float
) -> Cell:
  by_rate: dict[float, list[float]] = {}
  for result in results:
    accuracies = by_rate.setdefault(result.config["learning_rate"], [])
    accuracies.append(result.test_accuracy or 0.0)
  rate = max(by_rate, key=lambda rate: statistics.fmean(by_rate[rate]))
  accuracies = by_rate[rate]
  num_diverged = sum(result.status == "diverged" for result in results)
  all_diverged = num_diverged == len(results)
  accuracy = statistics.fmean(accuracies)
  return Cell(
    network=network,
    depth=results[0].config["depth"],
    method=method,
    test_accuracy=None if all_diverged else accuracy,
    deviation=(
      statistics.stdev(accuracies) if len(accuracies) > 1 and not all_diverged else None
    ),
    learning_rate=None if all_diverged else rate,
    num_trials=len(results),
    num_diverged=num_diverged,
    trains=accuracy > threshold,
  )


def _trial_dir(workdir: str | os.PathLike[str], config: TrainConfig) -> pathlib.Path:
  return pathlib.Path(
    workdir,
    "trials",
    f"{config.model}_{config.depth}_{config.width}",
    config.method,
    # In full: two rates that are printed alike are two runs.
    f"rate_{config.learning_rate!r}",
    f"seed_{config.seed}",
  )
