"""Figures of signals: measured points on theoretical lines, without pyplot."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from skipinit_jax.analysis.measure import Ensemble
from skipinit_jax.analysis.signal import Signal
from skipinit_jax.analysis.theory import path_weights
from skipinit_jax.document import drawing
from skipinit_jax.errors import extra

__all__ = [
  "SIGNAL_QUANTITIES",
  "Curve",
  "Line",
  "Panel",
  "branch_figure",
  "cosine_figure",
  "gradient_figure",
  "heat_map_figures",
  "line_figure",
  "mean_and_error",
  "measured_path_weights",
  "path_figure",
  "ratio_figure",
  "stream_figure",
]

# matplotlib takes most of a second to import.
if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.colors import Colormap, Normalize
  from matplotlib.figure import Figure

# The one quantity by block whose axis is not logarithmic.
_COSINE = "cosine similarity of two inputs"
# More points would hide their line.
_MOST_POINTS = 16
_HEAT_MAPS_PER_ROW = 3
# Zeros on a logarithmic scale of colors, and what is not finite.
_NO_COLOR = "#d0d0d0"

SIGNAL_QUANTITIES: dict[str, str] = {
  "alpha": "α",
  "branch_to_skip": "branch-to-skip ratio",
  "gradient_rms": "gradient (RMS)",
}
"""What training logs of each block, a property of `Signal`, and its name in figures."""


class Curve(NamedTuple):
  """The signal of one network.

  Attributes:
    label: its name in the legend.
    measured: its ensemble.
    theory: what theory predicts; None: no line.
  """

  label: str
  measured: Ensemble
  theory: Signal | None = None


class Line(NamedTuple):
  """Points of one network, and the line on which they should lie.

  Attributes:
    x: places on the horizontal axis, [n].
    y: the points, [n].
    error: their standard errors, [n]; None: no bars.
    line: the line, [n]; None: the points are not joined.
  """

  x: Sequence[float] | np.ndarray
  y: np.ndarray
  error: np.ndarray | None
  line: np.ndarray | None


class Panel(NamedTuple):
  """Lines on axes of their own.

  Attributes:
    title: its title, which names the quantity.
    lines: the lines by their labels; x and y alone are points joined by a line. A label
      has one color in all panels.
    log_x: whether x, such as learning rates, is drawn by factors of two.
    log_y: whether y is drawn on a logarithmic axis.
  """

  title: str
  lines: Mapping[str, Line | tuple[Sequence[float] | np.ndarray, np.ndarray]]
  log_x: bool = False
  log_y: bool = True


def line_figure(panels: Sequence[Panel], x_label: str) -> "Figure":
  """Draws lines and points, such as quantities by block or by step of training.

  What is not finite, or not positive on a logarithmic axis, is not drawn.

  Args:
    panels: from left to right, two in a row.
    x_label: what x is in all of them.
  """
  with extra("figures"):
    from matplotlib.ticker import MaxNLocator

  titles = [panel.title for panel in panels]
  figure, drawn = drawing.new_panels(titles, x_label, margin=0.9, height=2.5)
  labels = dict.fromkeys(label for panel in panels for label in panel.lines)
  # Later marks are smaller, so that equal points are all seen.
  styles = {
    label: style | {"markersize": max(4.0, 6 - 0.7 * index)}
    for index, (label, style) in enumerate(drawing.styles(labels).items())
  }
  for axes, panel in zip(drawn, panels, strict=True):
    for label, each in panel.lines.items():
      line = each if isinstance(each, Line) else Line(*each, None, each[1])
      _draw(axes, line, styles[label], panel.log_y)
    if panel.log_y:
      points = np.concatenate([np.asarray(each[1]) for each in panel.lines.values()])
      drawing.scale_by_decades(axes, points[_visible(points, log=True)])
    if panel.log_x:
      axes.set_xscale("log", base=2)
    else:
      axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.tick_params(labelsize=9)
  drawing.finish(figure, styles)
  return figure


def _draw(axes: "Axes", line: Line, style: dict[str, Any], log: bool) -> None:
  """Draws a line and, at some of its places, the points."""
  x, y = np.asarray(line.x), np.asarray(line.y)
  if line.line is not None:
    values = np.where(_visible(line.line, log), line.line, np.nan)
    axes.plot(x, values, color=style["color"], linewidth=1.5, zorder=1)
  chosen = np.unique(np.linspace(0, len(x) - 1, _MOST_POINTS).round().astype(int))
  chosen = chosen[_visible(y[chosen], log)]
  bars = None
  if line.error is not None:
    error = np.where(np.isfinite(line.error), line.error, 0.0)
    # A bar that would end below zero has no end on a logarithmic axis.
    below = np.minimum(error, 0.99 * y) if log else error
    bars = [below[chosen], error[chosen]]
  marks: dict[str, Any] = {"linestyle": "none", "capsize": 2, "elinewidth": 1}
  axes.errorbar(x[chosen], y[chosen], bars, **{**style, **marks})


def _visible(values: np.ndarray, log: bool) -> np.ndarray:
  """Tells which values an axis can show."""
  return np.isfinite(values) & ((values > 0) | (not log))


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the mean over seeds and its standard error.

  Args:
    values: the seeds' values, [n, ...].
  """
  return values.mean(0), values.std(0, ddof=1) / len(values) ** 0.5


