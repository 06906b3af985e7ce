"""The check of diagnoses, from its flags to its numbers."""

import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_cell_is_trained_diagnosed_and_not_trained_again(run_program, tmp_path):
  arguments = [
    "experiments.diagnosis_check",
    f"--workdir={tmp_path}",
    "--workers=1",
    "--config.parts=('tuned',)",
    "--config.families=('MLP',)",
    "--config.max_depth=6",
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
  done = run_program(arguments, status=0)
  assert done.stderr.startswith("6 trials are done already")
  (again,) = json.loads((tmp_path / "diagnosis.json").read_text())["cells"]
  assert again == cell


def test_bad_input_is_one_sentence(run_program, tmp_path):
  arguments = ["experiments.diagnosis_check", f"--workdir={tmp_path}"]
  for flag, words in (
    ("parts=('tune',)", "part 'tune'"),
    ("families=('GAN',)", "family 'GAN'"),
    ("max_depth=1", "has no runs"),
    ("train.model=resnet", "use families"),
    ("train.dataset=fashion_mnist", "use digits"),
  ):
    done = run_program([*arguments, f"--config.{flag}"], status=1)
    assert words in done.stderr and "Traceback" not in done.stderr
