"""What all figures have in common: their width, their legend and no pyplot."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

# matplotlib takes most of a second to import.
if TYPE_CHECKING:
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
# Inches: a phone shows a figure so wide whole, with letters that can be read.
_WIDTH = 6.4


def new_figure(height: float) -> "Figure":
  """Returns an empty figure.

  Args:
    height: in inches.
  """
  from matplotlib.figure import Figure

  return Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="white")


def style(index: int) -> dict[str, Any]:
  """Returns color and mark of the line of this number, for matplotlib's `plot`."""
  return {
    "color": _COLORS[index % len(_COLORS)],
    "marker": _MARKERS[index % len(_MARKERS)],
  }


def finish(figure: "Figure", handles: Sequence[Any], labels: Sequence[str]) -> None:
  """Puts a legend above the figure, in as many columns as fit, and opens its frames.

  Args:
    figure: the figure.
    handles: what the labels stand for; none: no legend.
    labels: the labels.
  """
  if labels:
    # Inches of the longest label, with its sign.
    column = 0.6 + 0.075 * max(map(len, labels))
    figure.legend(
      handles,
      labels,
      loc="outside upper center",
      ncols=max(1, min(len(labels), int(_WIDTH / column))),
      frameon=False,
      fontsize=9,
    )
  for each in figure.axes:
    each.spines[["top", "right"]].set_visible(False)
