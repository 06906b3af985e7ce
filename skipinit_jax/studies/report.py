"""Reports of studies: from `results.json` to a `Document`.

Every report has the table of accuracies, the curves behind it, the signal and a list
of all runs. What is about one kind of study is in that study's file.
"""

import os
from collections.abc import Collection, Mapping
from typing import Any

from skipinit_jax import data, document
from skipinit_jax.analysis.figures import SignalHistory, heat_map_figures
from skipinit_jax.document import Document, Entry, Figure, Section, Table
from skipinit_jax.files import Path
from skipinit_jax.studies import figures, study
from skipinit_jax.studies.formatting import format_accuracy, format_rate, format_rates
from skipinit_jax.studies.history import read_signal
from skipinit_jax.studies.results import write_results
from skipinit_jax.training import TrainConfig

_EDGE = "*"


def make_report(results: study.StudyResults[Any]) -> Document:
  """Returns the report of a study: findings, tables and figures.

  Raises:
    UsageError: the study is of an unknown kind.
  """
  kind = study.get_kind(results.name)
  own = kind.report(results)
  nothing = _nothing_trains(results)
  return Document(
    title=own.title,
    lead=f"{nothing} {own.lead}" if nothing else own.lead,
    findings=kind.claims(results),
    sections=[
      Section("Accuracy", "", [accuracy_table(results), *own.figures]),
      *own.sections,
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
  results: study.StudyResults[Any],
  directory: str | os.PathLike[str],
  formats: Collection[str] = document.FORMATS,
) -> list[Path]:
  """Writes `results.json`, `report.html` and the files of all tables and figures.

  The directory, or folder of a bucket, is made if it does not exist.

  Returns:
    The files, `report.html` first.

  Raises:
    UsageError: a format is unknown, or the directory cannot be written.
  """
  paths = document.write(make_report(results), directory, formats)
  return [*paths, write_results(results, directory)]


def print_accuracy(results: study.StudyResults[Any]) -> None:
  """Prints the study's main table and what it found to standard output."""
  document.print_table(accuracy_table(results))
  if nothing := _nothing_trains(results):
    print(nothing)
  document.print_findings(study.get_kind(results.name).claims(results))


def _nothing_trains(results: study.StudyResults[Any]) -> str:
  """Returns a sentence if no trial trained, else nothing."""
  if any(search.largest_stable_rate is not None for search in results.searches):
    return ""
  num_diverged = sum(run.status == "diverged" for run in results.runs)
  return (
    f"No trial trained: of {len(results.runs)} runs {num_diverged} diverged, and at no "
    f"rate was the mean test accuracy above {100 * results.threshold:.1f} %, which is "
    "chance and three standard errors."
  )


def accuracy_table(results: study.StudyResults[Any]) -> Table:
  """Returns the study's main table: test accuracy and best rate."""
  note = _statistics_note(results)
  if any(_at_edge(each) for each in results.searches):
    note += (
      f" {_EDGE} The best rate is the lowest or highest that was allowed: a better one "
      "may lie beyond."
    )
  entries = {(each.row, each.column): accuracy_entry(each) for each in results.searches}
  return Table(
    name="accuracy",
    title="Test accuracy in % and best learning rate",
    header=[study.get_kind(results.name).header[0], *results.columns],
    rows=[
      [row, *(entries.get((row, column), "") for column in results.columns)]
      for row in results.rows
    ],
    note=note,
  )


def _statistics_note(results: study.StudyResults[Any]) -> str:
  counts = sorted({rate.num_runs for each in results.searches for rate in each.rates})
  seeds = " to ".join(map(str, study.unique([counts[0], counts[-1]])))
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


def _at_edge(search: study.SearchResult[Any]) -> bool:
  return (
    search.extends
    and search.trains
    and search.optimum is not None
    and not search.optimum.is_inside
  )


def accuracy_entry(search: study.SearchResult[Any]) -> Entry:
  """Returns a search's test accuracy and best rate as the entry of a table."""
  optimum = search.optimum
  if search.test_accuracy is None or optimum is None:
    return Entry("does not train (diverges)", "bad")
  accuracy = format_accuracy(search.test_accuracy, search.test_accuracy_deviation)
  rate, edge = optimum.learning_rate, _EDGE if _at_edge(search) else ""
  if not search.trains:
    return Entry(f"does not train ({accuracy}, {format_rate(rate)})", "bad")
  rates = format_rates(rate, optimum.lowest_rate, optimum.highest_rate)
  return Entry(f"{accuracy}, {rates}{edge}")


def dataset_title(results: study.StudyResults[Any], field: str = "train") -> str:
  """Returns the name for people of the data set of one of a study's fields."""
  return data.title(results.config[field]["dataset"])


def network_title(results: study.StudyResults[Any], **changes: Any) -> str:
  """Returns the name for people of a study's network, with some changes of its own."""
  train = results.config["train"]
  fields = {name: train[name] for name in ("model", "depth", "width", "version")}
  return TrainConfig(**fields | changes).network_title


def _curves_section(results: study.StudyResults[Any]) -> Section:
  _, column = study.get_kind(results.name).header
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


def _signal_sections(results: study.StudyResults[Any]) -> list[Section]:
  """Returns a section on the signal during training, if it was logged."""
  contents = []
  for number, row in enumerate(results.rows, 1):
    networks: dict[str, SignalHistory | str] = {}
    for search in results.in_row(row):
      run = study.signal_run(results, search)
      networks[search.column] = (
        read_signal(run.history) or "not logged" if run else "no rate completes"
      )
    title = f"Signal by block and step, {row}"
    contents += signal_figures(f"signal_{number}", title, networks)
  text = "Each column is one run: the first completed seed at its best rate."
  return [Section("Signal during training", text, contents)] if contents else []


def signal_figures(
  name: str, title: str, networks: Mapping[str, SignalHistory | str]
) -> list[Figure]:
  """Returns heat maps of the signal during training, with how to read them.

  Args:
    networks: as `heat_map_figures` takes them, which says how many figures there are.
  """
  drawn = heat_map_figures(networks)
  return [
    Figure(
      name=name if len(drawn) == 1 else f"{name}_{part}",
      title=title if len(drawn) == 1 else f"{title} ({part} of {len(drawn)})",
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


def _runs_section(results: study.StudyResults[Any]) -> Section:
  rows: list[list[str]] = []
  for search in results.searches:
    for rate in search.rates:
      accuracy = format_accuracy(rate.test_accuracy, rate.test_accuracy_deviation)
      loss = "none" if rate.train_loss is None else f"{rate.train_loss:.4f}"
      row = [search.row, search.column, format_rate(rate.learning_rate)]
      rows.append([*row, f"{rate.num_runs}", f"{rate.num_diverged}", accuracy, loss])
  header = [*study.get_kind(results.name).header, "rate", "runs", "diverged"]
  table = Table(
    name="all_rates",
    title="Every rate that was tried",
    header=[*header, "test accuracy (%)", "training loss"],
    rows=rows,
    note="Over the best seeds, as above; none: too few of them completed. A run "
    "diverges when a loss, gradient or parameter is not finite. It is counted, and "
    "never taken for a completed one.",
  )
  num_diverged = sum(run.status == "diverged" for run in results.runs)
  minutes = sum(run.seconds for run in results.runs) / 60
  time = f"{minutes / 60:.1f} hours" if minutes >= 60 else f"{minutes:.1f} minutes"
  text = (
    f"{len(results.runs)} runs, of which {num_diverged} diverged, took {time} in all."
  )
  return Section("All runs", text, [table], collapsed=True)
