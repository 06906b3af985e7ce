"""Reports of studies: from `results.json` to a `Document`."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from skipinit_jax import document
from skipinit_jax.analysis.figures import SignalHistory, heat_map_figures
from skipinit_jax.document import (
  Document,
  Entry,
  Figure,
  Finding,
  Section,
  Table,
)
from skipinit_jax.errors import unknown_name
from skipinit_jax.files import Path
from skipinit_jax.studies import figures, findings
from skipinit_jax.studies.history import read_signal
from skipinit_jax.studies.names import (
  dataset_name,
  format_accuracy,
  format_rate,
  model_name,
  network_name,
)
from skipinit_jax.studies.published import (
  DEPTH_SOURCE,
  DEPTH_TABLE,
  IMAGENET_SOURCE,
  IMAGENET_TABLE,
  Published,
)
from skipinit_jax.studies.statistics import difference
from skipinit_jax.studies.study import (
  Run,
  SearchResult,
  StudyResults,
  signal_run,
  unique,
  write_results,
)
from skipinit_jax.training import TrainConfig

_EDGE = "*"


class _Kind(NamedTuple):
  """What the reports of one kind of study have of their own.

  Attributes:
    header: what the rows and the columns of its tables are.
    findings: checks its claims.
    report: returns title, lead and its own sections.
  """

  header: tuple[str, str]
  findings: Callable[[StudyResults], list[Finding]]
  report: Callable[[StudyResults], tuple[str, str, list[Section]]]


def make_report(results: StudyResults) -> Document:
  """Returns the report of a study: findings, tables and figures.

  Args:
    results: of a finished study.

  Raises:
    UsageError: the study is of an unknown kind.
  """
  kind = _kind(results)
  title, lead, sections = kind.report(results)
  nothing = _nothing_trains(results)
  return Document(
    title=title,
    lead=f"{nothing} {lead}" if nothing else lead,
    findings=kind.findings(results),
    sections=[
      *sections,
      _curves_section(results),
      *_signal_sections(results),
      _runs_section(results),
    ],
    config=results.config,
    versions=results.versions,
    device=", ".join(results.devices),
    command=results.command,
  )


def write_report(
  results: StudyResults,
  directory: str | os.PathLike[str],
  formats: Collection[str] = document.FORMATS,
) -> list[Path]:
  """Writes `results.json`, `report.html` and the files of all tables and figures.

  Args:
    results: of a finished study.
    directory: where to, or a folder of a bucket; made if it does not exist.
    formats: of the tables and figures, as `document.write` takes them.

  Returns:
    The files, `report.html` first.

  Raises:
    UsageError: a format is unknown, or the directory cannot be written.
  """
  paths = document.write(make_report(results), directory, formats)
  return [*paths, write_results(results, directory)]


def _kind(results: StudyResults) -> _Kind:
  if results.name not in _KINDS:
    raise unknown_name("kind of study", results.name, _KINDS)
  return _KINDS[results.name]


def _nothing_trains(results: StudyResults) -> str:
  """Returns a sentence if no trial trained, else nothing."""
  if any(search.largest_stable_rate is not None for search in results.searches):
    return ""
  num_diverged = sum(run.status == "diverged" for run in results.runs)
  return (
    f"No trial trained: of {len(results.runs)} runs {num_diverged} diverged, and at no "
    f"rate was the mean test accuracy above {100 * results.threshold:.1f} %, which is "
    "chance and three standard errors."
  )


def accuracy_table(results: StudyResults) -> Table:
  """Returns the study's main table: test accuracy and best rate.

  Args:
    results: of any study.
  """
  entries = {
    (each.row, each.column): _accuracy_entry(each) for each in results.searches
  }
  columns = unique([each.column for each in results.searches])
  note = [_statistics_note(results)]
  if any(_at_edge(each) for each in results.searches):
    note.append(
      f"{_EDGE} The best rate is the lowest or highest that was allowed: a better one "
      "may lie beyond."
    )
  return Table(
    name="accuracy",
    title="Test accuracy in % and best learning rate",
    header=[_kind(results).header[0], *columns],
    rows=[
      [row, *(entries.get((row, column), "") for column in columns)]
      for row in unique([each.row for each in results.searches])
    ],
    note=" ".join(note),
  )


def _statistics_note(results: StudyResults) -> str:
  counts = sorted({rate.num_runs for each in results.searches for rate in each.rates})
  seeds = " to ".join(map(str, unique([counts[0], counts[-1]])))
  best_of = sorted({search.best_of for search in results.searches})
  over = (
    "One seed at each rate."
    if counts == [1]
    else f"The best of {seeds} seeds at each rate."
    if best_of == [1]
    else f"Mean ± standard deviation over the best {' or '.join(map(str, best_of))} of "
    f"{seeds} seeds at each rate; in parentheses the rates whose mean lies within one "
    "deviation of the best."
  )
  searched = (
    "The rates are searched by factors of two until the best one is inside."
    if all(search.extends for search in results.searches)
    else "The rates are fixed; a better one may lie between or beyond them."
  )
  return f"{over} {searched}"


def _at_edge(search: SearchResult) -> bool:
  return (
    search.extends
    and search.trains
    and search.optimum is not None
    and not search.optimum.is_inside
  )


def _accuracy_entry(search: SearchResult) -> Entry:
  if search.test_accuracy is None or search.optimum is None:
    return Entry("does not train (diverges)", "bad")
  accuracy = format_accuracy(search.test_accuracy, search.test_accuracy_deviation)
  optimum = search.optimum
  rate = format_rate(optimum.learning_rate)
  if not search.trains:
    return Entry(f"does not train ({accuracy}, {rate})", "bad")
  if optimum.lowest_rate < optimum.highest_rate:
    low, high = format_rate(optimum.lowest_rate), format_rate(optimum.highest_rate)
    rate = f"{rate} ({low} to {high})"
  return Entry(f"{accuracy}, {rate}{_EDGE if _at_edge(search) else ''}")


def _depth_report(results: StudyResults) -> tuple[str, str, list[Section]]:
  dataset = _dataset(results, "wide_resnet", "residual_mlp")
  comparison = published_table(results)
  contents: list[Table | Figure] = [
    accuracy_table(results),
    Figure(
      name="accuracy_by_depth",
      title="Test accuracy by depth and method",
      figure=figures.depth_bars(results),
      description="Bars of the test accuracy of each network by method; hatched bars "
      "mark methods that do not train.",
      note="Whiskers are one standard deviation. A method trains if its accuracy is "
      f"above {100 * results.threshold:.1f} %: always naming the most frequent class, "
      "and three standard errors.",
    ),
  ]
  sections = [Section("Accuracy by depth", "", contents)]
  if comparison is not None:
    sections.append(
      Section(
        "Beside the published results",
        "On another data set or network the numbers differ for many reasons, and only "
        "which networks train is compared.",
        [comparison],
      )
    )
  gap = _difference_table(results)
  if gap is not None:
    sections.append(Section("Against batch norm", "", [gap]))
  title = f"Depth study on {dataset}"
  lead = (
    f"Test accuracy of residual networks on {dataset}, by depth and method, each at "
    "its best learning rate, beside the results of De & Smith (2020)."
  )
  return title, lead, sections


def published_table(results: StudyResults) -> Table | None:
  """Returns measured beside published results of the same depth and method.

  Args:
    results: of a depth study.

  Returns:
    The table; None if nothing is published for any of the study's depths.
  """
  rows: list[list[str | Entry]] = []
  for search in results.searches:
    published = _find_published(search)
    if published is not None:
      dataset = results.config[search.labels["model"]]["dataset"]
      rows.append(
        [
          search.row,
          search.column,
          _accuracy_entry(search),
          _published_entry(published),
          _agreement(search, published, dataset),
        ]
      )
  if not rows:
    return None
  dataset = _dataset(results, "wide_resnet", "residual_mlp")
  return Table(
    name="published",
    title="Measured and published",
    header=[
      "network",
      "method",
      f"measured: {dataset}",
      f"published: {dataset_name('cifar10')}, Wide-ResNet of this depth and width 2",
      "agreement",
    ],
    rows=rows,
    note=f"Published: {DEPTH_SOURCE}. Differences are measured minus "
    "published, in percentage points, with the root of the sum of both squared "
    "deviations; within two of these they count as agreement.",
  )


def _find_published(search: SearchResult) -> Published | None:
  labels = search.labels
  return next(
    (
      each
      for each in DEPTH_TABLE
      if each.depth == labels["depth"]
      and each.method == labels["method"]
      and each.l2 == (labels["l2"] > 0)
    ),
    None,
  )


def _published_entry(published: Published) -> str:
  if published.test_accuracy is None or published.learning_rates is None:
    return "does not train"
  best, low, high = map(format_rate, published.learning_rates)
  within = f" ({low} to {high})" if low != high else ""
  return f"{published.test_accuracy}±{published.deviation}, {best}{within}"


def _agreement(search: SearchResult, published: Published, dataset: str) -> Entry:
  trains = published.test_accuracy is not None
  if search.trains != trains:
    return Entry(
      f"differs: {'trains' if search.trains else 'does not train'} here", "bad"
    )
  same = (search.labels["model"], search.labels["width"], dataset) == (
    published.model,
    published.width,
    published.dataset,
  )
  if not same or published.test_accuracy is None or search.test_accuracy is None:
    return Entry("both train" if trains else "neither trains", "good")
  deviation = search.test_accuracy_deviation
  gap, error = difference(
    100 * search.test_accuracy,
    None if deviation is None else 100 * deviation,
    published.test_accuracy,
    published.deviation,
  )
  if error is None:
    return Entry(f"both train, {findings.format_gap(gap, error)}", "good")
  agrees = abs(gap) <= 2 * error
  return Entry(
    f"{'agrees' if agrees else 'differs'}: {findings.format_gap(gap, error)}",
    "good" if agrees else "bad",
  )


def _difference_table(results: StudyResults) -> Table | None:
  rows = unique([search.row for search in results.searches])
  by_place = {(each.row, each.column): each for each in results.searches}
  reference = {
    each.row: each
    for each in results.searches
    if each.labels["method"] == "batch_norm" and each.labels["l2"] > 0 and each.trains
  }
  columns = [
    column
    for column in unique([search.column for search in results.searches])
    if column not in {each.column for each in reference.values()}
  ]
  if not reference or not columns:
    return None

  def entry(row: str, column: str) -> str:
    search = by_place.get((row, column))
    if search is None or not search.trains:
      return "does not train" if search else ""
    return findings.format_gap(*findings.accuracy_difference(search, reference[row]))

  return Table(
    name="difference",
    title="Test accuracy minus that of batch norm, in percentage points",
    header=["network", *columns],
    rows=[
      [row, *(entry(row, column) for column in columns)]
      for row in rows
      if row in reference
    ],
    note="± is the root of the sum of both squared deviations.",
  )


def _batch_size_report(results: StudyResults) -> tuple[str, str, list[Section]]:
  dataset = _dataset(results, "train")
  sections = [Section("Accuracy by batch size", "", [accuracy_table(results)])]
  for budget in unique([search.labels["budget"] for search in results.searches]):
    contents = Figure(
      name=f"batch_size_same_{budget}",
      title=f"The same number of {budget} at every batch size",
      figure=figures.batch_size_curves(results, budget),
      description="Four panels by batch size and method: test accuracy, training loss, "
      "optimal learning rate, largest stable learning rate.",
      note="Whiskers are one standard deviation, those of a rate its range. Networks "
      "that do not train have no optimal rate. Hollow marks are bounds: the best, or a "
      "stable, rate is the lowest or highest that was tried.",
    )
    sections.append(Section(f"At the same number of {budget}", "", [contents]))
  sections.append(Section("Learning rates", "", [_rates_table(results)]))
  title = f"Batch-size study on {dataset}"
  lead = (
    f"{_network(results)} on {dataset}: test accuracy, training loss, optimal and "
    "largest stable learning rate by batch size and method (De & Smith, 2020; our "
    "reading of its protocol, whose figures are published without numbers)."
  )
  return title, lead, sections


def _rates_table(results: StudyResults) -> Table:
  rows = [
    [
      search.row,
      search.column,
      *_optimal_rate(search),
      findings.format_stable_rate(search),
      "none" if search.train_loss is None else f"{search.train_loss:.4f}",
    ]
    for search in results.searches
  ]
  return Table(
    name="rates",
    title="Optimal and largest stable learning rate",
    header=[
      *_kind(results).header,
      "optimal",
      "range",
      "largest stable",
      "training loss",
    ],
    rows=rows,
    note="Stable: enough seeds completed, with a mean test accuracy above chance; ≥: "
    "no higher rate was tried. The training loss is the last epoch's mean, at the "
    "optimal rate.",
  )


def _optimal_rate(search: SearchResult) -> tuple[str | Entry, str]:
  """Returns the optimal rate and its range."""
  optimum = search.optimum
  if optimum is None or not search.trains:
    return Entry("does not train", "bad"), "none"
  low, high = format_rate(optimum.lowest_rate), format_rate(optimum.highest_rate)
  return format_rate(optimum.learning_rate), f"{low} to {high}" if low != high else low


def _regularization_report(results: StudyResults) -> tuple[str, str, list[Section]]:
  dataset = _dataset(results, "train")
  figure = Figure(
    name="accuracy_by_dropout",
    title="Test accuracy by dropout rate",
    figure=figures.regularization_curves(results),
    description="Lines of the test accuracy by dropout rate, one for each method with "
    "and without biases and L2.",
    note="Whiskers are one standard deviation.",
  )
  title = f"Regularization study on {dataset}"
  lead = (
    f"{_network(results)} on {dataset}: test accuracy by biases, dropout, L2 and "
    "method. The paper regularizes SkipInit with biases and dropout together."
  )
  sections = [Section("Accuracy", "", [accuracy_table(results), figure])]
  return title, lead, sections


def _branch_scale_report(results: StudyResults) -> tuple[str, str, list[Section]]:
  dataset = _dataset(results, "train")
  figure = Figure(
    name="accuracy_by_alpha",
    title="Test accuracy and optimal learning rate by α",
    figure=figures.branch_scale_curves(results),
    description="Two panels for each depth, by α and method: test accuracy and optimal "
    "learning rate.",
    note="Whiskers are one standard deviation, those of a rate its range; hollow marks "
    "are rates at the edge of those allowed. Crosses on the lower edge mark an α at "
    "which too few runs complete; a method as it is that diverges has no line.",
  )
  title = f"Branch-scale study on {dataset}"
  model = model_name(results.config["train"]["model"])
  lead = (
    f"{model}s on {dataset} whose branches end in a factor α, a constant or a "
    "learnable scalar: which values train, and how well. Reviewers of De & Smith "
    "(2020) asked."
  )
  sections = [Section("Accuracy", "", [accuracy_table(results), figure])]
  return title, lead, sections


def _imagenet_report(results: StudyResults) -> tuple[str, str, list[Section]]:
  dataset = _dataset(results, "train")
  bars = Figure(
    name="accuracy_by_batch_size",
    title="Test accuracy by method and batch size",
    figure=figures.depth_bars(results),
    description="Bars of the test accuracy of each method by batch size.",
    note="Whiskers are one standard deviation.",
  )
  network = _network(results)
  title = f"Methods and batch sizes on {dataset}"
  lead = (
    f"{network} on {dataset}: test accuracy by method and batch size, at one learning "
    "rate in proportion to the batch size, beside the results of De & Smith (2020)."
  )
  published = published_imagenet_table(results)
  sections = [
    Section("Accuracy by method and batch size", "", [accuracy_table(results), bars]),
    Section("Beside the published results", "", [published] if published else []),
  ]
  return title, lead, [section for section in sections if section.contents]


def published_imagenet_table(results: StudyResults) -> Table | None:
  """Returns measured beside published results of the same method and batch size.

  Args:
    results: of an ImageNet study.

  Returns:
    The table; None if nothing is published for any of the study's batch sizes.
  """
  train = results.config["train"]
  setting = {"dataset": "imagenet2012", "model": "resnet", "depth": 50, "epochs": 90}
  same = all(train[name] == value for name, value in setting.items())
  by_cell = {(each.method, each.batch_size): each for each in IMAGENET_TABLE}
  rows: list[list[str | Entry]] = []
  for search in results.searches:
    published = by_cell.get((search.labels["method"], search.labels["batch_size"]))
    if published is None:
      continue
    top1, top5 = search.test_accuracy, _top5_accuracy(search, results.runs)
    measured: str | Entry = Entry("does not train", "bad")
    agreement: str | Entry = Entry("differs: does not train here", "bad")
    if search.trains and top1 is not None:
      measured = f"{100 * top1:.1f}/{'-' if top5 is None else f'{100 * top5:.1f}'}"
      deviation = search.test_accuracy_deviation
      gap, error = difference(
        100 * top1,
        None if deviation is None else 100 * deviation,
        published.top1,
        None,
      )
      agreement = findings.format_gap(gap, error) if same else "another setting"
    rows.append(
      [
        search.row,
        f"{published.batch_size}",
        measured,
        f"{published.top1}/{published.top5}",
        agreement,
      ]
    )
  if not rows:
    return None
  return Table(
    name="published",
    title="Measured and published: top-1/top-5 accuracy in %",
    header=[
      "method",
      "batch size",
      f"measured: {_dataset(results, 'train')}, {_network(results)}, "
      f"{train['epochs']} epochs",
      "published: ImageNet, ResNet-50, 90 epochs",
      "measured minus published",
    ],
    rows=rows,
    note=f"Published, without deviations: {IMAGENET_SOURCE}. Differences are "
    "of top-1 accuracy, in percentage points, and taken in the published setting only. "
    "The published learning rates are not known to us: ours are 0.1 at a batch size of "
    "256 by default (Goyal et al., 2017).",
  )


def _top5_accuracy(search: SearchResult, runs: Sequence[Run]) -> float | None:
  """Returns the mean over the seeds that the search's test accuracy is over."""
  mine = [
    run for run in runs if run.search == search.name and run.status == "completed"
  ]
  best = sorted(mine, key=lambda run: run.test_accuracy or 0.0)[-search.best_of :]
  values = [run.test_top5_accuracy for run in best]
  known = [value for value in values if value is not None]
  return sum(known) / len(known) if known and len(known) == len(values) else None


