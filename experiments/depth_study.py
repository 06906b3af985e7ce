r"""Measures test accuracy and the best learning rate by depth and method.

Example:
  python -m experiments.depth_study --workdir=/tmp/study --config=demo

The convolutional network of 1000 layers:
  python -m experiments.depth_study --workdir=/tmp/study --config=demo \
    --config.wide_resnet_depths="(1000,)"
"""

import dataclasses

from experiments import program, protocols, study_program
from skipinit_jax.studies import DepthStudyConfig, SearchConfig, depth_study
from skipinit_jax.training import TrainConfig


def demo() -> DepthStudyConfig:
  """Every method of the paper's headline on `digits`, in minutes on two cores.

  The rates are the best ones for batch norm and SkipInit of a coarse search; every
  method gets all of them.
  """
  return DepthStudyConfig(
    methods=("batch_norm", "skipinit", "divide_by_sqrt2", "skipinit_one"),
    wide_resnet_depths=(16, 100),
    residual_mlp_depths=(1000,),
    wide_resnet=TrainConfig(
      model="wide_resnet",
      width=1,
      batch_size=32,
      epochs=3,
      constant_epochs=2,
      eval_every_epochs=3,
    ),
    residual_mlp=TrainConfig(
      model="residual_mlp", width=64, epochs=8, constant_epochs=6, eval_every_epochs=8
    ),
    wide_resnet_search=SearchConfig(
      learning_rates=(2**-4, 2**-6), extend=False, num_seeds=1, best_of=1
    ),
    residual_mlp_search=SearchConfig(
      learning_rates=(2**-5, 2**-9), extend=False, num_seeds=1, best_of=1
    ),
  )


def digits() -> DepthStudyConfig:
  """The published table's methods on `digits`, searched, in hours on two cores.

  The networks have width 1 and few epochs, the statistics are over 2 seeds.
  """
  return DepthStudyConfig(
    wide_resnet_depths=(16, 100, 1000),
    residual_mlp_depths=(16, 100, 1000),
    wide_resnet=TrainConfig(
      model="wide_resnet", width=1, batch_size=32, epochs=3, constant_epochs=2
    ),
    residual_mlp=TrainConfig(
      model="residual_mlp", width=64, epochs=8, constant_epochs=6
    ),
    wide_resnet_search=study_program.search(
      (2**-5, 2**-4), min_rate=2**-8, max_rate=2**-2
    ),
    residual_mlp_search=study_program.search(
      (2**-7, 2**-6), min_rate=2**-11, max_rate=2**-1, num_seeds=3
    ),
  )


def output_batch_norm() -> DepthStudyConfig:
  """Batch norm before the classifier only, as a reviewer asked, on `digits`."""
  return dataclasses.replace(
    digits(),
    methods=("batch_norm", "output_batch_norm", "unnormalized"),
    wide_resnet_depths=(16, 100),
  )


def fashion_mnist_cpu() -> DepthStudyConfig:
  """Fully connected networks on Fashion-MNIST, in an hour on two cores.

  Convolutional networks are too slow there: see `fashion_mnist_half_cpu`.
  """
  return DepthStudyConfig(
    residual_mlp_depths=(16, 100, 1000),
    residual_mlp=TrainConfig(
      dataset="fashion_mnist",
      model="residual_mlp",
      width=64,
      epochs=1,
      constant_epochs=0.5,
      halve_every_epochs=0.1,
    ),
    residual_mlp_search=study_program.search(
      (2**-7, 2**-6), min_rate=2**-9, max_rate=2**-1
    ),
  )


def fashion_mnist_half_cpu() -> DepthStudyConfig:
  """Convolutional networks on a part of Fashion-MNIST, in an hour on two cores.

  The images have half the resolution and are 4,096, so that 100 layers fit the time.
  """
  return DepthStudyConfig(
    methods_without_l2=("skipinit",),
    wide_resnet_depths=(16, 100),
    wide_resnet=TrainConfig(
      dataset="fashion_mnist_half_4096",
      model="wide_resnet",
      width=1,
      batch_size=16,
      epochs=1,
      constant_epochs=0.5,
      halve_every_epochs=0.1,
      eval_every_epochs=1,
    ),
    wide_resnet_search=study_program.search(
      (2**-6, 2**-5), min_rate=2**-9, max_rate=2**0
    ),
  )


def fashion_mnist() -> DepthStudyConfig:
  """Our reading of the paper's protocol, on Fashion-MNIST, for a GPU or TPU."""
  return _published(protocols.fashion_mnist())


def cifar10() -> DepthStudyConfig:
  """The paper's depth tables (Wide-ResNet n-2), by our reading of its protocol."""
  return _published(protocols.cifar10())


def _published(config: TrainConfig) -> DepthStudyConfig:
  return DepthStudyConfig(
    methods_without_l2=("skipinit",),
    wide_resnet_depths=(16, 100, 1000),
    wide_resnet=protocols.without_rate(config),
  )


CONFIGS = {
  "demo": demo,
  "digits": digits,
  "output_batch_norm": output_batch_norm,
  "fashion_mnist_cpu": fashion_mnist_cpu,
  "fashion_mnist_half_cpu": fashion_mnist_half_cpu,
  "fashion_mnist": fashion_mnist,
  "cifar10": cifar10,
}

main = study_program.StudyProgram(depth_study, CONFIGS, default="demo")

if __name__ == "__main__":
  program.run(main)
