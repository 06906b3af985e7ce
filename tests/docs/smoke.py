"""Runs a program of this repository up to where it would begin to compute.

`python -m tests.docs.smoke FOLDER MODULE FLAGS...` runs in a folder, parses the flags,
and makes and checks the configuration as the program itself does. It leaves out
training, trials of a study, measurements and other machines.
"""

import contextlib
import os
import runpy
import sys
import types
from typing import Any

from absl import app

from experiments import program
from skipinit_jax import studies, training
from skipinit_jax.errors import UsageError
from skipinit_jax.studies.study import Study, check
from skipinit_jax.training import TrainConfig, distributed

_TRAIN = ("experiments.train", "experiments.imagenet")
_STUDY = "experiments.study_program"
_run, app_run = program.run, app.run


def _train(config: TrainConfig, workdir: str, **_: Any) -> None:
  config.validate()
  config.make_model(num_classes=10)
  sys.exit(0)


def _run_study(study: Study, workdir: str, **_: Any) -> None:
  # Named configurations as they are have a test of their own, and the check takes long.
  if any(argument.startswith("--config.") for argument in sys.argv):
    check(study)
  sys.exit(0)


def _run_program(main: Any) -> None:
  trains = module in _TRAIN or main.__module__ == _STUDY
  _run(main if trains else lambda: 0)


def _load_dataset(config: TrainConfig) -> Any:
  # The batch-size study counts examples. Most machines have not prepared the data.
  with contextlib.suppress(UsageError):
    return load_dataset(config)
  train = types.SimpleNamespace(num_examples=16384)
  return types.SimpleNamespace(train=train, image_shape=(28, 28, 1))


load_dataset = TrainConfig.load_dataset
TrainConfig.load_dataset = _load_dataset
_, folder, module, *arguments = sys.argv
training.train = _train
studies.run = studies.run_sequentially = _run_study
distributed.initialize = lambda *_: None
program.run = _run_program
if module.startswith("benchmarks."):
  # They are run by absl itself.
  app.run = lambda _: app_run(lambda _: 0)
sys.argv[1:] = arguments
os.chdir(folder)
runpy.run_module(module, run_name="__main__", alter_sys=True)