def _curves_section(results: StudyResults) -> Section:
  _, column = _kind(results).header
  description = f"A panel for each row of the table, a line for each {column}."
  learning_curves = Figure(
    name="learning_curves",
    title="Test accuracy by epoch at the best rate",
    figure=figures.learning_curves(results),
    description=description,
    note="Means over all completed seeds.",
  )
  if all(len(search.rates) == 1 for search in results.searches):
    return Section("Learning curves", "", [learning_curves])
  rate_curves = Figure(
    name="rate_curves",
    title="Test accuracy by learning rate",
    figure=figures.rate_curves(results),
    description=description,
    note="Circles mark the best rates of networks that train, crosses below the "
    "accuracies the rates at which too few seeds completed. Whiskers are one "
    "standard deviation.",
  )
  return Section("Curves behind the optima", "", [rate_curves, learning_curves])


def _signal_sections(results: StudyResults) -> list[Section]:
  """Returns a section on the signal during training, if it was logged."""
  contents = []
  for number, row in enumerate(unique([each.row for each in results.searches]), 1):
    contents += signal_figures(
      f"signal_{number}",
      f"Signal by block and step, {row}",
      {
        search.column: _signal_history(search, results.runs)
        for search in results.searches
        if search.row == row
      },
    )
  text = "Each column is one run: the first completed seed at its best rate."
  return [Section("Signal during training", text, contents)] if contents else []


