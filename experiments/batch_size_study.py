"""Measures accuracy, loss, optimal and largest stable rate by batch size and method.

Example:
  python -m experiments.batch_size_study --workdir=/tmp/study --config=digits
"""

import dataclasses

from experiments import program, protocols, study_program
from skipinit_jax.studies import BatchSizeStudyConfig, SearchConfig, batch_size_study
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


def fashion_mnist_cpu() -> BatchSizeStudyConfig:
  """A fully connected network of 16 blocks on small images, in hours on two cores.

  The steps are those of one epoch at the smallest batch size. That takes 256 epochs of
  the largest one.
  """
  return BatchSizeStudyConfig(
    batch_sizes=(8, 16, 32, 64, 128, 256, 512, 1024, 2048),
    ghost_batch_size=64,
    train=TrainConfig(
      dataset="fashion_mnist_half_16384",
      model="residual_mlp",
      depth=16,
      width=32,
      batch_size=64,
      epochs=8,
      constant_epochs=4,
      halve_every_epochs=0.4,
      eval_every_epochs=8,
    ),
    search=SearchConfig(
      learning_rates=(2**-6, 2**-5, 2**-4),
      until_unstable=True,
      min_learning_rate=2**-17,
      num_seeds=3,
      best_of=2,
    ),
  )


def fashion_mnist_quarter_cpu() -> BatchSizeStudyConfig:
  """Wide-ResNet 16-1 on small images, in hours on two cores.

  The images have a quarter of the resolution and are 2,048, so that 256 epochs of the
  largest batch size fit the time.
  """
  config = fashion_mnist_cpu()
  return dataclasses.replace(
    config,
    train=dataclasses.replace(
      config.train,
      dataset="fashion_mnist_quarter_2048",
      model="wide_resnet",
      width=1,
    ),
    search=dataclasses.replace(
      config.search,
      learning_rates=(2**-5, 2**-4),
      max_learning_rate=2**6,
      num_seeds=2,
    ),
  )


def fashion_mnist() -> BatchSizeStudyConfig:
  """The published networks on Fashion-MNIST, for a GPU or TPU."""
  return BatchSizeStudyConfig(
    train=protocols.without_rate(protocols.fashion_mnist(), width=4)
  )


def cifar10() -> BatchSizeStudyConfig:
  """The paper's Wide-ResNet 16-4, by our reading of its protocol."""
  return BatchSizeStudyConfig(
    train=protocols.without_rate(protocols.cifar10(), width=4)
  )


CONFIGS = {
  "digits": digits,
  "fashion_mnist_cpu": fashion_mnist_cpu,
  "fashion_mnist_quarter_cpu": fashion_mnist_quarter_cpu,
  "fashion_mnist": fashion_mnist,
  "cifar10": cifar10,
}

main = study_program.StudyProgram(batch_size_study, CONFIGS, default="digits")

if __name__ == "__main__":
  program.run(main)
