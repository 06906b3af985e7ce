"""What all figures have in common: their width, their legend and no pyplot."""

import collections
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from skipinit_jax.errors import extra

# matplotlib takes most of a second to import.
if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

# Color and mark of each method, by its title, in every figure.
_METHODS = {
  "Batch norm": ("#4269d0", "o"),
  "SkipInit, α = 0": ("#efb118", "s"),
  "SkipInit, α = 1/√d": ("#3ca951", "D"),
  "SkipInit, α = 1": ("#ff725c", "^"),
  "Divide by √2": ("#a463f2", "v"),
  "Unnormalized": ("#9498a0", "X"),
  "Fixup": ("#6cc5b0", "P"),
  "NF-ResNet": ("#9c6b4e", "*"),
  "Regularized SkipInit": ("#e15ca8", "h"),
  "Layer norm": ("#97bbf5", "p"),
  "Batch norm at the output only": ("#1d3557", "<"),
  "ReZero": ("#b8c43a", ">"),
  "Batch norm, scale 0": ("#1d3557", "D"),
  "SkipInit + biases": ("#b8c43a", "^"),
  "Fixup + dropout": ("#3ca951", "P"),
  "LayerScale": ("#9c6b4e", "v"),
  "Batch norm, divide by √2": ("#a463f2", "o"),
  "SkipInit, learnable α": ("#efb118", "s"),
  "SkipInit, constant α": ("#b8860b", "d"),
}
# How the variants of one method differ, such as `Batch norm, no biases`: they keep its
# color, the more of it is white the later they come.
_WHITE = (0.0, 0.35, 0.55, 0.7)
_LINES = ("-", "--", "-.", ":")
# A screen with two pixels for each of CSS shows a figure sharply.
_DOTS_PER_INCH = 192
# What matplotlib writes into a file beside the figure: dates and versions.
_METADATA = {"png": ["Software"], "pdf": ["Creator", "Producer", "CreationDate"]}
# Inches: a phone shows a figure so wide whole, with letters that can be read.
_WIDTH = 6.4


def new_figure(height: float) -> "Figure":
  """Returns an empty figure, so many inches high."""
  with extra("figures"):
    from matplotlib.figure import Figure

  return Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="white")


def new_panels(
  titles: Sequence[str],
  x_label: str,
  y_label: str = "",
  *,
  margin: float = 1.2,
  height: float = 2.1,
) -> "tuple[Figure, list[Axes]]":
  """Returns a figure and its panels, two in a row, with labels for all of them.

  Args:
    margin: inches of height for labels and legend.
    height: inches of height of a row.
  """
  across = min(2, len(titles))
  down = -(-len(titles) // across)
  figure = new_figure(margin + height * down)
  panels = list(figure.subplots(down, across, squeeze=False).flat)
  for axes in panels[len(titles) :]:
    axes.remove()
  panels = panels[: len(titles)]
  for axes, title in zip(panels, titles, strict=True):
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.grid(alpha=0.25)
  figure.supxlabel(x_label, fontsize=10)
  figure.supylabel(y_label, fontsize=10)
  return figure, panels


def styles(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
  """Returns color and mark of each label, for matplotlib's `plot`.

  A method's title has its own ones in every figure. A label that begins with a title
  and a comma is a variant of that method: a paler color, and another kind of line. Any
  other label has the first color that no label of this figure has, as far as there are
  enough.
  """
  methods = {label: _method(label) for label in dict.fromkeys(labels)}
  colors = {_METHODS[method][0] for method in methods.values() if method}
  free = [each for each in _METHODS.values() if each[0] not in colors]
  others = itertools.cycle(free or _METHODS.values())
  variants: collections.Counter[str] = collections.Counter()
  chosen: dict[str, dict[str, Any]] = {}
  for label, method in methods.items():
    color, marker = _METHODS[method] if method else next(others)
    chosen[label] = {"color": color, "marker": marker}
    if method and method != label:
      # The method itself, where it is drawn, has the full color.
      index = (variants[method] + (method in methods)) % len(_LINES)
      variants[method] += 1
      chosen[label] |= {
        "color": _pale(color, _WHITE[index]),
        "linestyle": _LINES[index],
      }
  return chosen


def _method(label: str) -> str | None:
  """Returns the title of the method that a label is or begins with, if any."""
  titles = [each for each in _METHODS if f"{label},".startswith(f"{each},")]
  return max(titles, key=len, default=None)


def _pale(color: str, white: float) -> str:
  """Returns a color of the form #rrggbb with this share of white in it."""
  parts = (int(color[start : start + 2], 16) for start in (1, 3, 5))
  return "#" + "".join(f"{round(part + white * (255 - part)):02x}" for part in parts)


def finish(
  figure: "Figure", styles: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
  """Puts a legend above the figure, in as many columns as fit, and opens its frames.

  Args:
    styles: how the legend's lines look, by their labels; None: the legend has
      everything with a label in the first panel.
  """
  from matplotlib.lines import Line2D

  handles: list[Any] = figure.axes[0].get_legend_handles_labels()[0]
  if styles is not None:
    handles = [Line2D([], [], label=name, **style) for name, style in styles.items()]
  labels = [str(handle.get_label()) for handle in handles]
  if labels:
    # Inches of the longest label, with its sign.
    column = 0.6 + 0.075 * max(map(len, labels))
    legend = figure.legend(
      handles=handles,
      loc="outside upper center",
      ncols=max(1, min(len(labels), int(_WIDTH / column))),
      frameon=False,
      fontsize=9,
    )
    # Users' titles are text: a $ in them is one.
    for text in legend.get_texts():
      text.set_parse_math(False)
  for each in figure.axes:
    each.spines[["top", "right"]].set_visible(False)


def scale_by_decades(axes: "Axes", shown: np.ndarray) -> None:
  """Makes the vertical axis logarithmic, with readable ticks for the values shown."""
  from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

  axes.set_yscale("log")
  axes.yaxis.set_minor_formatter(NullFormatter())
  if not shown.size:
    return
  # Beyond these, an axis with its margin would leave the range of float64.
  low, high = np.log10(np.clip([shown.min(), shown.max()], 1e-140, 1e140))
  # At least a decade: otherwise the noise of a constant would fill the panel.
  margin = max(0.0, 1 - (high - low)) / 2 + 0.05 * (high - low) + 0.02
  axes.set_ylim(10 ** (low - margin), 10 ** (high + margin))
  if high - low < 2.5:
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high - low < 2 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def image(figure: "Figure", kind: str = "png") -> bytes:
  """Returns a figure as a file of this kind, png or pdf.

  A figure drawn again is the same file.
  """
  import matplotlib

  file = io.BytesIO()
  # Publishers refuse matplotlib's default, Type 3 fonts.
  with matplotlib.rc_context({"pdf.fonttype": 42}):
    figure.savefig(
      file, format=kind, dpi=_DOTS_PER_INCH, metadata=dict.fromkeys(_METADATA[kind])
    )
  return with_few_colors(file.getvalue()) if kind == "png" else file.getvalue()


def with_few_colors(png: bytes) -> bytes:
  """Returns a PNG with a table of 256 colors, a third as large."""
  from PIL import Image

  file = io.BytesIO()
  picture = Image.open(io.BytesIO(png)).convert("RGB")
  # This way no color of a heat map changes by more than a few parts in 255.
  palette = Image.Quantize.MAXCOVERAGE
  picture = picture.quantize(256, palette, dither=Image.Dither.NONE)
  picture.save(file, "PNG", optimize=True)
  return file.getvalue()
