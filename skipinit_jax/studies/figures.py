"""Figures of studies, drawn without pyplot: no global state, no display."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from skipinit_jax.document import drawing
from skipinit_jax.studies.findings import is_stable_throughout
from skipinit_jax.studies.names import format_alpha, format_rate
from skipinit_jax.studies.statistics import Optimum
from skipinit_jax.studies.study import SearchResult, StudyResults, unique

# matplotlib takes most of a second to import; a study draws when it has finished.
if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

_COLORS = (
  "#4269d0",
  "#efb118",
  "#3ca951",
  "#ff725c",
  "#6cc5b0",
  "#a463f2",
  "#9c6b4e",
  "#e15ca8",
  "#97bbf5",
  "#1d3557",
  "#b8c43a",
  "#9498a0",
)
_MARKERS = "osD^vP*Xhp<>"
_PANELS_PER_ROW = 2
# As many numbers, and names of networks, stand side by side in that width.
_BARS_PER_PANEL = 20
_NETWORKS_PER_PANEL = 3


def depth_bars(results: StudyResults) -> "Figure":
  """Draws test accuracy by row and column, panels for each kind of network.

  Args:
    results: of a study whose accuracies stand for themselves, such as a depth study.
  """
  columns = unique([search.column for search in results.searches])
  most = min(_NETWORKS_PER_PANEL, max(1, _BARS_PER_PANEL // len(columns)))
  parts: list[list[Any]] = []
  for family in unique([_family(search) for search in results.searches]):
    rows = unique([each.row for each in results.searches if _family(each) == family])
    parts += [rows[start : start + most] for start in range(0, len(rows), most)]
  figure = drawing.new_figure(0.7 + 2.2 * len(parts))
  panels = figure.subplots(len(parts), 1, squeeze=False)[:, 0]
  width = max(map(len, parts))
  bar_width = 0.84 / len(columns)
  for axes, rows in zip(panels, parts, strict=True):
    for search in results.searches:
      if search.row in rows:
        index = columns.index(search.column)
        center = rows.index(search.row) - 0.42 + (index + 0.5) * bar_width
        _bar(axes, search, center, 0.92 * bar_width, _COLORS[index % len(_COLORS)])
    axes.set_xticks(range(len(rows)), rows)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(0, 114)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("test accuracy (%)")
  for index, column in enumerate(columns):
    panels[0].bar(0, 0, color=_COLORS[index % len(_COLORS)], label=column)
  if not all(search.trains for search in results.searches):
    panels[0].bar(
      0, 0, color="none", edgecolor="gray", hatch="////", label="does not train"
    )
  drawing.finish(figure, *panels[0].get_legend_handles_labels())
  return figure


def _bar(
  axes: "Axes", search: SearchResult, center: float, width: float, color: str
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


def rate_curves(results: StudyResults) -> "Figure":
  """Draws test accuracy by learning rate, a panel for each row of the table.

  Args:
    results: of any study.
  """
  accuracies = [
    100 * rate.test_accuracy
    for search in results.searches
    for rate in search.rates
    if rate.test_accuracy is not None
  ]
  lowest = 20 * math.floor(min(accuracies, default=0.0) / 20)
  step = 0.07 * (100 - lowest)

  def draw(axes: "Axes", lines: Sequence[tuple[SearchResult, dict[str, Any]]]) -> None:
    failing = 0
    for search, style in lines:
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
        **style,
      )
      failed = [
        rate.learning_rate for rate in search.rates if rate.test_accuracy is None
      ]
      if failed:
        # Below the accuracies, each method at its own height.
        failing += 1
        heights = [lowest - step * failing] * len(failed)
        axes.plot(failed, heights, "x", color=style["color"], markersize=5)
      if search.trains and search.optimum and search.test_accuracy is not None:
        axes.plot(
          search.optimum.learning_rate,
          100 * search.test_accuracy,
          "o",
          markersize=11,
          markerfacecolor="none",
          markeredgecolor=style["color"],
        )
    if failing:
      axes.axhline(lowest, color="gray", linewidth=0.8)
    _log_axis(
      axes, "x", {rate.learning_rate for each, _ in lines for rate in each.rates}, 8
    )
    axes.set_yticks(range(lowest, 101, 20 if lowest < 60 else 10))
    axes.set_ylim(
      lowest - step * (failing + 0.7) if failing else lowest, 100 + step / 2
    )

  return _panels(results, draw, "learning rate")


def learning_curves(results: StudyResults) -> "Figure":
  """Draws test accuracy by epoch at each best rate, the mean over completed runs.

  Args:
    results: of any study.
  """

  def draw(axes: "Axes", lines: Sequence[tuple[SearchResult, dict[str, Any]]]) -> None:
    for search, style in lines:
      curves = [
        run.history["test"]
        for run in results.runs
        if search.optimum is not None
        and run.search == search.name
        and run.learning_rate == search.optimum.learning_rate
        and run.status == "completed"
      ]
      if curves:
        accuracies = zip(*(curve["accuracy"] for curve in curves), strict=True)
        means = [100 * statistics.fmean(each) for each in accuracies]
        # Twelve marks at most: more would hide the line.
        every = -(-len(means) // 12)
        axes.plot(curves[0]["epoch"], means, markevery=every, **style)
    if not axes.lines:
      axes.text(0.5, 0.5, "no rate completes", ha="center", transform=axes.transAxes)
    axes.set_ylim(0, 104)
    axes.set_xlim(left=0)

  return _panels(results, draw, "epoch")


def run_curves(history: Mapping[str, Mapping[str, Any]]) -> "Figure":
  """Draws loss and accuracy of one run by epoch, on training and test set.

  Args:
    history: of the run; see `history.make_history`.
  """
  figure = drawing.new_figure(3.2)
  panels = figure.subplots(1, 2)
  loss, accuracy = panels
  for index, (name, label) in enumerate(
    (("train", "training set, as trained on"), ("test", "test set"))
  ):
    curve = history[name]
    style = _style(index) | {"markevery": max(1, -(-len(curve["epoch"]) // 12))}
    loss.plot(curve["epoch"], curve["loss"], label=label, **style)
    percent = [100 * value for value in curve["accuracy"]]
    accuracy.plot(curve["epoch"], percent, **style)
  losses = [
    value
    for name in ("train", "test")
    for value in history[name]["loss"]
    # Others are those of a run that diverged.
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


def batch_size_curves(results: StudyResults, budget: str) -> "Figure":
  """Draws accuracy, loss, best and largest stable rate by batch size.

  Args:
    results: of a batch-size study.
    budget: "epochs" or "steps".
  """
  from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

  figure = drawing.new_figure(6.2)
  panels = figure.subplots(2, 2)
  accuracy, loss, best, stable = panels.flat
  searches = [each for each in results.searches if each.labels["budget"] == budget]
  sizes = sorted({search.labels["batch_size"] for search in searches})
  losses = [
    bound
    for search in searches
    if search.train_loss
    for bound in (
      max(
        search.train_loss - (search.train_loss_deviation or 0.0), search.train_loss / 2
      ),
      search.train_loss + (search.train_loss_deviation or 0.0),
    )
  ]
  loss.set_yscale("log")
  if losses:
    loss.set_ylim(min(losses) / 1.2, max(losses) * 1.2)
  for index, column in enumerate(unique([search.column for search in searches])):
    style = _style(index)
    mine = [search for search in searches if search.column == column]
    mine.sort(key=_batch_size)
    completed = [search for search in mine if search.optimum is not None]
    accuracy.errorbar(
      [_batch_size(search) for search in completed],
      [100 * (search.test_accuracy or 0.0) for search in completed],
      [100 * (search.test_accuracy_deviation or 0.0) for search in completed],
      capsize=2,
      label=column,
      **style,
    )
    loss.errorbar(
      [_batch_size(search) for search in completed],
      [search.train_loss for search in completed],
      [search.train_loss_deviation or 0.0 for search in completed],
      capsize=2,
      **style,
    )
    # Networks at chance have no optimal rate.
    optima = [
      (_batch_size(search), search.optimum)
      for search in mine
      if search.optimum is not None and search.trains
    ]
    _best_rates(best, optima, style)
    found = [search for search in mine if search.largest_stable_rate is not None]
    stable.plot(
      [_batch_size(search) for search in found],
      [search.largest_stable_rate for search in found],
      **style,
    )
    _hollow(
      stable,
      [
        (_batch_size(search), search.largest_stable_rate)
        for search in found
        if is_stable_throughout(search)
      ],
      style,
    )
  titles = (
    "test accuracy (%)",
    "training loss",
    "optimal learning rate",
    "largest stable learning rate",
  )
  for axes, title in zip(panels.flat, titles, strict=True):
    axes.set_title(title, fontsize=10)
    _log_axis(axes, "x", sizes, 7, str)
    axes.grid(alpha=0.25)
  figure.supxlabel("batch size", fontsize=10)
  loss.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
  loss.yaxis.set_major_formatter(FormatStrFormatter("%g"))
  loss.yaxis.set_minor_locator(NullLocator())
  # Legends list error bars after lines, and this one is to be the last.
  accuracy.errorbar(
    [], [], fmt=":", color="gray", label="proportional to the batch size"
  )
  for axes in (best, stable):
    rates = [rate for line in axes.lines for rate in line.get_ydata() if rate > 0]
    if rates:
      _log_axis(axes, "y", _powers_between(min(rates), max(rates)), 8)
      # A line of slope one through the middle: in proportion to the batch size.
      middle = math.sqrt(min(rates) * max(rates) / (sizes[0] * sizes[-1]))
      limits = axes.get_ylim()
      axes.plot(sizes, [middle * size for size in sizes], ":", color="gray")
      axes.set_ylim(limits)
  drawing.finish(figure, *accuracy.get_legend_handles_labels())
  return figure


def _batch_size(search: SearchResult) -> int:
  size: int = search.labels["batch_size"]
  return size


def _best_rates(
  axes: "Axes", optima: Sequence[tuple[Any, Optimum]], style: dict[str, Any]
) -> None:
  """Draws best rates with their ranges; those at the edge of a search are hollow."""
  axes.errorbar(
    [x for x, _ in optima],
    [optimum.learning_rate for _, optimum in optima],
    [
      [optimum.learning_rate - optimum.lowest_rate for _, optimum in optima],
      [optimum.highest_rate - optimum.learning_rate for _, optimum in optima],
    ],
    capsize=2,
    **style,
  )
  _hollow(
    axes,
    [(x, optimum.learning_rate) for x, optimum in optima if not optimum.is_inside],
    style,
  )


def _hollow(
  axes: "Axes", points: Sequence[tuple[Any, Any]], style: dict[str, Any]
) -> None:
  """Marks points that are only bounds."""
  if points:
    hollow = style | {"linestyle": "none", "markerfacecolor": "white", "zorder": 3}
    axes.plot([x for x, _ in points], [y for _, y in points], **hollow)


def regularization_curves(results: StudyResults) -> "Figure":
  """Draws test accuracy by dropout rate, a line for each row of the table.

  Args:
    results: of a regularization study.
  """
  figure = drawing.new_figure(4.8)
  axes = figure.add_subplot()
  for index, row in enumerate(unique([search.row for search in results.searches])):
    mine = [
      search
      for search in results.searches
      if search.row == row and search.test_accuracy is not None
    ]
    mine.sort(key=lambda search: float(search.labels["dropout_rate"]))
    axes.errorbar(
      [search.labels["dropout_rate"] for search in mine],
      [100 * (search.test_accuracy or 0.0) for search in mine],
      [100 * (search.test_accuracy_deviation or 0.0) for search in mine],
      capsize=2,
      label=row,
      **_style(index),
    )
  axes.set_xlabel("dropout rate")
  axes.set_ylabel("test accuracy (%)")
  axes.grid(alpha=0.25)
  drawing.finish(figure, *axes.get_legend_handles_labels())
  return figure


def branch_scale_curves(results: StudyResults) -> "Figure":
  """Draws test accuracy and best rate by alpha, a row of panels for each depth.

  Args:
    results: of a branch-scale study.
  """
  depths = unique([search.labels["depth"] for search in results.searches])
  figure = drawing.new_figure(1.2 + 2.1 * len(depths))
  panels = figure.subplots(len(depths), 2, squeeze=False)
  scaled = [each for each in results.searches if each.labels["alpha"] is not None]
  alphas = sorted({search.labels["alpha"] for search in scaled})
  lines = unique([_alpha_line(search) for search in results.searches])
  for (accuracy, best), depth in zip(panels, depths, strict=True):
    for index, line in enumerate(lines):
      mine = [
        search
        for search in results.searches
        if search.labels["depth"] == depth and _alpha_line(search) == line
      ]
      if mine[0].labels["alpha"] is None:
        _reference_line(accuracy, best, mine[0], line, index)
      else:
        mine.sort(key=lambda search: float(search.labels["alpha"]))
        _alpha_curves(accuracy, best, mine, alphas, line, index)
    accuracy.set_ylim(0, 104)
    accuracy.set_ylabel("test accuracy (%)")
    accuracy.set_title(f"depth {depth}", fontsize=10)
    best.set_title(f"optimal learning rate, depth {depth}", fontsize=10)
    rates = [rate for drawn in best.lines for rate in drawn.get_ydata() if rate > 0]
    if rates:
      _log_axis(best, "y", _powers_between(min(rates), max(rates)), 6)
    for axes in (accuracy, best):
      ticks = [_as_power(alpha, format_alpha) for alpha in alphas]
      # Seven would touch each other.
      every = -(-len(alphas) // 6)
      axes.set_xticks(range(len(alphas))[::every], ticks[::every], fontsize=9)
      axes.set_xlim(-0.5, len(alphas) - 0.5)
      axes.grid(alpha=0.25)
  figure.supxlabel("α at initialization", fontsize=10)
  drawing.finish(figure, *panels[0, 0].get_legend_handles_labels())
  return figure


def _alpha_line(search: SearchResult) -> str:
  """Returns the name of a search's line: its row without the network."""
  if search.labels["alpha"] is None:
    return search.column
  return search.row.partition(", ")[2] or search.row


