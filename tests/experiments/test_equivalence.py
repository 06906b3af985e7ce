"""The program of equivalences from its flags to its files."""

import json

import numpy as np
import pytest

from experiments.configs.equivalence import EquivalenceConfig
from skipinit_jax.errors import UsageError

PROGRAM = "experiments.equivalence"
SMALL = ["--config.depth=2", "--config.width=8", "--config.batch_size=16"]


def test_reparameterization(run_program, tmp_path):
  done = run_program(
    [
      PROGRAM,
      f"--workdir={tmp_path}",
      *SMALL,
      "--config.steps=24",
      "--config.constants=(8, 3)",
    ],
    status=0,
  )
  assert "[holds] Powers of two, which are exact in binary, change not one bit." in (
    done.stdout
  )
  assert "[holds] Other constants change nothing but rounding." in done.stdout
  assert "[holds] The rate has to be c²η: with cη the trajectory is another." in (
    done.stdout
  )
  for name in ("trajectories", "losses", "rates"):
    assert (tmp_path / f"{name}.png").stat().st_size > 0
  assert "| c = 8 | 0 | 0 " in (tmp_path / "distance.md").read_text()
  assert "Powers of two" in (tmp_path / "report.html").read_text()
  numbers = json.loads((tmp_path / "equivalence.json").read_text())
  assert numbers["config"]["constants"] == [8, 3]
  runs = numbers["trajectories"]["float64, rate 0.0625"]
  assert len(numbers["steps"]) == len(runs["c = 8"]["loss"]) == 24
  assert runs["c = 8"]["loss"] == runs["c = 1"]["loss"]
  assert 0 < max(runs["c = 3"]["distance"]) < 1e-12
  assert max(runs["c = 3, rate cη"]["distance"]) > 1e-3
  final = numbers["final_loss"]
  assert final["c = 8"]["loss"] == final["c = 1"]["loss"]
  rates = zip(
    final["c = 8"]["learning_rate"], final["c = 1"]["learning_rate"], strict=True
  )
  assert {own / original for own, original in rates} == {64.0}


def test_weight_decay(run_program, tmp_path):
  done = run_program(
    [
      PROGRAM,
      f"--workdir={tmp_path}",
      "--config=weight_decay",
      *SMALL,
      "--config.steps=40",
    ],
    status=0,
  )
  holding = [line for line in done.stdout.splitlines() if line.startswith("[holds] ")]
  for words in ("are the same function at every step.", "begin with a velocity."):
    assert any(line.endswith(words) for line in holding)
  assert "[holds] Batch norm's default epsilon ends the equivalence." in holding
  # What only a longer run would show.
  assert "[cannot tell]" in done.stdout
  report = (tmp_path / "report.html").read_text()
  assert "The loss is finite in all 40 steps." in report
  for name in ("functions", "runs"):
    assert (tmp_path / f"{name}.png").stat().st_size > 0
  assert (tmp_path / "difference.md").stat().st_size > 0
  numbers = json.loads((tmp_path / "equivalence.json").read_text())
  runs = numbers["runs"]["float64"]
  assert max(runs["growth"]["difference"]) < 1e-10
  assert max(runs["growth"]["difference_in_evaluation"]) > 1e-3
  assert max(numbers["runs"]["float32"]["growth"]["difference"][:10]) < 1e-3
  # The same function, from parameters of which one is a growing multiple.
  scale = numbers["rho"] ** np.array(numbers["steps"])
  np.testing.assert_allclose(
    scale * runs["growth"]["norm"], runs["decay"]["norm"], rtol=1e-5
  )
  growth = np.array(numbers["growing_rate"])
  np.testing.assert_allclose(growth * scale**2, growth[0], rtol=1e-5)


def test_bad_input_is_one_sentence(run_program, tmp_path):
  workdir = tmp_path / "equivalence"
  for flags, words in (
    (["--config=weight_decay", "--config.l2=0.1"], "l2 is 0.1: with learning_rate"),
    (["--config.batch_size=2000"], "not between 1 and 1472"),
    (
      [*SMALL, "--config.steps=8", "--config.learning_rate=1e6"],
      "the original run diverges in step",
    ),
  ):
    done = run_program([PROGRAM, f"--workdir={workdir}", *flags], status=1)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
  assert not workdir.exists()


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"experiment": "weight_decy"}, "did you mean 'weight_decay'"),
    ({"model": "resnet"}, "choose one of residual_mlp, wide_resnet"),
    ({"steps": 1}, "steps is 1"),
    ({"learning_rate": 0.0}, "learning_rate is 0"),
    ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ({"momentum": 1.0}, "momentum is 1"),
    ({"l2": -1.0}, "l2 is -1"),
    ({"seed": -1}, "seed is -1"),
    ({"constants": ()}, "constants is empty"),
    ({"constants": (3.0, 1.0)}, "constants has 1"),
    ({"constants": (0.0,)}, "constants has 0"),
    ({"constants": ("3",)}, "constants has '3'"),
    ({"constants": (3.0, 3.0)}, "constants has one twice"),
    ({"experiment": "weight_decay", "l2": 0.0}, "l2 is 0"),
    ({"experiment": "weight_decay", "momentum": 0.0}, "momentum is 0"),
    ({"experiment": "weight_decay", "batch_size": 2}, "batch_size is 2"),
    ({"experiment": "weight_decay", "l2": 0.1}, "only below 0.0421"),
  ],
)
def test_fields(fields, words):
  with pytest.raises(UsageError, match=words):
    EquivalenceConfig(**fields).validate()