def _by_block(
  curves: Sequence[Curve], quantities: Mapping[str, Callable[[Signal], Any]]
) -> "Figure":
  """Draws quantities by block, one panel each.

  Args:
    quantities: by their titles, what to take of a signal, [..., d] or [..., d + 1].
  """
  panels = []
  for title, quantity in quantities.items():
    lines = {}
    for label, measured, theory in curves:
      with np.errstate(all="ignore"):
        mean, error = mean_and_error(quantity(measured.signals))
        expected = None if theory is None else quantity(theory)
      last = len(measured.signals.names)
      blocks = np.arange(last + 1 - len(mean), last + 1)
      lines[label] = Line(blocks, mean, error, expected)
    panels.append(Panel(title, lines, log_y=title != _COSINE))
  return line_figure(panels, "block")


def stream_figure(curves: Sequence[Curve]) -> "Figure":
  """Draws the stream's second moment and variance by block."""
  return _by_block(
    curves,
    {
      "second moment of the stream": lambda signal: signal.second_moment,
      "variance of the stream": lambda signal: signal.variance,
    },
  )


def branch_figure(curves: Sequence[Curve]) -> "Figure":
  """Draws second moments and variances of skip path and branch by block."""
  return _by_block(
    curves,
    {
      "second moment, skip path": lambda signal: signal.skip_second_moment,
      "second moment, branch": lambda signal: signal.branch_second_moment,
      "variance, skip path": lambda signal: signal.skip_variance,
      "variance, branch": lambda signal: signal.branch_variance,
    },
  )


def ratio_figure(curves: Sequence[Curve]) -> "Figure":
  """Draws the ratio of the branch's variance to the skip path's by block.

  If a network is batch-normalized, a second panel has its moving variance.
  """
  quantities: dict[str, Callable[[Signal], Any]] = {
    "branch-to-skip ratio of variances": lambda signal: signal.branch_to_skip
  }
  if any(np.isfinite(curve.measured.signals.moving_variance).any() for curve in curves):
    title = "moving variance of batch norm"
    quantities[title] = lambda signal: signal.moving_variance
  return _by_block(curves, quantities)


def gradient_figure(curves: Sequence[Curve]) -> "Figure":
  """Draws the gradient's second moment over that behind the last block, by block."""
  title = "second moment of the gradient"
  return _by_block(curves, {title: lambda signal: signal.relative_gradient})


def cosine_figure(curves: Sequence[Curve]) -> "Figure":
  """Draws the cosine similarity of two inputs by block, and what it lacks to one."""
  return _by_block(
    curves,
    {
      _COSINE: lambda signal: signal.cosine,
      "1 - cosine similarity": lambda signal: 1 - signal.cosine,
    },
  )


def path_figure(curves: Sequence[Curve]) -> "Figure":
  """Draws the weight of the paths of each length in the output."""
  lines = {}
  for curve in curves:
    weights = measured_path_weights(curve.measured)
    if weights is None:
      continue
    mean, error = weights
    # Where there is weight: elsewhere, points on the axis would cover each other.
    seen = np.flatnonzero(mean > 2e-3)
    part = slice(max(seen[0] - 1, 0), seen[-1] + 2)
    theory = None if curve.theory is None else path_weights(curve.theory.branch_share)
    lines[curve.label] = Line(
      np.arange(len(mean))[part],
      mean[part],
      error[part],
      None if theory is None else theory[part],
    )
  panel = Panel("weight of the paths of a length", lines, log_y=False)
  return line_figure([panel], "length of the path, in branches")


def measured_path_weights(
  ensemble: Ensemble,
) -> tuple[np.ndarray, np.ndarray] | None:
  """Returns mean and standard error over seeds of the paths' weights.

  Returns:
    Two arrays, [d + 1]; None if a branch's share of its sum is not known, as where
    the signal overflows.
  """
  with np.errstate(invalid="ignore"):
    shares = ensemble.signals.branch_share
  if not np.isfinite(shares).all():
    return None
  return mean_and_error(np.array([path_weights(each) for each in shares]))


SignalHistory = Mapping[str, np.ndarray]
"""The signal of a network during training, as arrays by name.

"step" has the steps at which it was measured, [t], and "block" the numbers of the
blocks, from 1, [d]; both ascend. Each quantity of `SIGNAL_QUANTITIES` that the network
has is an array [t, d].
"""


