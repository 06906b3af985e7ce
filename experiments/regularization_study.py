"""Measures accuracy by biases, dropout, L2 and method.

Example:
  python -m experiments.regularization_study --workdir=/tmp/study --config=digits
"""

from experiments import program, protocols, study_program
from skipinit_jax.studies import (
  RegularizationStudyConfig,
  SearchConfig,
  regularization_study,
)
from skipinit_jax.training import TrainConfig


def digits() -> RegularizationStudyConfig:
  """A small network on `digits`, for two cores."""
  return RegularizationStudyConfig(
    train=TrainConfig(width=1, batch_size=32, epochs=8, constant_epochs=4),
    search=SearchConfig(learning_rates=(2**-5, 2**-4), num_seeds=3, best_of=2),
  )


def fashion_mnist() -> RegularizationStudyConfig:
  """Wide-ResNet 16-4 on Fashion-MNIST, for a GPU or TPU."""
  return RegularizationStudyConfig(
    train=protocols.without_rate(protocols.fashion_mnist(), width=4)
  )


def cifar10() -> RegularizationStudyConfig:
  """Wide-ResNet 16-4 on CIFAR-10, by our reading of the paper's protocol."""
  return RegularizationStudyConfig(
    train=protocols.without_rate(protocols.cifar10(), width=4)
  )


CONFIGS = {
  "digits": digits,
  "fashion_mnist": fashion_mnist,
  "cifar10": cifar10,
}

main = study_program.StudyProgram(regularization_study, CONFIGS, default="digits")

if __name__ == "__main__":
  program.run(main)
