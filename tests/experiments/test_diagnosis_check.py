"""The check of diagnoses, from its flags to its numbers."""

import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_cell_is_diagnosed_trained_and_not_trained_again(run_program, tmp_path):
  arguments = [
    "experiments.diagnosis_check",
    f"--workdir={tmp_path}",
    "--part=tuned",
    "--family=MLP",
    "--max_depth=6",
  ]
  done = run_program(arguments, status=0)
  assert "Verdict and training, tuned" in done.stdout
  (cell,) = json.loads((tmp_path / "diagnosis.json").read_text())["cells"]
  assert cell["trains"] == cell["healthy"] == {"SGD": True, "Adam": True}
  committed = json.loads((ROOT / "results/diagnosis/diagnosis.json").read_text())
  key = ("part", "family", "variant", "depth")
  (same,) = (
    each
    for each in committed["cells"]
    if [each[name] for name in key] == [cell[name] for name in key]
  )
  assert cell["verdict"] == same["verdict"]
  assert cell["forward_growth"] == pytest.approx(same["forward_growth"], rel=1e-3)
  # What is there is only judged.
  (tmp_path / "diagnosis.json").unlink()
  run_program(arguments, status=0)
  (again,) = json.loads((tmp_path / "diagnosis.json").read_text())["cells"]
  assert again == cell
  assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 1