def _signal_history(search: SearchResult, runs: Sequence[Run]) -> SignalHistory | str:
  run = signal_run(search, runs)
  if run is None:
    return "no rate completes"
  return read_signal(run.history) or "not logged"


def signal_figures(
  name: str, title: str, networks: Mapping[str, SignalHistory | str]
) -> list[Figure]:
  """Returns heat maps of the signal during training, with how to read them.

  Args:
    name: the stem of their files.
    title: what they show.
    networks: what was logged, by the column's title; or, in words, why nothing was.

  Returns:
    A figure for every three networks; none if nothing was logged of any.
  """
  drawn = heat_map_figures(networks)
  several = len(drawn) > 1
  return [
    Figure(
      name=f"{name}_{part}" if several else name,
      title=f"{title} ({part} of {len(drawn)})" if several else title,
      figure=figure,
      description="Heat maps by step and block, a row for each of α, the ratio of "
      "branch to skip path, and the gradient.",
      note="Block 1 is next to the input. α is the learnable scalar at the end of the "
      "branch, the branch-to-skip ratio one of variances over a training batch, the "
      "gradient the root mean square of the derivative of that batch's mean loss with "
      "respect to the block's output. Each row has one scale of colors; without α, it "
      "reaches from the 1st to the 99th percentile. Gray is zero or not finite.",
    )
    for part, figure in enumerate(drawn, 1)
  ]


