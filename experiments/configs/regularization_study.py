"""Typed default configurations of regularization studies."""

import dataclasses
from collections.abc import Callable

from experiments.configs import train
from skipinit_jax.studies import RegularizationStudyConfig, SearchConfig
from skipinit_jax.training import TrainConfig


def digits() -> RegularizationStudyConfig:
  """A small network on `digits`, for two cores."""
  return RegularizationStudyConfig(
    train=TrainConfig(width=1, batch_size=32, epochs=8, constant_epochs=4),
    search=SearchConfig(learning_rates=(2**-5, 2**-4), num_seeds=3, best_of=2),
  )


def fashion_mnist() -> RegularizationStudyConfig:
  """Wide-ResNet 16-4 on Fashion-MNIST, for a GPU or TPU."""
  return _published("fashion_mnist")


def cifar10() -> RegularizationStudyConfig:
  """Wide-ResNet 16-4 on CIFAR-10, by our reading of the paper's protocol."""
  return _published("cifar10")


def _published(name: str) -> RegularizationStudyConfig:
  default = TrainConfig()
  return RegularizationStudyConfig(
    train=dataclasses.replace(
      train.CONFIGS[name](), width=4, learning_rate=default.learning_rate
    )
  )


CONFIGS: dict[str, Callable[[], RegularizationStudyConfig]] = {
  "digits": digits,
  "fashion_mnist": fashion_mnist,
  "cifar10": cifar10,
}
