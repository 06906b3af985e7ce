"""Figures that studies share, and what their own figures are drawn with.

They are drawn without pyplot: no global state, no display.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from skipinit_jax.document import drawing
from skipinit_jax.studies.formatting import format_rate
from skipinit_jax.studies.statistics import RateSummary
from skipinit_jax.studies.study import Labels, SearchResult, StudyResults, unique

# matplotlib takes most of a second to import; a study draws when it has finished.
if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

# As many numbers, and names of networks, stand side by side in that width.
_BARS_PER_PANEL = 20
_NETWORKS_PER_PANEL = 3

_LINE: dict[str, Any] = {"markersize": 5, "linewidth": 1.5}


class Point(NamedTuple):
  """A mark at (x, y), with whiskers of two lengths; hollow if y is only a bound."""

  x: float
  y: float
  below: float = 0.0
  above: float = 0.0
  is_bound: bool = False


def accuracy_bars(
  results: StudyResults[Labels],
  family: Callable[[SearchResult[Labels]], object] = lambda search: None,
) -> "Figure":
  """Draws test accuracy by row and column, each family of rows in its own panels."""
  columns = results.columns
  most = min(_NETWORKS_PER_PANEL, max(1, _BARS_PER_PANEL // len(columns)))
  parts: list[list[str]] = []
  for each in unique(map(family, results.searches)):
    rows = unique(search.row for search in results.searches if family(search) == each)
    parts += [rows[start : start + most] for start in range(0, len(rows), most)]
  figure = drawing.new_figure(0.7 + 2.2 * len(parts))
  panels = figure.subplots(len(parts), 1, squeeze=False)[:, 0]
  bar_width, styles = 0.84 / len(columns), drawing.styles(columns)
  for axes, rows in zip(panels, parts, strict=True):
    for search in results.searches:
      if search.row in rows:
        index = columns.index(search.column)
        center = rows.index(search.row) - 0.42 + (index + 0.5) * bar_width
        color = styles[search.column]["color"]
        _bar(axes, search, center, 0.92 * bar_width, color)
    axes.set_xticks(range(len(rows)), rows, parse_math=False)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.5, max(map(len, parts)) - 0.5)
    axes.set_ylim(0, 114)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("test accuracy (%)")
  for column, style in styles.items():
    panels[0].bar(0, 0, color=style["color"], label=column)
  if not all(search.trains for search in results.searches):
    panels[0].bar(
      0, 0, color="none", edgecolor="gray", hatch="////", label="does not train"
    )
  drawing.finish(figure)
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
  figure, panels = drawing.new_panels(
    results.rows, "learning rate", "test accuracy (%)"
  )
  styles = drawing.styles(results.columns)
  for axes, row in zip(panels, results.rows, strict=True):
    failing = 0
    for search in results.in_row(row):
      color = styles[search.column]["color"]
      rates = [(rate.learning_rate, rate) for rate in search.rates]
      draw_line(axes, mean_points(rates), styles[search.column])
      failed = [rate for rate, summary in rates if summary.test_accuracy is None]
      if failed:
        # Below the accuracies, each method at its own height.
        failing += 1
        heights = [lowest - step * failing] * len(failed)
        axes.plot(failed, heights, "x", color=color, markersize=5)
      if search.trains and search.optimum and search.test_accuracy is not None:
        best = search.optimum.learning_rate, 100 * search.test_accuracy
        axes.plot(*best, "o", markersize=11, markerfacecolor="none", color=color)
    if failing:
      axes.axhline(lowest, color="gray", linewidth=0.8)
    tried = {
      rate.learning_rate for search in results.in_row(row) for rate in search.rates
    }
    log_axis(axes, "x", tried, most=8)
    axes.set_yticks(range(lowest, 101, 20 if lowest < 60 else 10))
    bottom = lowest - step * (failing + 0.7) if failing else lowest
    axes.set_ylim(bottom, 100 + step / 2)
  _finish(figure, styles)
  return figure


def learning_curves(results: StudyResults[Labels]) -> "Figure":
  """Draws test accuracy by epoch at each best rate, the mean over completed runs."""
  figure, panels = drawing.new_panels(results.rows, "epoch", "test accuracy (%)")
  styles = drawing.styles(results.columns)
  for axes, row in zip(panels, results.rows, strict=True):
    for search in results.in_row(row):
      curves = [run.history["test"] for run in results.at_best_rate(search)]
      if curves:
        accuracies = zip(*(curve["accuracy"] for curve in curves), strict=True)
        means = [100 * statistics.fmean(each) for each in accuracies]
        _draw_curve(axes, curves[0]["epoch"], means, styles[search.column])
    if not axes.lines:
      axes.text(0.5, 0.5, "no rate completes", ha="center", transform=axes.transAxes)
    axes.set_ylim(0, 104)
    axes.set_xlim(left=0)
  _finish(figure, styles)
  return figure


def run_curves(history: Mapping[str, Mapping[str, Any]]) -> "Figure":
  """Draws loss and accuracy of one run by epoch, on training and test set."""
  figure, (loss, accuracy) = drawing.new_panels(("loss", "accuracy (%)"), "epoch")
  curves = [history["train"], history["test"]]
  styles = drawing.styles(("training set, as trained on", "test set"))
  for curve, style in zip(curves, styles.values(), strict=True):
    _draw_curve(loss, curve["epoch"], curve["loss"], style)
    percent = [100 * value for value in curve["accuracy"]]
    _draw_curve(accuracy, curve["epoch"], percent, style)
  # A run that diverged has losses that are not finite.
  losses = [
    value for curve in curves for value in curve["loss"] if 0 < value < math.inf
  ]
  # Below a decade, a logarithmic axis has hardly a readable number.
  if losses and max(losses) > 10 * min(losses):
    loss.set_yscale("log")
  accuracy.set_ylim(0, 104)
  for axes in (loss, accuracy):
    axes.set_xlim(left=0)
  _finish(figure, styles)
  return figure


def _draw_curve(
  axes: "Axes",
  epochs: Sequence[float],
  values: Sequence[float],
  style: Mapping[str, Any],
) -> None:
  # Twelve marks at most: more would hide the line.
  axes.plot(epochs, values, markevery=max(1, -(-len(values) // 12)), **style, **_LINE)


def _finish(figure: "Figure", styles: Mapping[str, Mapping[str, Any]]) -> None:
  # The first panel may lack some of the lines.
  drawing.finish(figure, {label: {**style, **_LINE} for label, style in styles.items()})


def draw_line(
  axes: "Axes",
  points: Sequence[Point],
  style: Mapping[str, Any],
  label: str | None = None,
) -> None:
  """Draws a line through points, in a style of `drawing.styles`."""
  x, y = [point.x for point in points], [point.y for point in points]
  whiskers = [[point.below for point in points], [point.above for point in points]]
  axes.errorbar(x, y, whiskers, capsize=2, label=label, **style, **_LINE)
  bounds = [point for point in points if point.is_bound]
  if bounds:
    hollow = {"linestyle": "none", "markerfacecolor": "white", "zorder": 3}
    x, y = [point.x for point in bounds], [point.y for point in bounds]
    axes.plot(x, y, **{**style, **_LINE, **hollow})


def mean_points(
  places: Iterable[tuple[float, SearchResult[Any] | RateSummary]],
  quantity: str = "test_accuracy",
  factor: float = 100.0,
) -> list[Point]:
  """Returns means, such as accuracies in %, with whiskers of one deviation."""
  points = []
  for x, each in places:
    mean = getattr(each, quantity)
    if mean is not None:
      deviation = factor * (getattr(each, f"{quantity}_deviation") or 0.0)
      points.append(Point(x, factor * mean, deviation, deviation))
  return points


def best_rate_points(places: Iterable[tuple[float, SearchResult[Any]]]) -> list[Point]:
  """Returns the best rates of networks that train, with their ranges.

  Rates at the edge of a search are bounds; networks at chance have no best rate.
  """
  points = []
  for x, search in places:
    best = search.optimum
    if search.trains and best is not None:
      rate, low, high = best.learning_rate, best.lowest_rate, best.highest_rate
      points.append(Point(x, rate, rate - low, high - rate, not best.is_inside))
  return points


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
    label: returns the text of a tick; None: as a power of two where it is one.
  """
  values = sorted(values)
  getattr(axes, f"set_{name}scale")("log", base=2)
  getattr(axes, f"set_{name}lim")(values[0] / 1.5, values[-1] * 1.5)
  axis = axes.xaxis if name == "x" else axes.yaxis
  shown = values[:: -(-len(values) // most)]
  axis.set_ticks(shown, [(label or format_rate)(value) for value in shown], fontsize=9)
  axis.minorticks_off()


def log_rate_axis(axes: "Axes", *, most: int) -> list[float]:
  """Scales the vertical axis of rates by factors of two; returns the rates drawn."""
  drawn: list[Any] = [line.get_ydata() for line in axes.lines]
  rates = [float(rate) for line in drawn for rate in line if rate > 0]
  if rates:
    lowest = math.floor(math.log2(min(rates)))
    highest = math.ceil(math.log2(max(rates)))
    powers = [2.0**power for power in range(lowest, highest + 1)]
    log_axis(axes, "y", powers, most=most)
  return rates
