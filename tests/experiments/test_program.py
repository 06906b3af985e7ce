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
  ("flags", "message"),
  [
    (["--workdir=x", "--config.bach_size=3"], "'--config.bach_size' (did you mean"),
    (["--workdir=x", "--noconfig.flipped"], "'--config.flipped' (did you mean"),
    (["--workdir=x", "run=secret"], "Unexpected argument 'run': every"),
    (["--workdir=x", "--config=mnist"], "Unknown configuration 'mnist'"),
    (["--workdir=x", "--config.epochs=ten"], "--config.epochs=ten: invalid literal"),
    (["--workdir=x", "--config.method=batchnorm"], "(did you mean 'batch_norm'?)"),
    (["--workdir=x", "--config.depth=17"], "depth is 17"),
    (["--workdir=x", "--config.version=1"], "version is 1: it is for model resnet"),
    (["--workdir="], "flag --workdir=: it is empty"),
    ([], "The flag --workdir is missing"),
    (["--workdir=/dev/null/run"], "The workdir /dev/null/run "),
  ],
  ids=lambda value: None if isinstance(value, str) else " ".join(value) or "nothing",
)
def test_what_is_wrong_is_one_sentence(flags, message, run_program, tmp_path):
  workdir = tmp_path / "run"
  flags = [flag.replace("--workdir=x", f"--workdir={workdir}") for flag in flags]
  assert_one_sentence(run_program(["experiments.train", *flags], status=1), message)
  assert not workdir.exists()


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


def test_damaged_data_cache(run_program, tmp_path):
  cache = tmp_path / "skipinit_jax" / "data" / "digits.npz"
  cache.parent.mkdir(parents=True)
  cache.write_bytes(b"not an archive")
  command = ["experiments.train", f"--workdir={tmp_path / 'run'}"]
  done = run_program(command, env={"XDG_CACHE_HOME": str(tmp_path)}, status=1)
  assert_one_sentence(done, f"The data cache {cache} is damaged: delete it")
  assert not (tmp_path / "run").exists()


def assert_one_sentence(done, message):
  assert done.stdout == ""
  assert done.stderr.startswith("error: ") and message in done.stderr
  assert done.stderr.count("\n") == 1