def _alpha_curves(
  accuracy: "Axes",
  best: "Axes",
  searches: Sequence[SearchResult],
  alphas: Sequence[float],
  line: str,
  index: int,
) -> None:
  """Draws one line of accuracies and one of best rates, at alphas' ranks."""
  style = _style(index)
  places = [alphas.index(search.labels["alpha"]) for search in searches]
  points = [
    (place, search)
    for place, search in zip(places, searches, strict=True)
    if search.test_accuracy is not None
  ]
  accuracy.errorbar(
    [place for place, _ in points],
    [100 * (search.test_accuracy or 0.0) for _, search in points],
    [100 * (search.test_accuracy_deviation or 0.0) for _, search in points],
    capsize=2,
    label=line,
    **style,
  )
  failed = [
    place
    for place, search in zip(places, searches, strict=True)
    if search.test_accuracy is None
  ]
  accuracy.plot(failed, [3] * len(failed), "x", color=style["color"], markersize=6)
  optima = [
    (place, search.optimum)
    for place, search in points
    if search.trains and search.optimum is not None
  ]
  _best_rates(best, optima, style)


def _reference_line(
  accuracy: "Axes", best: "Axes", search: SearchResult, line: str, index: int
) -> None:
  """Draws a method that has no alpha as a level line."""
  style = {"color": _style(index)["color"], "linestyle": "--", "linewidth": 1.5}
  if search.test_accuracy is None:
    accuracy.plot([], [], label=line, **style)
  else:
    accuracy.axhline(100 * search.test_accuracy, label=line, **style)
  if search.trains and search.optimum is not None:
    best.axhline(search.optimum.learning_rate, **style)


