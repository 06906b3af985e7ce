"""The check of diagnoses, from its flags to its numbers."""

import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_cell_is_diagnosed_and_trained(run_program, tmp_path):
  done = run_program(
    [
      "experiments.diagnosis_check",
      f"--workdir={tmp_path}",
      "--config.max_depth=4",
      "--workers=1",
    ],
    status=0,
  )
  assert "MLP 4-32, 2-layer branches, divide by 2" in done.stdout + done.stderr
  (cell,) = json.loads((tmp_path / "diagnosis.json").read_text())["cells"]
  assert len(cell["accuracies"]) == 3
  assert cell["trains"] == (max(cell["accuracies"]) >= 0.5)
  committed = json.loads((ROOT / "results/diagnosis/diagnosis.json").read_text())
  key = ("part", "method", "depth", "width")
  (same,) = (
    each
    for each in committed["cells"]
    if [each[name] for name in key] == [cell[name] for name in key]
  )
  assert cell["verdict"] == same["verdict"]
  assert cell["forward_growth"] == pytest.approx(same["forward_growth"], rel=1e-3)