def _runs_section(results: StudyResults) -> Section:
  names = _kind(results).header
  rows = []
  diverged = []
  for search in results.searches:
    for rate in search.rates:
      accuracy = (
        "none"
        if rate.test_accuracy is None
        else format_accuracy(rate.test_accuracy, rate.test_accuracy_deviation)
      )
      loss = "none" if rate.train_loss is None else f"{rate.train_loss:.4f}"
      name = format_rate(rate.learning_rate)
      rows.append([search.row, search.column, name, f"{rate.num_runs}", accuracy, loss])
      if rate.num_diverged:
        count = f"{rate.num_diverged} of {rate.num_runs}"
        diverged.append([search.row, search.column, name, count])
  num_runs = len(results.runs)
  num_diverged = sum(run.status == "diverged" for run in results.runs)
  minutes = sum(run.seconds for run in results.runs) / 60
  time = f"{minutes / 60:.1f} hours" if minutes >= 60 else f"{minutes:.1f} minutes"
  tables = [
    Table(
      name="all_rates",
      title="Every rate that was tried",
      header=[*names, "rate", "runs", "test accuracy (%)", "training loss"],
      rows=rows,
      note="Over the best seeds, as above; none: too few of them completed.",
    )
  ]
  if diverged:
    tables.append(
      Table(
        name="diverged",
        title="Runs that diverged",
        header=[*names, "rate", "diverged"],
        rows=diverged,
        note="A run diverges when a loss, gradient or parameter is not finite. It is "
        "counted, and never taken for a completed one.",
      )
    )
  text = f"{num_runs} runs, of which {num_diverged} diverged, took {time} in all."
  return Section("All runs", text, tables, collapsed=True)


