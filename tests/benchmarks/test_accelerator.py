"""What is measured on a GPU: every part is bounded, and its commands are right."""

import dataclasses
import json

import pytest

from benchmarks import accelerator, side_by_side
from benchmarks.accelerator import Part
from benchmarks.peer import Case
from skipinit_jax.files import read_json
from tests.forks import ROOT


def test_parts_are_bounded_and_fail_alone(tmp_path):
  path, left = tmp_path / "results.json", tmp_path / "left"
  child = f"import time; time.sleep(3); open({str(left)!r}, 'w')"
  spawn = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
  parts = [
    Part("json", 60, ["-c", "print('{\"a\": 1}')"]),
    Part("fails", 60, ["-c", "import sys; print('said'); sys.exit('why')"]),
    Part("spawns", 0.5, ["-c", spawn]),
    Part("late", 60, ["-c", ""]),
    Part("last", 57, ["-c", ""]),
  ]
  assert not accelerator.run_parts(parts, path, seconds=57)
  # The last part has kept all the time of those before it.
  assert [each["outcome"][:9] for each in read_json(path)["parts"]] == [
    *["not begun"] * 4,
    "done",
  ]
  accelerator.run_parts(parts[:3], path, seconds=60)
  first, second, third = read_json(path)["parts"]
  assert first["outcome"] == "done" and first["result"] == {"a": 1}
  assert second["outcome"] == "failed with status 1"
  assert "said" in second["output"] and "why" in second["output"]
  assert third["outcome"].startswith("stopped") and third["seconds"] < 3
  assert not left.exists()


@pytest.mark.parametrize("smoke", [False, True])
def test_the_plan_s_programs_take_their_flags(run_program, tmp_path, smoke):
  programs = {}
  for part in accelerator.plan(tmp_path, "idx", smoke=smoke):
    files = [each for each in part.command if each.startswith("tests/")]
    assert all((ROOT / each).exists() for each in files)
    if part.command[0] == "-m" and part.command[1] != "pytest":
      programs[part.command[1]] = part.command[1:]
  assert len(programs) == 5
  for words in programs.values():
    run_program(["tests.docs.smoke", str(tmp_path), *words], status=0)


def test_a_peer_alone(monkeypatch):
  monkeypatch.setattr(side_by_side, "_ROUND_SECONDS", 0.1)
  # The tests' machine has eight devices.
  case = Case(10, 1, image_size=8, batch_size=8, method="skipinit", dtype="bfloat16")
  what = json.dumps([side_by_side.SKIPINIT_JAX.name, dataclasses.asdict(case)])
  (row,) = accelerator.alone(what)["tables"]["accelerator"]
  step = row["seconds a step"]
  assert 0 < step["min"] <= step["median"] <= step["max"]
  flops = row["TFLOP/s"] * 1e12 * step["median"]
  assert flops == pytest.approx(case.step_flops, rel=0.02)
  assert row["images/s"] * step["median"] == pytest.approx(8, rel=0.02)
  # Compiling takes longer than a step, and JAX alone more than 50 megabytes.
  assert row["seconds to first step"] > step["median"]
  assert row["peak GB"] > 0.05
