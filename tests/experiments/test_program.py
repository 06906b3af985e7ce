"""The flags of programs: their help, and one sentence for each that is wrong."""

import dataclasses
import re

import pytest
from absl import flags
from ml_collections import config_flags

from experiments.depth_study import CONFIGS
from skipinit_jax import methods
from skipinit_jax.training import TrainConfig


def test_help_shows_every_field_with_its_value(run_program):
  words = " ".join(run_program(["experiments.train", "--help"]).stdout.split())
  for field in dataclasses.fields(TrainConfig):
    assert f"--config.{field.name}={field.default} " in words
  assert all(name in words for name in methods.NAMES)
  done = run_program(["experiments.depth_study", "--config=digits", "--help"])
  words = " ".join(done.stdout.split())
  changed = CONFIGS["digits"]().wide_resnet
  assert changed.epochs != TrainConfig().epochs
  assert re.search(rf"Set here: [^.]*\bepochs={changed.epochs}\b", words)


@pytest.mark.parametrize(
  ("command", "message"),
  [
    ("train --workdir=NEW --config.bach_size=3", "'--config.bach_size' (did you mean"),
    ("train --workdir=NEW --noconfig.flipped", "'--config.flipped' (did you mean"),
    ("train --workdir=NEW run=secret", "Unexpected argument 'run': every"),
    ("train --workdir=NEW --config=mnist", "Unknown configuration 'mnist'"),
    ("train --workdir=NEW --config.epochs=ten", "epochs=ten: invalid literal"),
    ("train --workdir=NEW --config.method=batchnorm", "(did you mean 'batch_norm'?)"),
    ("train --workdir=", "flag --workdir=: it is empty"),
    ("train", "The flag --workdir is missing"),
    ("train --workdir=/dev/null/run", "The workdir /dev/null/run "),
    ("train --workdir=NEW --config.dataset=cifar10", "is not prepared in "),
    ("report --workdir=NEW", "There is neither a study nor a run in NEW"),
    ("export --workdir=. --output=NEW", "There is no checkpoint in "),
    ("export --workdir=RUN --output=FILE", "The export cannot be written to FILE "),
    ("prepare_data --dataset=cifar10", "--source is missing: the archive of the bin"),
    (
      "prepare_data --dataset=imagenet2012 --source=/none",
      "Source /none needs the folders train and v",
    ),
  ],
)
def test_what_is_wrong_is_one_sentence(
  command, message, run_program, trained_run, tmp_path
):
  new, file = tmp_path / "new", tmp_path / "file"
  file.write_text("kept")

  def located(text):
    for name, path in (("NEW", new), ("FILE", file), ("RUN", trained_run)):
      text = text.replace(name, str(path))
    return text

  name, *flags = map(located, command.split())
  environment = {"TFDS_DATA_DIR": str(new)}
  done = run_program([f"experiments.{name}", *flags], env=environment, status=1)
  assert done.stdout == ""
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
  assert located(message) in done.stderr
  assert not new.exists() and file.read_text() == "kept"


@pytest.mark.parametrize(
  ("text", "value"),
  [("2^-4", 2**-4), ("2⁻⁴", 2**-4), ("1.5^2", 2.25), ("10^-3", 1e-3), ("1e-3", 1e-3)],
)
def test_numbers_are_read_as_tables_print_them(text, value):
  values = flags.FlagValues()
  argv = ["program", f"--config.wide_resnet.learning_rate={text}"]
  argv += [f"--config.wide_resnet.clip_norm={text}", "--config.methods=('a2^3',)"]
  argv += [f"--config.wide_resnet_search.learning_rates=({text}, 3, 2^-1)"]
  argv += ["--config.wide_resnet_depths=(2^4, 10)"]
  config = config_flags.DEFINE_config_dataclass(
    "config", CONFIGS["demo"](), flag_values=values, sys_argv=argv
  )
  values(argv)
  network = config.value.wide_resnet
  assert network.learning_rate == network.clip_norm == value
  assert config.value.wide_resnet_search.learning_rates == (value, 3, 0.5)
  assert config.value.wide_resnet_depths == (16, 10)
  assert config.value.methods == ("a2^3",)


@pytest.mark.parametrize("text", ["2^", "2^-4^2", "2^99999", "2^x"])
def test_no_number(text):
  argv = ["program", f"--config.learning_rate={text}"]
  values = flags.FlagValues()
  with pytest.raises(flags.IllegalFlagValueError, match="could not convert string"):
    config_flags.DEFINE_config_dataclass(
      "config", TrainConfig(), flag_values=values, sys_argv=argv
    )
    values(argv)
