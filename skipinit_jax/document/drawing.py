"""What all figures have in common: their width, their legend and no pyplot."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

# matplotlib takes most of a second to import.
if TYPE_CHECKING:
  from matplotlib.figure import Figure

# Inches: a phone shows a figure so wide whole, with letters that can be read.
_WIDTH = 6.4


def new_figure(height: float) -> "Figure":
  """Returns an empty figure.

  Args:
    height: in inches.
  """
  from matplotlib.figure import Figure

  return Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="white")


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
