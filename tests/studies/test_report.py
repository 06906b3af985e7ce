"""Tables and the figure of a depth study."""

import csv
import dataclasses
import json

import matplotlib.image
import pytest

from skipinit_jax.studies import Cell, DepthStudy, report

TRAINS = Cell("MLP 9-8", 9, "skipinit", 0.9261, 0.0123, 2**-5, 6, 1, True)
AT_CHANCE = Cell("MLP 9-8", 9, "divide_by_sqrt2", 0.108, None, 2**-9, 2, 0, False)
DIVERGES = Cell("MLP 99-8", 99, "skipinit", None, None, None, 2, 2, False)
CELLS = [TRAINS, AT_CHANCE, DIVERGES]


def study(cells):
  return DepthStudy(cells, {"num_seeds": 2}, {"jax": "0"}, "1 x cpu")


def test_table_says_what_trains_and_what_does_not():
  header, rows = report.table(CELLS)
  assert header == ["network", "SkipInit, α = 0", "Divide by √2"]
  assert rows == [
    ["MLP 9-8", "92.6±1.2, 2^-5", "does not train (10.8, 2^-9)"],
    ["MLP 99-8", "does not train (diverges)", ""],
  ]


def test_files_hold_the_cells(tmp_path):
  paths = report.write(study(CELLS), tmp_path)
  assert [path.name for path in paths] == [
    "results.json",
    "results.csv",
    "results.md",
    "results.png",
  ]
  as_json = json.loads(paths[0].read_text())
  assert [Cell(**cell) for cell in as_json.pop("cells")] == CELLS
  assert as_json == {
    "config": {"num_seeds": 2},
    "versions": {"jax": "0"},
    "device": "1 x cpu",
  }
  with paths[1].open(newline="") as file:
    rows = list(csv.DictReader(file))
  assert [set(row) for row in rows] == [set(dataclasses.asdict(TRAINS))] * 3
  assert float(rows[0]["test_accuracy"]) == TRAINS.test_accuracy
  assert rows[2]["test_accuracy"] == ""
  lines = paths[2].read_text().splitlines()
  assert {line.count("|") for line in lines} == {4}
  assert "does not train (diverges)" in lines[3]


def test_figure_distinguishes_what_does_not_train(tmp_path):
  def draw(cells):
    report.draw(cells, tmp_path / "figure.png")
    return matplotlib.image.imread(tmp_path / "figure.png")

  image = draw([TRAINS])
  assert image.ndim == 3
  assert (image != draw([dataclasses.replace(TRAINS, trains=False)])).any()


def test_terminal_shows_the_table(capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "120")
  report.print_table(CELLS)
  printed = capsys.readouterr().out
  assert "92.6±1.2, 2^-5" in printed
  assert "does not train" in printed


@pytest.mark.parametrize("cell", CELLS)
def test_one_cell_is_enough(cell, tmp_path):
  assert len(report.write(study([cell]), tmp_path)) == 4
