import dataclasses
import re
from pathlib import Path

import pytest

from experiments.depth_study import CONFIGS
from skipinit_jax import methods
from skipinit_jax.training import TrainConfig

ROOT = Path(__file__).resolve().parent.parent.parent


PROGRAMS = [
  f"experiments.{path.stem}"
  for path in sorted(ROOT.glob("experiments/*.py"))
  if "program.run(main)" in path.read_text("utf-8")
]


def test_help_of_a_run(run_program):
  text = run_program(["experiments.train", "--help"]).stdout
  assert text.startswith("Trains and evaluates one network.\n\nExample:\n")
  words = " ".join(text.split())
  assert "--workdir=... (required) Directory, or gs://BUCKET/FOLDER, of check" in words
  # Each field in its group, with default and meaning.
  groups = re.split(r"^(\w+):$", text, flags=re.MULTILINE)
  groups = dict(zip(groups[1::2], groups[2::2], strict=True))
  for field in dataclasses.fields(TrainConfig):
    row = f"\n  --config.{field.name}="
    (group,) = [name for name, rows in groups.items() if row in rows]
    assert f"--config.{field.name}={field.default} " in " ".join(groups[group].split())
  assert "--config.dataset" in groups["Data"]
  assert "--config.depth" in groups["Network"]
  assert "--config.epochs=10 passes over the training set." in words
  assert "--config.l2" in groups["Optimization"]
  assert "--config.seed" in groups["Run"]
  assert all(name in words for name in methods.NAMES)


def test_help_of_a_study_shows_the_values_of_its_configuration(run_program):
  done = run_program(["experiments.depth_study", "--config=digits", "--help"])
  words = " ".join(done.stdout.split())
  assert "--config=digits The default values of all that follows: demo, digits" in words
  assert "--config.wide_resnet_depths=(16, 100, 1000) layers of the conv" in words
  assert "learning_rates rates to begin with; powers of two" in words
  changed = CONFIGS["digits"]().wide_resnet
  assert changed.epochs != TrainConfig().epochs
  assert re.search(rf"Set here: [^.]*\bepochs={changed.epochs}\b", words)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_of_every_program_has_an_example_and_fits_the_terminal(
  program, run_program, monkeypatch
):
  monkeypatch.setenv("COLUMNS", "80")
  text = run_program([program, "--help"]).stdout
  assert f"python -m {program} --" in text
  assert re.search(r"^  --\w+=", text, flags=re.MULTILINE)
  assert max(map(len, text.splitlines())) <= 88


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (
      ["--config.bach_size=3"],
      "error: Unknown flag '--config.bach_size' (did you mean '--config.batch_size'?)",
    ),
    (["--noconfig.flipped"], "error: Unknown flag '--config.flipped' (did you mean"),
    (["--workdri=x"], "error: Unknown flag '--workdri' (did you mean '--workdir'?)"),
    (["run"], "error: Unexpected argument 'run': every option is a flag."),
    (
      ["--config=mnist"],
      "error: flag --config=mnist: Unknown configuration 'mnist': "
      "choose one of cifar10, cifar100, digits, fashion_mnist, imagenet2012.",
    ),
    (
      ["--config.epochs=ten"],
      "error: flag --config.epochs=ten: invalid literal",
    ),
  ],
)
def test_flags_that_do_not_exist(flags, message, run_program, tmp_path):
  workdir = tmp_path / "run"
  done = run_program(["experiments.train", f"--workdir={workdir}", *flags], status=1)
  assert done.stdout == ""
  assert done.stderr.startswith(message)
  assert done.stderr.count("\n") == 1
  assert not workdir.exists()


def test_workdir_is_required(run_program):
  done = run_program(["experiments.train"], status=1)
  message = "error: The flag --workdir is missing: it is required. --help shows "
  assert done.stderr == f"{message}all flags.\n"
