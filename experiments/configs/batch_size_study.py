"""Typed default configurations of batch-size studies."""

import dataclasses
from collections.abc import Callable

from experiments.configs import train
from skipinit_jax.studies import BatchSizeStudyConfig, SearchConfig
from skipinit_jax.training import TrainConfig


def digits() -> BatchSizeStudyConfig:
  """A small network on `digits`, for two cores."""
  return BatchSizeStudyConfig(
    batch_sizes=(16, 32, 64, 128, 256),
    ghost_batch_size=32,
    train=TrainConfig(width=1, batch_size=16, epochs=4, constant_epochs=2),
    search=SearchConfig(
      learning_rates=(2**-6, 2**-5, 2**-4),
      until_unstable=True,
      max_learning_rate=2**0,
      num_seeds=3,
      best_of=2,
    ),
  )


def fashion_mnist() -> BatchSizeStudyConfig:
  """The published networks on Fashion-MNIST, for a GPU or TPU."""
  return _published("fashion_mnist")


def cifar10() -> BatchSizeStudyConfig:
  """The paper's Wide-ResNet 16-4, by our reading of its protocol."""
  return _published("cifar10")


def _published(name: str) -> BatchSizeStudyConfig:
  default = TrainConfig()
  return BatchSizeStudyConfig(
    train=dataclasses.replace(
      train.CONFIGS[name](), width=4, learning_rate=default.learning_rate
    )
  )


CONFIGS: dict[str, Callable[[], BatchSizeStudyConfig]] = {
  "digits": digits,
  "fashion_mnist": fashion_mnist,
  "cifar10": cifar10,
}