def _panels(
  results: StudyResults,
  draw: Callable[["Axes", Sequence[tuple[SearchResult, dict[str, Any]]]], None],
  x_label: str,
) -> "Figure":
  """Draws test accuracies, a panel for each row of the table, a line for a column."""
  rows = unique([search.row for search in results.searches])
  columns = unique([search.column for search in results.searches])
  across = min(_PANELS_PER_ROW, len(rows))
  down = -(-len(rows) // across)
  figure = drawing.new_figure(1.1 + 2.1 * down)
  panels = list(figure.subplots(down, across, squeeze=False).flat)
  for axes, row in zip(panels, rows, strict=False):
    draw(
      axes,
      [
        (search, _style(columns.index(search.column)))
        for search in results.searches
        if search.row == row
      ],
    )
    axes.set_title(row, fontsize=10)
    axes.grid(alpha=0.25)
  for axes in panels[len(rows) :]:
    axes.remove()
  for index, column in enumerate(columns):
    panels[0].plot([], [], label=column, **_style(index))
  figure.supxlabel(x_label, fontsize=10)
  figure.supylabel("test accuracy (%)", fontsize=10)
  drawing.finish(figure, *panels[0].get_legend_handles_labels())
  return figure


def _style(index: int) -> dict[str, Any]:
  return {
    "color": _COLORS[index % len(_COLORS)],
    "marker": _MARKERS[index % len(_MARKERS)],
    "markersize": 5,
    "linewidth": 1.5,
  }


def _powers_between(lowest: float, highest: float) -> list[float]:
  """Returns the powers of two times the lowest rate, up to the highest."""
  return [lowest * 2.0**i for i in range(round(math.log2(highest / lowest)) + 1)]


def _log_axis(
  axes: "Axes",
  name: Literal["x", "y"],
  values: Iterable[float],
  most: int,
  label: Callable[[float], str] | None = None,
) -> None:
  """Scales an axis by factors of two, with some of the values as its ticks."""
  values = sorted(values)
  limits = values[0] / 1.5, values[-1] * 1.5
  if name == "x":
    axes.set_xscale("log", base=2)
    axes.set_xlim(limits)
  else:
    axes.set_yscale("log", base=2)
    axes.set_ylim(limits)
  axis = axes.xaxis if name == "x" else axes.yaxis
  shown = values[:: -(-len(values) // most)]
  axis.set_ticks(shown, [(label or _as_power)(value) for value in shown], fontsize=9)
  axis.minorticks_off()


def _as_power(value: float, as_text: Callable[[float], str] = format_rate) -> str:
  text = as_text(value)
  return f"$2^{{{text[2:]}}}$" if text.startswith("2^") else text


def _family(search: SearchResult) -> tuple[Any, Any]:
  # A study of one network does not say which.
  return search.labels.get("model"), search.labels.get("width")
