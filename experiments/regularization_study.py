"""Measures accuracy by biases, dropout, L2 and method.

Example:
  python -m experiments.regularization_study --workdir=/tmp/study --config=digits
"""

import dataclasses

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


def l2_on_kernels() -> RegularizationStudyConfig:
  """Cells of `digits` with L2 on kernels alone, as the authors' later code has it.

  By default L2 reaches scales, scalars and biases too.
  """
  config = digits()
  return dataclasses.replace(
    config,
    methods_without_l2=(),
    use_bias=(True,),
    dropout_rates=(0.0,),
    train=dataclasses.replace(config.train, l2_exempt=("scale", "bias")),
  )


def fashion_mnist_cpu() -> RegularizationStudyConfig:
  """A network of 16 blocks that overfits 4,096 small images, for two cores.

  Every method also trains without L2, the other regularizer of the protocol.
  """
  names = ("batch_norm", "skipinit", "fixup")
  return RegularizationStudyConfig(
    methods=names,
    methods_without_l2=names,
    train=TrainConfig(
      dataset="fashion_mnist_half_4096",
      model="residual_mlp",
      depth=16,
      width=64,
      batch_size=32,
      epochs=48,
      constant_epochs=24,
      halve_every_epochs=4,
      eval_every_epochs=48,
    ),
    search=SearchConfig(learning_rates=(2**-7, 2**-6, 2**-5), num_seeds=3, best_of=3),
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
  "l2_on_kernels": l2_on_kernels,
  "fashion_mnist_cpu": fashion_mnist_cpu,
  "fashion_mnist": fashion_mnist,
  "cifar10": cifar10,
}

main = study_program.StudyProgram(regularization_study, CONFIGS, default="digits")

if __name__ == "__main__":
  program.run(main)
