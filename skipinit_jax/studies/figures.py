"""Figures that studies share, and what their own figures are drawn with.

They are drawn without pyplot: no global state, no display.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from skipinit_jax.document import drawing
from skipinit_jax.studies.formatting import format_rate
from skipinit_jax.studies.study import Labels, SearchResult, StudyResults, unique

# matplotlib takes most of a second to import; a study draws when it has finished.
if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

Points = Sequence[tuple[float, SearchResult[Labels]]]
"""Searches, each with its place on the horizontal axis."""

_PANELS_PER_ROW = 2
# As many numbers, and names of networks, stand side by side in that width.
_BARS_PER_PANEL = 20
_NETWORKS_PER_PANEL = 3


def accuracy_bars(
  results: StudyResults[Labels],
  family: Callable[[SearchResult[Labels]], object] = lambda search: None,
) -> "Figure":
  """Draws test accuracy by row and column.

  Args:
    family: what rows of one panel have in common.
  """
  columns = results.columns
  most = min(_NETWORKS_PER_PANEL, max(1, _BARS_PER_PANEL // len(columns)))
  parts: list[list[str]] = []
  for each in unique(map(family, results.searches)):
    rows = unique(search.row for search in results.searches if family(search) == each)
    parts += [rows[start : start + most] for start in range(0, len(rows), most)]
  figure = drawing.new_figure(0.7 + 2.2 * len(parts))
  panels = figure.subplots(len(parts), 1, squeeze=False)[:, 0]
  bar_width = 0.84 / len(columns)
  for axes, rows in zip(panels, parts, strict=True):
    for search in results.searches:
      if search.row in rows:
        index = columns.index(search.column)
        center = rows.index(search.row) - 0.42 + (index + 0.5) * bar_width
        _bar(axes, search, center, 0.92 * bar_width, style(index)["color"])
    axes.set_xticks(range(len(rows)), rows)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.5, max(map(len, parts)) - 0.5)
    axes.set_ylim(0, 114)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("test accuracy (%)")
  for index, column in enumerate(columns):
    panels[0].bar(0, 0, color=style(index)["color"], label=column)
  if not all(search.trains for search in results.searches):
    panels[0].bar(
      0, 0, color="none", edgecolor="gray", hatch="////", label="does not train"
    )
  drawing.finish(figure, *panels[0].get_legend_handles_labels())
  return figure


def _bar(
  axes: "Axes", search: SearchResult[Any], center: float, width: float, color: str
) -> None:
  accuracy = 100 * (search.test_accuracy or 0.0)
  deviation = 100 * (search.test_accuracy_deviation or 0.0)
  axes.bar(
    center,
    accuracy,
    width,
    yerr=deviation or None,
    color=color if search.trains else "none",
    edgecolor=color,
    hatch=None if search.trains else "////",
    error_kw={"capsize": 2, "elinewidth": 1, "ecolor": "#333333"},
  )
  diverges = search.test_accuracy is None
  axes.text(
    center,
    accuracy + 2 + deviation,
    "diverges" if diverges else f"{accuracy:.0f}",
    ha="center",
    va="bottom",
    fontsize=9,
    rotation=90 if diverges else 0,
  )


def rate_curves(results: StudyResults[Labels]) -> "Figure":
  """Draws test accuracy by learning rate, a panel for each row of the table."""
  accuracies = [
    100 * rate.test_accuracy
    for search in results.searches
    for rate in search.rates
    if rate.test_accuracy is not None
  ]
  lowest = 20 * math.floor(min(accuracies, default=0.0) / 20)
  step = 0.07 * (100 - lowest)

  def draw(axes: "Axes", lines: Sequence[tuple[SearchResult[Labels], Any]]) -> None:
    failing = 0
    for search, line_style in lines:
      points = [
        (rate.learning_rate, 100 * rate.test_accuracy, rate.test_accuracy_deviation)
        for rate in search.rates
        if rate.test_accuracy is not None
      ]
      axes.errorbar(
        [rate for rate, _, _ in points],
        [accuracy for _, accuracy, _ in points],
        [100 * (deviation or 0.0) for _, _, deviation in points],
        capsize=2,
        **line_style,
      )
      failed = [
        rate.learning_rate for rate in search.rates if rate.test_accuracy is None
      ]
      if failed:
        # Below the accuracies, each method at its own height.
        failing += 1
        heights = [lowest - step * failing] * len(failed)
        axes.plot(failed, heights, "x", color=line_style["color"], markersize=5)
      if search.trains and search.optimum and search.test_accuracy is not None:
        axes.plot(
          search.optimum.learning_rate,
          100 * search.test_accuracy,
          "o",
          markersize=11,
          markerfacecolor="none",
          markeredgecolor=line_style["color"],
        )
    if failing:
      axes.axhline(lowest, color="gray", linewidth=0.8)
    rates = {rate.learning_rate for search, _ in lines for rate in search.rates}
    log_axis(axes, "x", rates, most=8)
    axes.set_yticks(range(lowest, 101, 20 if lowest < 60 else 10))
    bottom = lowest - step * (failing + 0.7) if failing else lowest
    axes.set_ylim(bottom, 100 + step / 2)

  return _panels(results, draw, "learning rate")


def learning_curves(results: StudyResults[Labels]) -> "Figure":
  """Draws test accuracy by epoch at each best rate, the mean over completed runs."""

  def draw(axes: "Axes", lines: Sequence[tuple[SearchResult[Labels], Any]]) -> None:
    for search, line_style in lines:
      curves = [run.history["test"] for run in results.at_best_rate(search)]
      if curves:
        accuracies = zip(*(curve["accuracy"] for curve in curves), strict=True)
        means = [100 * statistics.fmean(each) for each in accuracies]
        axes.plot(curves[0]["epoch"], means, markevery=_mark_every(means), **line_style)
    if not axes.lines:
      axes.text(0.5, 0.5, "no rate completes", ha="center", transform=axes.transAxes)
    axes.set_ylim(0, 104)
    axes.set_xlim(left=0)

  return _panels(results, draw, "epoch")


def _panels(
  results: StudyResults[Labels],
  draw: Callable[["Axes", Sequence[tuple[SearchResult[Labels], Any]]], None],
  x_label: str,
) -> "Figure":
  """Draws test accuracies, a panel for each row of the table, a line for a column."""
  rows, columns = results.rows, results.columns
  across = min(_PANELS_PER_ROW, len(rows))
  down = -(-len(rows) // across)
  figure = drawing.new_figure(1.1 + 2.1 * down)
  panels = list(figure.subplots(down, across, squeeze=False).flat)
  for axes, row in zip(panels, rows, strict=False):
    draw(
      axes,
      [(search, style(columns.index(search.column))) for search in results.in_row(row)],
    )
    axes.set_title(row, fontsize=10)
    axes.grid(alpha=0.25)
  for axes in panels[len(rows) :]:
    axes.remove()
  for index, column in enumerate(columns):
    panels[0].plot([], [], label=column, **style(index))
  figure.supxlabel(x_label, fontsize=10)
  figure.supylabel("test accuracy (%)", fontsize=10)
  drawing.finish(figure, *panels[0].get_legend_handles_labels())
  return figure


def run_curves(history: Mapping[str, Mapping[str, Any]]) -> "Figure":
  """Draws loss and accuracy of one run by epoch, on training and test set."""
  figure = drawing.new_figure(3.2)
  panels = figure.subplots(1, 2)
  loss, accuracy = panels
  names = {"train": "training set, as trained on", "test": "test set"}
  for index, (name, label) in enumerate(names.items()):
    curve = history[name]
    line_style = style(index) | {"markevery": _mark_every(curve["epoch"])}
    loss.plot(curve["epoch"], curve["loss"], label=label, **line_style)
    percent = [100 * value for value in curve["accuracy"]]
    accuracy.plot(curve["epoch"], percent, **line_style)
  losses = [
    value
    for name in names
    for value in history[name]["loss"]
    # A run that diverged has losses that are not finite.
    if 0 < value < math.inf
  ]
  # Below a decade, a logarithmic axis has hardly a readable number.
  if losses and max(losses) > 10 * min(losses):
    loss.set_yscale("log")
  accuracy.set_ylim(0, 104)
  for axes, title in zip(panels, ("loss", "accuracy (%)"), strict=True):
    axes.set_title(title, fontsize=10)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
  figure.supxlabel("epoch", fontsize=10)
  drawing.finish(figure, *loss.get_legend_handles_labels())
  return figure


def _mark_every(values: Sequence[Any]) -> int:
  # Twelve marks at most: more would hide the line.
  return max(1, -(-len(values) // 12))


def style(index: int) -> dict[str, Any]:
  """Returns how the line of this number looks, as arguments of matplotlib's `plot`."""
  return drawing.style(index) | {"markersize": 5, "linewidth": 1.5}


