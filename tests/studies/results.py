"""Makes small studies, and results of studies in which nothing was trained."""

import math

from skipinit_jax.studies import (
  Optimum,
  RateSummary,
  Run,
  Search,
  SearchConfig,
  SearchResult,
  Study,
  StudyResults,
)
from skipinit_jax.studies.depth import DepthLabels
from skipinit_jax.studies.study import missing_runs, summarize
from skipinit_jax.training import TrainConfig

ALL_RATES = tuple(2.0**exponent for exponent in range(-12, 5))
THRESHOLD = 0.15


def make_study(
  methods=("skipinit",), rates=(2**-5,), seeds=2, name="depth_study", **fields
) -> Study:
  """Makes a study of fully connected networks, each run of which takes a moment.

  Args:
    **fields: fields of its `TrainConfig`.
  """
  protocol = SearchConfig(rates, extend=False, num_seeds=seeds, best_of=1)
  network = {"model": "residual_mlp", "depth": 2, "width": 8}
  fields = network | {"epochs": 1, "batch_size": 736} | fields
  searches = [
    Search(
      name=f"mlp/{method}",
      row="MLP 2-8",
      column=method,
      labels=DepthLabels("residual_mlp", 2, 8, method, 5e-4),
      config=TrainConfig(method=method, **fields),
      protocol=protocol,
    )
    for method in methods
  ]
  # Its configuration says nothing of its searches.
  return Study(name, SearchConfig(), tuple(searches))


def wanted(study):
  """Returns the runs that a study asks for when none is finished."""
  return missing_runs(study, {}, THRESHOLD)


def make_result(
  labels=None,
  accuracy=0.9,
  deviation=0.001,
  *,
  row="MLP 2-8",
  column="SkipInit",
  rate=2**-4,
  within=None,
  tried=ALL_RATES,
  stable=None,
  trains=None,
):
  """Returns what a search came to: above 0.2, its accuracy is better than chance.

  `within` is the range of its best rate, `stable` the largest rate that trains.
  """
  low, high = within or (rate, rate)
  completes = accuracy is not None
  trains = completes and accuracy > 0.2 if trains is None else trains
  rates = [
    RateSummary(each, 2, 0, accuracy, deviation, 1 - accuracy, deviation)
    if completes
    else RateSummary(each, 2, 2, None, None, None, None)
    for each in tried
  ]
  inside = tried[0] < rate < tried[-1]
  optimum = Optimum("test_accuracy", accuracy, deviation, rate, low, high, inside)
  return SearchResult(
    name=f"{row}/{column}",
    row=row,
    column=column,
    labels=labels,
    best_of=2,
    extends=True,
    rates=rates,
    optimum=optimum if completes else None,
    largest_stable_rate=(stable or rate) if trains else None,
    test_accuracy=accuracy,
    test_accuracy_deviation=deviation if completes else None,
    train_loss=1 - accuracy if completes else None,
    train_loss_deviation=deviation if completes else None,
    trains=trains,
    num_runs=4,
    num_diverged=0,
  )


def make_results(name, searches, runs=(), config=None):
  return StudyResults(name, "", config or {}, 0.2, list(searches), list(runs), {}, [])


def make_run(key, test_accuracy=0.5, **fields):
  """Returns a finished run: one without an accuracy diverged."""
  diverged = test_accuracy is None
  last = math.nan if diverged else test_accuracy
  curve = {"epoch": [1.0, 2.0], "loss": [1.0, 0.5], "accuracy": [0.1, last]}
  values = {
    "status": "diverged" if diverged else "completed",
    "step": 10,
    "train_loss": math.nan if diverged else 1.5 - test_accuracy,
    "train_accuracy": math.nan if diverged else test_accuracy,
    "test_loss": None if diverged else 1.0,
    "test_accuracy": test_accuracy,
    "history": {"train": curve, "test": curve},
    "seconds": 90.0,
    "device": "1 x cpu",
    "versions": {"jax": "0.10.2"},
  }
  return Run(**key._asdict(), **(values | fields))


def play(study, run, order=list, threshold=THRESHOLD):
  """Returns the runs of a study to its end, each of which is `run(search, key)`.

  `order` chooses from the missing runs which end next.
  """
  runs = {}
  while missing := missing_runs(study, runs, threshold):
    runs |= {key: run(search, key) for search, key in order(missing)}
  return runs


def run_study(study, accuracy, signal=lambda labels: None):
  """Returns the results of a study whose runs have made-up accuracies.

  `accuracy` is a function of labels, rate and seed; a run of accuracy None diverges.
  `signal` returns what the history of a network's runs has of the signal.
  """

  def run(search, key):
    value = accuracy(search.labels, key.learning_rate, key.seed)
    done = make_run(key, value)
    if logged := signal(search.labels):
      done.history["signal"] = logged
    return done

  command = "python -m experiments.depth_study --x=y"
  return summarize(study, play(study, run), THRESHOLD, command)


def verdicts(findings):
  """Returns by its claim whether each holds."""
  return {finding.claim: finding.holds for finding in findings}


def texts(table):
  """Returns the rows of a table as texts."""
  return [
    [entry if isinstance(entry, str) else entry.text for entry in row]
    for row in table.rows
  ]


def contents_of(report):
  """Returns the tables and figures of a report by their names."""
  return {item.name: item for section in report.sections for item in section.contents}
