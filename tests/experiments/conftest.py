"""What tests of programs share."""

import pytest


@pytest.fixture(scope="session")
def trained_run(run_program, tmp_path_factory):
  """The workdir of a finished run; no test changes it."""
  workdir = tmp_path_factory.mktemp("trained") / "a run"
  fields = {
    # Running statistics and dropout.
    "model": "residual_mlp",
    "depth": 2,
    "width": 8,
    "method": "batch_norm",
    "dropout_rate": 0.1,
    "epochs": 1,
    "batch_size": 368,
    "signal_every_steps": 1,
    "profile_steps": 2,
  }
  flags = [f"--config.{name}={value}" for name, value in fields.items()]
  run_program(["experiments.train", f"--workdir={workdir}", *flags], status=0)
  return workdir