def plot_accuracies(
  axes: "Axes", points: Points[Labels], label: str, line_style: Mapping[str, Any]
) -> None:
  """Draws a line of test accuracies in %, with whiskers of one deviation."""
  completed = [
    (x, 100 * search.test_accuracy, 100 * (search.test_accuracy_deviation or 0.0))
    for x, search in points
    if search.test_accuracy is not None
  ]
  axes.errorbar(
    [x for x, _, _ in completed],
    [accuracy for _, accuracy, _ in completed],
    [deviation for _, _, deviation in completed],
    capsize=2,
    label=label,
    **line_style,
  )


def plot_best_rates(
  axes: "Axes", points: Points[Labels], line_style: Mapping[str, Any]
) -> None:
  """Draws the best rates of networks that train, with their ranges.

  Rates at the edge of a search are hollow.
  """
  # Networks at chance have no optimal rate.
  optima = [
    (x, search.optimum)
    for x, search in points
    if search.trains and search.optimum is not None
  ]
  axes.errorbar(
    [x for x, _ in optima],
    [optimum.learning_rate for _, optimum in optima],
    [
      [optimum.learning_rate - optimum.lowest_rate for _, optimum in optima],
      [optimum.highest_rate - optimum.learning_rate for _, optimum in optima],
    ],
    capsize=2,
    **line_style,
  )
  bounds = [
    (x, optimum.learning_rate) for x, optimum in optima if not optimum.is_inside
  ]
  plot_bounds(axes, bounds, line_style)


