"""Tables and the figure of a depth study."""

import csv
import dataclasses
import os
import pathlib
from collections.abc import Sequence

import rich.box
import rich.console
import rich.table

from skipinit_jax import methods
from skipinit_jax.studies.depth import Cell, DepthStudy
from skipinit_jax.studies.names import format_rate, unique
from skipinit_jax.training.metrics import write_json

_KINDS = ("json", "csv", "md", "png")
# As many as there are methods.
_COLORS = (
  "#4269d0",
  "#efb118",
  "#ff725c",
  "#6cc5b0",
  "#3ca951",
  "#a463f2",
  "#97bbf5",
  "#9c6b4e",
  "#9498a0",
  "#e15ca8",
  "#1d3557",
  "#b8c43a",
)


def table(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
  """Returns the study's table: networks by methods.

  Returns:
    The header and the rows. An entry is the test accuracy in percent with the best
    rate, or says that the method does not train.
  """
  names = unique(cell.method for cell in cells)
  by_place = {(cell.network, cell.method): cell for cell in cells}
  header = ["network", *(methods.get(name).title for name in names)]
  rows = [
    [
      network,
      *(
        _entry(by_place[network, name]) if (network, name) in by_place else ""
        for name in names
      ),
    ]
    for network in unique(cell.network for cell in cells)
  ]
  return header, rows


def _entry(cell: Cell) -> str:
  if cell.test_accuracy is None or cell.learning_rate is None:
    return "does not train (diverges)"
  deviation = "" if cell.deviation is None else f"±{100 * cell.deviation:.1f}"
  accuracy = f"{100 * cell.test_accuracy:.1f}{deviation}"
  rate = format_rate(cell.learning_rate)
  return (
    f"{accuracy}, {rate}" if cell.trains else f"does not train ({accuracy}, {rate})"
  )


def markdown(cells: Sequence[Cell]) -> str:
  """Returns the study's table in Markdown."""
  header, rows = table(cells)
  lines = [header, ["---"] * len(header), *rows]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def print_table(cells: Sequence[Cell]) -> None:
  """Prints the study's table to standard output."""
  header, rows = table(cells)
  view = rich.table.Table(
    title="Test accuracy in % and best learning rate", box=rich.box.SIMPLE_HEAVY
  )
  for index, name in enumerate(header):
    view.add_column(name, no_wrap=index == 0)
  for row in rows:
    view.add_row(*row)
  rich.console.Console().print(view)


def write(study: DepthStudy, workdir: str | os.PathLike[str]) -> list[pathlib.Path]:
  """Writes `results.json`, `results.csv`, `results.md` and `results.png`.

  Args:
    study: a study of at least one cell.
    workdir: an existing directory.

  Returns:
    The files.
  """
  paths = [pathlib.Path(workdir, f"results.{kind}") for kind in _KINDS]
  as_json, as_csv, as_markdown, as_png = paths
  cells = study.cells
  rows = [dataclasses.asdict(cell) for cell in cells]
  write_json(as_json, dataclasses.asdict(study))
  with as_csv.open("w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
  as_markdown.write_text(markdown(cells), encoding="utf-8")
  draw(cells, as_png)
  return paths


def draw(cells: Sequence[Cell], path: str | os.PathLike[str]) -> None:
  """Draws test accuracy by network and method.

  Args:
    cells: the study's cells.
    path: the image file; its ending decides the format.
  """
  # A figure without pyplot: no global state, and no display is looked for.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  names = unique(cell.method for cell in cells)
  networks = unique(cell.network for cell in cells)
  figure = Figure(figsize=(2.2 + 2.1 * len(networks), 3.6), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  width = 0.84 / len(names)
  for index, name in enumerate(names):
    color = _COLORS[index % len(_COLORS)]
    for cell in (cell for cell in cells if cell.method == name):
      center = networks.index(cell.network) - 0.42 + (index + 0.5) * width
      accuracy = 100 * (cell.test_accuracy or 0.0)
      axes.bar(
        center,
        accuracy,
        0.92 * width,
        yerr=None if cell.deviation is None else 100 * cell.deviation,
        color=color if cell.trains else "none",
        edgecolor=color,
        hatch=None if cell.trains else "////",
      )
      note = f"{accuracy:.0f}" if cell.test_accuracy is not None else "diverges"
      axes.text(
        center,
        accuracy + 1.5,
        note,
        ha="center",
        va="bottom",
        fontsize=8,
        rotation=0 if cell.test_accuracy is not None else 90,
        color="black" if cell.test_accuracy is not None else color,
      )
    axes.bar(0, 0, color=color, label=methods.get(name).title)
  axes.bar(0, 0, color="none", edgecolor="gray", hatch="////", label="does not train")
  depths = {cell.network: cell.depth for cell in cells}
  labels = [f"{network}\ndepth {depths[network]}" for network in networks]
  axes.set_xticks(range(len(networks)), labels)
  axes.set_ylim(0, 105)
  axes.set_ylabel("test accuracy (%)")
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(
    ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=9
  )
  figure.savefig(path, dpi=150)
