"""What a run has trained, for use outside of training."""

import os
from typing import Any, NamedTuple

import optax
from flax import linen as nn

from skipinit_jax.errors import UsageError
from skipinit_jax.files import (
  CONFIG,
  RESULT,
  Path,
  as_type,
  reading_record,
  workdir_path,
)
from skipinit_jax.training.checkpoints import read_latest
from skipinit_jax.training.config import TrainConfig


class Trained(NamedTuple):
  """A network as its run's newest checkpoint has it.

  Attributes:
    model: the network.
    variables: its parameters and statistics, as NumPy arrays.
    step: the number of training steps taken.
    config: the run's configuration.
  """

  model: nn.Module
  variables: dict[str, Any]
  step: int
  config: TrainConfig


def load_trained(workdir: str | os.PathLike[str], *, averaged: bool = False) -> Trained:
  """Reads the network of a run, on any devices, also while the run goes on.

  Example::

    trained = load_trained("runs/one")
    logits = trained.model.apply(trained.variables, images, train=False)

  Args:
    workdir: the run's directory or folder of a bucket. Nothing in it changes.
    averaged: whether to take the moving average of the parameters in place of them.

  Returns:
    The network. Its images are normalized as in the run, by
    `data.augmentation.normalize` with the data set's mean and deviation.

  Raises:
    UsageError: the directory holds no checkpoint, or none that is intact, its
      configuration is of another version, or the run keeps no average.
  """
  parts = ("model_state", "opt_state" if averaged else "params")
  step, state = read_latest(workdir, parts)
  if averaged:
    params = optax.tree.get(state["opt_state"], "averaged_params")
  else:
    params = state["params"]
  if params is None:
    raise UsageError(
      f"The run in {workdir} keeps no average of its parameters: its ema_decay is None."
    )
  variables = {"params": params, **state["model_state"]}
  config = _read_config(workdir_path(workdir))
  # One logit a class: the data set itself need not be here, but for a user's network.
  classifier = params.get("head", {}).get("classifier", {})
  if "bias" in classifier:
    num_classes = classifier["bias"].size
  else:
    num_classes = config.load_dataset().num_classes
  return Trained(config.make_model(num_classes), variables, step, config)


def _read_config(workdir: Path) -> TrainConfig:
  # Only the result says where the data lies. A run that was killed has none.
  result, config = workdir / RESULT, workdir / CONFIG
  path = result if result.exists() else config
  with reading_record(path) as fields:
    fields = as_type(dict[str, Any], fields)
    made: TrainConfig = as_type(TrainConfig, fields.get("config", fields))
  return made
