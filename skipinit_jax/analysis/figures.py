"""Figures of signals: measured points on theoretical lines, without pyplot."""

import dataclasses
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from skipinit_jax.analysis.measure import Ensemble
from skipinit_jax.analysis.signal import Signal
from skipinit_jax.analysis.theory import path_weights
from skipinit_jax.document import drawing

__all__ = [
  "SIGNAL_QUANTITIES",
  "Curve",
  "Panel",
  "branch_figure",
  "cosine_figure",
  "gradient_figure",
  "heat_map_figures",
  "line_figure",
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

_COLORS = ("#4269d0", "#efb118", "#3ca951", "#ff725c", "#a463f2", "#9c6b4e", "#6cc5b0")
_MARKERS = "osD^vP*"
_SIZES = (6, 5, 4.5, 4, 4, 4, 4)
# More points of a curve would hide its line.
_MOST_POINTS = 16
_HEAT_MAPS_PER_ROW = 3
# What no scale of colors has: zeros of a logarithmic one, and what is not finite.
_NO_COLOR = "#d0d0d0"

SIGNAL_QUANTITIES: dict[str, str] = {
  "alpha": "α",
  "branch_to_skip": "branch-to-skip ratio",
  "gradient_rms": "gradient (RMS)",
}
"""What training logs of each block, a property of `Signal`, and its name in figures."""


@dataclasses.dataclass(frozen=True)
class Curve:
  """The signal of one network.

  Attributes:
    label: its name in the legend.
    measured: its ensemble.
    theory: what theory predicts; None: no line.
  """

  label: str
  measured: Ensemble
  theory: Signal | None = None


@dataclasses.dataclass(frozen=True)
class Panel:
  """Lines on axes of their own.

  Attributes:
    title: its title, which names the quantity.
    lines: x and y of each line by its label. A label has one color in all panels.
    log_x: whether x, such as learning rates, is drawn by factors of two.
    log_y: whether y is drawn on a logarithmic axis.
  """

  title: str
  lines: Mapping[str, tuple[Sequence[float] | np.ndarray, np.ndarray]]
  log_x: bool = False
  log_y: bool = True


def line_figure(panels: Sequence[Panel], x_label: str) -> "Figure":
  """Draws lines, such as quantities by step of training.

  What is not finite, or not positive on a logarithmic axis, is not drawn.

  Args:
    panels: from left to right, two in a row.
    x_label: what x is in all of them.
  """
  figure, drawn = _grid(len(panels))
  styles: dict[str, dict[str, Any]] = {}
  for panel in panels:
    for label in panel.lines:
      styles.setdefault(label, _style(len(styles), label))
  for axes, panel in zip(drawn, panels, strict=True):
    shown = []
    for label, (x, values) in panel.lines.items():
      visible = _visible(values, panel.log_y)
      every = -(-len(values) // _MOST_POINTS)
      # Marks of different lines at different steps, where there are many.
      first = list(styles).index(label) * every // len(styles)
      style = styles[label] | {"label": None}
      y = np.where(visible, values, np.nan)
      axes.plot(x, y, linewidth=1.5, markevery=(first, every), **style)
      shown.append(values[visible])
    if panel.log_x:
      axes.set_xscale("log", base=2)
    _finish_panel(axes, panel.title, np.concatenate(shown), panel.log_y)
  figure.supxlabel(x_label, fontsize=10)
  for style in styles.values():
    drawn[0].errorbar([], [], linewidth=1.5, **style)
  _finish(figure, drawn[0])
  return figure


def stream_figure(curves: Sequence[Curve]) -> "Figure":
  """Draws the stream's second moment and variance by block."""
  return _panels(
    curves,
    [
      ("second moment of the stream", lambda signal: signal.second_moment),
      ("variance of the stream", lambda signal: signal.variance),
    ],
  )


def branch_figure(curves: Sequence[Curve]) -> "Figure":
  """Draws second moments and variances of skip path and branch by block."""
  return _panels(
    curves,
    [
      ("second moment, skip path", lambda signal: signal.skip_second_moment),
      ("second moment, branch", lambda signal: signal.branch_second_moment),
      ("variance, skip path", lambda signal: signal.skip_variance),
      ("variance, branch", lambda signal: signal.branch_variance),
    ],
  )


def ratio_figure(curves: Sequence[Curve]) -> "Figure":
  """Draws the ratio of the branch's variance to the skip path's by block.

  If a network is batch-normalized, a second panel has its moving variance.
  """
  panels: list[tuple[str, Callable[[Signal], Any]]] = [
    ("branch-to-skip ratio of variances", lambda signal: signal.branch_to_skip)
  ]
  if any(np.isfinite(curve.measured.signals.moving_variance).any() for curve in curves):
    panels.append(
      ("moving variance of batch norm", lambda signal: signal.moving_variance)
    )
  return _panels(curves, panels)


def gradient_figure(curves: Sequence[Curve]) -> "Figure":
  """Draws the gradient's second moment over that behind the last block, by block."""
  return _panels(
    curves, [("second moment of the gradient", lambda signal: signal.relative_gradient)]
  )


def cosine_figure(curves: Sequence[Curve]) -> "Figure":
  """Draws the cosine similarity of two inputs by block, and what it lacks to one."""
  return _panels(
    curves,
    [
      ("cosine similarity of two inputs", lambda signal: signal.cosine),
      ("1 - cosine similarity", lambda signal: 1 - signal.cosine),
    ],
    linear=(0,),
  )


def path_figure(curves: Sequence[Curve]) -> "Figure":
  """Draws the weight of the paths of each length in the output."""
  figure = drawing.new_figure(3.6)
  axes = figure.add_subplot()
  longest = 4.0
  for index, curve in enumerate(curves):
    weights = measured_path_weights(curve.measured)
    if weights is None:
      continue
    mean, error = weights
    theory = None if curve.theory is None else path_weights(curve.theory.branch_share)
    # Where there is weight: elsewhere, points on the axis would cover each other.
    seen = np.flatnonzero(mean > 2e-3)
    part = slice(max(seen[0] - 1, 0), seen[-1] + 2)
    _draw(
      axes,
      np.arange(len(mean))[part],
      None if theory is None else theory[part],
      mean[part],
      error[part],
      _style(index, curve.label),
    )
    longest = max(longest, seen[-1] + 2)
  axes.set_xlim(-0.02 * longest, longest)
  axes.set_ylim(bottom=0)
  axes.set_xlabel("length of the path, in branches")
  axes.set_ylabel("weight")
  axes.grid(alpha=0.25)
  _finish(figure, axes)
  return figure


def measured_path_weights(
  ensemble: Ensemble,
) -> tuple[np.ndarray, np.ndarray] | None:
  """Returns mean and standard error over seeds of the paths' weights.

  Args:
    ensemble: the seeds' signals.

  Returns:
    Two arrays, [d + 1]; None if a branch's share of its sum is not known, as where
    the signal overflows.
  """
  with np.errstate(invalid="ignore"):
    shares = ensemble.signals.branch_share
  if not np.isfinite(shares).all():
    return None
  weights = np.array([path_weights(each) for each in shares])
  return weights.mean(0), weights.std(0, ddof=1) / len(weights) ** 0.5


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
  titles = list(networks)
  # Figures of nearly equal numbers of columns.
  count = -(-len(titles) // _HEAT_MAPS_PER_ROW)
  return [
    _heat_maps(
      {titles[index]: networks[titles[index]] for index in part}, scales, limits
    )
    for part in np.array_split(np.arange(len(titles)), count)
  ]


def _color_scale(
  values: np.ndarray, *, around_zero: bool
) -> "tuple[Normalize, Colormap]":
  """Returns the colors of values, those out of range taken for its ends."""
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
  from matplotlib.ticker import FuncFormatter, MaxNLocator

  figure = drawing.new_figure(0.8 + 1.75 * len(scales))
  panels = figure.subplots(
    len(scales), len(networks), sharex=True, sharey=True, squeeze=False
  )
  for row, (name, scale) in zip(panels, scales.items(), strict=True):
    for axes, network in zip(row, networks.values(), strict=True):
      if isinstance(network, str):
        _write_in(axes, network)
      elif name not in network:
        learnable = "learnable " if name == "alpha" else ""
        _write_in(axes, f"no {learnable}{SIGNAL_QUANTITIES[name]}")
      else:
        _draw_heat_map(axes, network, name, scale)
    figure.colorbar(
      ScalarMappable(*scale), ax=list(row), label=SIGNAL_QUANTITIES[name], pad=0.02
    )
  for axes, title in zip(panels[0], networks, strict=True):
    axes.set_title(textwrap.fill(title, 60 // len(networks)), fontsize=10)
  for axes in panels.flat:
    axes.tick_params(labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(2 + 6 // len(networks), integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_format_step))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
  # Also where no panel has a map.
  panels[0, 0].set(**limits)
  figure.supxlabel("step", fontsize=10)
  figure.supylabel("block", fontsize=10)
  return figure


def _draw_heat_map(
  axes: "Axes",
  history: SignalHistory,
  name: str,
  scale: "tuple[Normalize, Colormap]",
) -> None:
  values = np.ma.masked_invalid(history[name])
  if name != "alpha":
    # A zero would get the color of the lowest value.
    values = np.ma.masked_equal(values, 0)
  axes.pcolormesh(
    _edges(history["step"]),
    _edges(history["block"]),
    values.T,
    norm=scale[0],
    cmap=scale[1],
    # Thousands of cells as shapes would make a page of megabytes.
    rasterized=True,
  )


def _edges(centers: np.ndarray) -> np.ndarray:
  """Returns the edges of cells around ascending numbers."""
  if len(centers) == 1:
    return centers[0] + np.array([-0.5, 0.5])
  middles = (centers[1:] + centers[:-1]) / 2
  first, last = 2 * centers[0] - middles[0], 2 * centers[-1] - middles[-1]
  return np.concatenate([[first], middles, [last]])


def _write_in(axes: "Axes", text: str) -> None:
  axes.text(
    *(0.5, 0.5),
    textwrap.fill(text, 16),
    ha="center",
    va="center",
    fontsize=9,
    transform=axes.transAxes,
  )


def _format_step(step: float, _: int) -> str:
  return f"{step / 1000:g}k" if step >= 1000 else f"{step:g}"


def _panels(
  curves: Sequence[Curve],
  panels: Sequence[tuple[str, Callable[[Signal], Any]]],
  linear: Collection[int] = (),
) -> "Figure":
  """Draws quantities by block, one panel each, on logarithmic axes.

  Args:
    curves: the networks.
    panels: titles, and what to take of a signal: an array over blocks in its last
      axis, of d entries (blocks 1 to d) or d + 1 (from the first block's input).
    linear: which panels have a linear axis.
  """
  from matplotlib.ticker import MaxNLocator

  figure, drawn = _grid(len(panels))
  for number, (axes, (title, take)) in enumerate(zip(drawn, panels, strict=True)):
    log, shown = number not in linear, []
    for index, curve in enumerate(curves):
      with np.errstate(all="ignore"):
        values = np.asarray(take(curve.measured.signals))
        mean = values.mean(0)
        error = values.std(0, ddof=1) / len(values) ** 0.5
        theory = None if curve.theory is None else np.asarray(take(curve.theory))
      num_blocks = len(curve.measured.signals.names)
      blocks = np.arange(num_blocks + 1 - len(mean), num_blocks + 1)
      _draw(axes, blocks, theory, mean, error, _style(index, curve.label), log)
      shown.append(mean[_visible(mean, log)])
    _finish_panel(axes, title, np.concatenate(shown), log)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
  figure.supxlabel("block", fontsize=10)
  _finish(figure, drawn[0])
  return figure


def _grid(num_panels: int) -> "tuple[Figure, list[Axes]]":
  """Returns a figure and its panels, two in a row."""
  across = min(2, num_panels)
  down = -(-num_panels // across)
  figure = drawing.new_figure(0.9 + 2.5 * down)
  drawn = list(figure.subplots(down, across, squeeze=False).flat)
  for axes in drawn[num_panels:]:
    axes.remove()
  return figure, drawn[:num_panels]


def _visible(values: np.ndarray, log: bool) -> np.ndarray:
  """Tells which values an axis can show."""
  return np.isfinite(values) & ((values > 0) | (not log))


def _finish_panel(axes: "Axes", title: str, shown: np.ndarray, log: bool) -> None:
  if log:
    axes.set_yscale("log")
    if shown.size:
      # Beyond these, an axis with its margin would leave the range of float64.
      low, high = np.clip([shown.min(), shown.max()], 1e-140, 1e140)
      _set_log_limits(axes, low, high)
  axes.set_title(title, fontsize=10)
  axes.tick_params(labelsize=9)
  axes.grid(alpha=0.25)


def _set_log_limits(axes: "Axes", low: float, high: float) -> None:
  from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

  # At least a decade: otherwise the noise of a constant would fill the panel.
  missing = max(0.0, 1 - np.log10(high / low)) / 2 + 0.05 * np.log10(high / low) + 0.02
  axes.set_ylim(low / 10**missing, high * 10**missing)
  decades = np.log10(high / low)
  if decades > 3:
    # Matplotlib's own ticks: powers of ten, as many as fit.
    axes.yaxis.set_minor_formatter(NullFormatter())
    return
  axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,)))
  axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
  axes.yaxis.set_minor_locator(NullLocator())


def _draw(
  axes: "Axes",
  x: np.ndarray,
  theory: np.ndarray | None,
  mean: np.ndarray,
  error: np.ndarray,
  style: dict[str, Any],
  log: bool = False,
) -> None:
  """Draws a line of theory and, at some of its points, what was measured."""
  if theory is not None:
    line = np.where(_visible(theory, log), theory, np.nan)
    axes.plot(x, line, color=style["color"], linewidth=1.5, zorder=1)
  chosen = np.unique(np.linspace(0, len(x) - 1, _MOST_POINTS).round().astype(int))
  chosen = chosen[_visible(mean[chosen], log)]
  # A bar that would end below zero has no end on a logarithmic axis.
  error = np.where(np.isfinite(error), error, 0.0)
  below = np.minimum(error, 0.99 * mean) if log else error
  axes.errorbar(
    x[chosen],
    mean[chosen],
    [below[chosen], error[chosen]],
    linestyle="none",
    capsize=2,
    elinewidth=1,
    **style,
  )


def _style(index: int, label: str) -> dict[str, Any]:
  return {
    "color": _COLORS[index % len(_COLORS)],
    "marker": _MARKERS[index % len(_MARKERS)],
    # Later marks are smaller, so that equal points are all seen.
    "markersize": _SIZES[index % len(_SIZES)],
    "label": label,
  }


def _finish(figure: "Figure", axes: "Axes") -> None:
  containers, labels = axes.get_legend_handles_labels()
  # The points alone, without their bars.
  handles = [container.get_children()[0] for container in containers]
  drawing.finish(figure, handles, labels)
