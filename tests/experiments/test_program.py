import dataclasses
import inspect

import pytest

from skipinit_jax.training import TrainConfig


def test_help_describes_every_field(run_program):
  # absl exits with 1 after its help.
  done = run_program(["experiments.train", "--help"], status=1)
  text = " ".join(done.stdout.split())
  assert text.startswith("Trains and evaluates one network.")
  assert "Directory, or gs://BUCKET/FOLDER, of checkpoints, metrics.jsonl" in text
  names = "digits, fashion_mnist, cifar10, cifar100, imagenet2012"
  assert f"Default values: {names} (default: d" in text
  for field in dataclasses.fields(TrainConfig):
    assert f" {field.name}: " in text
    assert f"  {field.name}: " in inspect.getdoc(TrainConfig)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (
      ["--config.bach_size=3"],
      "error: Unknown flag '--config.bach_size' (did you mean '--config.batch_size'?)",
    ),
    (["--noconfig.flipped"], "error: Unknown flag '--config.flipped' (did you mean"),
    (["run"], "error: Unexpected argument 'run': every option is a flag."),
    (
      ["--config=mnist"],
      "FATAL Flags parsing error: flag --config=mnist: Unknown configuration 'mnist': "
      "choose one of cifar10, cifar100, digits, fashion_mnist, imagenet2012.",
    ),
    (
      ["--config.epochs=ten"],
      "FATAL Flags parsing error: flag --config.epochs=ten: invalid literal",
    ),
  ],
)
def test_flags_that_do_not_exist(flags, message, run_program, tmp_path):
  workdir = tmp_path / "run"
  done = run_program(["experiments.train", f"--workdir={workdir}", *flags], status=1)
  assert done.stdout == ""
  assert done.stderr.startswith(message)
  # absl adds a line that points at the help.
  hint = "Pass --helpshort or --helpfull to see help on flags.\n"
  assert done.stderr.removesuffix(hint).count("\n") == 1
  assert not workdir.exists()


def test_workdir_is_required(run_program):
  done = run_program(["experiments.train"], status=1)
  assert done.stderr.startswith("FATAL Flags parsing error: flag --workdir=None")
  assert "Traceback" not in done.stderr
