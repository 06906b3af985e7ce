"""The program of signal propagation from its flags to its files."""

import pytest

from experiments import initial_signals
from experiments.initial_signals import SignalConfig
from skipinit_jax.errors import UsageError
from skipinit_jax.files import read_json


def test_program_writes_figures_numbers_and_verdicts(run_program, tmp_path):
  done = run_program(
    [
      "experiments.signal_propagation",
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
  written = {path.name for path in tmp_path.iterdir()}
  assert {"report.html", "summary.md", "verdict.md", "stream.png"} <= written
  results = read_json(tmp_path / "signal.json")
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


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"model": "wide_restnet"}, "did you mean 'wide_resnet'"),
    ({"model": "wide_resnet", "depth": 17}, "layers, such as 16 or 22"),
    ({"methods": ()}, "methods is empty"),
    ({"batch_size": 2000}, "digits has only 1472"),
    ({"batch_size": 1}, "batch_size is 1: a variance"),
    ({"width": 2**31 - 1}, "use a smaller depth or width"),
    ({"seed": -1}, "seed is -1"),
    ({"depth": 2.5}, "depth is 2.5: it must be a whole"),
    ({"version": 1}, "version is 1: it is for model resnet"),
    ({"data_dir": "x", "dataset": "noise"}, "data_dir is x: it is for dataset"),
  ],
)
def test_bad_input(fields, words):
  with pytest.raises(UsageError, match=words):
    initial_signals.measure_networks(SignalConfig(**fields))