def _dataset(results: StudyResults, *names: str) -> str:
  """Returns the data set's name for people."""
  models = {search.labels.get("model", "train") for search in results.searches}
  used = [results.config[name]["dataset"] for name in names if name in models]
  return dataset_name(used[0])


def _network(results: StudyResults) -> str:
  train = results.config["train"]
  fields = {name: train[name] for name in ("model", "depth", "width", "version")}
  return network_name(TrainConfig(**fields))


def print_accuracy(results: StudyResults) -> None:
  """Prints the study's main table and what it found to standard output."""
  document.print_table(accuracy_table(results))
  if nothing := _nothing_trains(results):
    print(nothing)
  document.print_findings(_kind(results).findings(results))


_KINDS = {
  "depth_study": _Kind(("network", "method"), findings.depth_findings, _depth_report),
  "batch_size_study": _Kind(
    ("batch size", "method"), findings.batch_size_findings, _batch_size_report
  ),
  "regularization_study": _Kind(
    ("method", "dropout"), findings.regularization_findings, _regularization_report
  ),
  "branch_scale_study": _Kind(
    ("network", "α or method"), findings.branch_scale_findings, _branch_scale_report
  ),
  "imagenet_study": _Kind(
    ("method", "batch size"), findings.imagenet_findings, _imagenet_report
  ),
}