def heat_map_figures(networks: Mapping[str, SignalHistory | str]) -> list["Figure"]:
  """Draws what training logged by block and step, with a color for each value.

  Each network has a column, each quantity a row with one scale of colors for all
  networks, in all figures: around zero for alpha, otherwise logarithmic, from the 1st
  to the 99th percentile. Zeros of a logarithmic scale, and values that are not finite,
  are gray.

  Args:
    networks: what was logged, by the network's title; or, in words, why nothing was.

  Returns:
    A figure for every three networks; none if nothing was logged of any.
  """
  histories = [each for each in networks.values() if not isinstance(each, str)]
  scales = {}
  for name in SIGNAL_QUANTITIES:
    values = [each[name].ravel() for each in histories if name in each]
    if values:
      scales[name] = _color_scale(np.concatenate(values), around_zero=name == "alpha")
  if not scales:
    return []
  steps = np.concatenate([_edges(each["step"]) for each in histories])
  blocks = np.concatenate([_edges(each["block"]) for each in histories])
  limits = {"xlim": (steps.min(), steps.max()), "ylim": (blocks.min(), blocks.max())}
  # Figures of nearly equal numbers of columns.
  count = -(-len(networks) // _HEAT_MAPS_PER_ROW)
  parts = np.array_split(list(networks), count)
  return [
    _heat_maps({title: networks[title] for title in part.tolist()}, scales, limits)
    for part in parts
  ]


def _color_scale(
  values: np.ndarray, *, around_zero: bool
) -> "tuple[Normalize, Colormap]":
  """Returns the colors of values."""
  with extra("figures"):
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

  values = values[np.isfinite(values)]
  if around_zero:
    largest = np.abs(values).max(initial=0.0) or 1.0
    colors = colormaps["RdBu_r"].with_extremes(bad=_NO_COLOR)
    return Normalize(-largest, largest), colors
  values = values[values > 0]
  # One branch that vanishes for a moment would take all colors for itself.
  low, high = np.quantile(values, (0.01, 0.99)) if values.size else (1.0, 1.0)
  # At least a factor of two: otherwise the noise of a constant would be colorful.
  margin = max(1.0, 2 * low / high) ** 0.5
  colors = colormaps["viridis"].with_extremes(bad=_NO_COLOR)
  return LogNorm(low / margin, high * margin), colors


def _heat_maps(
  networks: Mapping[str, SignalHistory | str],
  scales: Mapping[str, "tuple[Normalize, Colormap]"],
  limits: Mapping[str, tuple[float, float]],
) -> "Figure":
  """Draws one figure; its columns are networks, its rows the scales' quantities."""
  from matplotlib.cm import ScalarMappable
  from matplotlib.ticker import EngFormatter, MaxNLocator

  figure = drawing.new_figure(0.8 + 1.75 * len(scales))
  panels = figure.subplots(
    len(scales), len(networks), sharex=True, sharey=True, squeeze=False
  )
  for row, (name, (norm, colors)) in zip(panels, scales.items(), strict=True):
    label = SIGNAL_QUANTITIES[name]
    for axes, history in zip(row, networks.values(), strict=True):
      if isinstance(history, str) or name not in history:
        missing = "no learnable α" if name == "alpha" else f"no {label}"
        text = textwrap.fill(history if isinstance(history, str) else missing, 16)
        middle = {"ha": "center", "va": "center", "transform": axes.transAxes}
        axes.text(0.5, 0.5, text, fontsize=9, **middle)
        continue
      axes.pcolormesh(
        _edges(history["step"]),
        _edges(history["block"]),
        np.ma.masked_invalid(history[name]).T,
        norm=norm,
        cmap=colors,
        # Thousands of cells as shapes would make a page of megabytes.
        rasterized=True,
      )
    figure.colorbar(ScalarMappable(norm, colors), ax=list(row), label=label, pad=0.02)
  for axes, title in zip(panels[0], networks, strict=True):
    text = textwrap.fill(title, 60 // len(networks))
    axes.set_title(text, fontsize=10, parse_math=False)
  for axes in panels.flat:
    axes.tick_params(labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(2 + 6 // len(networks), integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
  # Also where no panel has a map.
  panels[0, 0].set(**limits)
  figure.supxlabel("step", fontsize=10)
  figure.supylabel("block", fontsize=10)
  return figure


def _edges(centers: np.ndarray) -> np.ndarray:
  """Returns the edges of cells around ascending numbers."""
  if len(centers) == 1:
    return centers[0] + np.array([-0.5, 0.5])
  middles = (centers[1:] + centers[:-1]) / 2
  first, last = 2 * centers[0] - middles[0], 2 * centers[-1] - middles[-1]
  return np.concatenate([[first], middles, [last]])
