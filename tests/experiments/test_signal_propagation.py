"""The program of signal propagation from its flags to its files."""

import json

import pytest

from experiments import signal_propagation
from experiments.signal_propagation import SignalConfig
from skipinit_jax.errors import UsageError

PROGRAM = "experiments.signal_propagation"


def test_program_writes_figures_numbers_and_verdicts(run_program, tmp_path):
  done = run_program(
    [
      PROGRAM,
      f"--workdir={tmp_path}",
      "--diagnose",
      "--config=linear",
      "--config.methods=('unnormalized', 'skipinit')",
      "--config.depth=40",
      "--config.width=16",
      "--config.batch_size=8",
      "--config.num_seeds=2",
    ],
    status=0,
  )
  assert "Unnormalized: The signal explodes forward from block" in done.stdout
  assert "SkipInit, α = 0: The signal passes all 40 blocks" in done.stdout
  page = (tmp_path / "report.html").read_text()
  assert "Does the depth let the network train?" in page
  for name in ("stream", "branch", "ratio", "gradient", "cosine", "paths"):
    assert (tmp_path / f"{name}.png").stat().st_size > 0
  for name in ("summary", "blocks", "verdict"):
    assert (tmp_path / f"{name}.md").stat().st_size > 0
  results = json.loads((tmp_path / "signal.json").read_text())
  assert results["config"]["depth"] == 40
  network = results["networks"]["unnormalized"]
  assert len(network["blocks"]) == 40
  for part in ("mean", "standard_error", "theory"):
    assert len(network[part]["second_moment"]) == 41
    assert len(network[part]["branch_to_skip"]) == 40
  growth = network["theory"]["second_moment"]
  assert growth[-1] / growth[0] == pytest.approx(2**40)
  assert sum(network["path_weights"]["mean"]) == pytest.approx(1)
  assert not network["diagnosis"]["healthy"]


def test_bad_input_is_one_sentence(run_program, tmp_path):
  workdir = tmp_path / "signal"
  flags = [f"--workdir={workdir}", "--config.methods=('skipint',)"]
  done = run_program([PROGRAM, *flags], status=1)
  assert "did you mean 'skipinit'" in done.stderr
  assert "Traceback" not in done.stderr
  assert not workdir.exists()


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"model": "wide_restnet"}, "did you mean 'wide_resnet'"),
    ({"dataset": "digit"}, "did you mean 'digits'"),
    ({"methods": ()}, "methods is empty"),
    ({"methods": ("skipinit", "skipinit")}, "names one twice"),
    ({"batch_size": 1}, "batch_size is 1"),
    ({"seed": -1}, "seed is -1"),
  ],
)
def test_fields(fields, words):
  with pytest.raises(UsageError, match=words):
    SignalConfig(**fields).validate()


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"model": "wide_resnet", "depth": 17}, "layers, such as 16 or 22"),
    ({"model": "linear_mlp", "depth": 0}, "depth is 0"),
    ({"num_seeds": 1}, "num_seeds is 1"),
    ({"batch_size": 2000}, "digits has only 1472"),
    ({"batch_size": 2, "methods": ("batch_norm",)}, "fewer than 4"),
  ],
)
def test_sizes(fields, words):
  with pytest.raises(UsageError, match=words):
    signal_propagation.measure_networks(SignalConfig(**fields))