def plot_bounds(
  axes: "Axes", points: Sequence[tuple[float, float]], line_style: Mapping[str, Any]
) -> None:
  """Marks points that are only bounds: they are hollow."""
  if points:
    hollow = {"linestyle": "none", "markerfacecolor": "white", "zorder": 3}
    xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, **{**line_style, **hollow})


def log_axis(
  axes: "Axes",
  name: Literal["x", "y"],
  values: Iterable[float],
  *,
  most: int,
  label: Callable[[float], str] | None = None,
) -> None:
  """Scales an axis by factors of two, with some of the values as its ticks.

  Args:
    name: the axis.
    values: what it has to show.
    most: the largest number of ticks.
    label: returns the text of a tick; None: as a power of two where it is one.
  """
  values = sorted(values)
  getattr(axes, f"set_{name}scale")("log", base=2)
  getattr(axes, f"set_{name}lim")(values[0] / 1.5, values[-1] * 1.5)
  axis = axes.xaxis if name == "x" else axes.yaxis
  shown = values[:: -(-len(values) // most)]
  axis.set_ticks(shown, [(label or tick)(value) for value in shown], fontsize=9)
  axis.minorticks_off()


def log_rate_axis(axes: "Axes", *, most: int) -> list[float]:
  """Scales the vertical axis of rates by factors of two; returns the rates drawn."""
  drawn: list[Any] = [line.get_ydata() for line in axes.lines]
  rates = [float(rate) for line in drawn for rate in line if rate > 0]
  if rates:
    lowest, count = min(rates), round(math.log2(max(rates) / min(rates))) + 1
    log_axis(axes, "y", [lowest * 2.0**i for i in range(count)], most=most)
  return rates


def tick(value: float, as_text: Callable[[float], str] = format_rate) -> str:
  """Returns a number for an axis, with the exponent of a power of two raised."""
  text = as_text(value)
  return f"$2^{{{text[2:]}}}$" if text.startswith("2^") else text
