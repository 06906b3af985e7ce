import dataclasses
import itertools
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
  if "\n  program.run(" in path.read_text("utf-8")
]


def test_help_of_a_run(run_program):
  text = run_program(["experiments.train", "--help"]).stdout
  words = " ".join(text.split())
  assert text.startswith("Trains and evaluates one network.\n\nExample:\n")
  assert "--workdir=... (required) Directory, or gs://BUCKET/FOLDER, of check" in words
  for field in dataclasses.fields(TrainConfig):
    assert f"--config.{field.name}={field.default} " in words
  # Each field stands in its group, with its meaning.
  titles = [words.index(f" {each}: ") for each in ("Data", "Network", "Optimization")]
  places = [words.index(f"--config.{each}=") for each in ("dataset", "width", "l2")]
  pairs = list(zip(titles, places, strict=True))
  assert [*itertools.chain(*pairs)] == sorted(titles + places)
  assert "--config.epochs=10 passes over the training set." in words
  assert all(name in words for name in methods.NAMES)


def test_help_of_a_study_shows_the_values_of_its_configuration(run_program):
  done = run_program(["experiments.depth_study", "--config=digits", "--help"])
  words = " ".join(done.stdout.split())
  assert "--config=digits The default values of all that follows: demo, digits" in words
  assert "--config.wide_resnet_depths=(16, 100, 1000) layers of the conv" in words
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
    (["--config=mnist"], "error: flag --config=mnist: Unknown configuration 'mnist': "),
    (["--config.epochs=ten"], "error: flag --config.epochs=ten: invalid literal"),
    (["--workdir="], "error: flag --workdir=: it is empty: name a directory."),
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
  assert done.stderr.startswith("error: The flag --workdir is missing: it is required.")
