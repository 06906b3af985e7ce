"""Typed default configurations of training runs, by data set."""

import dataclasses
from collections.abc import Callable

from skipinit_jax.training import TrainConfig

# Our reading of the paper's protocol on CIFAR-10; ../../README.md says what it is.
_PAPER = TrainConfig(
  dataset="cifar10",
  crop_padding=4,
  flip=True,
  depth=16,
  width=2,
  batch_size=64,
  epochs=200,
  learning_rate=2**-2,
  momentum=0.9,
  l2=5e-4,
  schedule="halving",
  constant_epochs=100,
  halve_every_epochs=10,
  eval_every_epochs=5,
)

# Our reading of the paper's protocol on ImageNet: 90 epochs, warm-up, cosine decay.
# Rate, warm-up and L2 are those of Goyal et al. (2017).
_IMAGENET = TrainConfig(
  dataset="imagenet2012",
  model="resnet",
  depth=50,
  batch_size=256,
  epochs=90,
  learning_rate=0.1,
  momentum=0.9,
  l2=1e-4,
  schedule="cosine",
  warmup_epochs=5,
  checkpoint_every_seconds=600,
)

CONFIGS: dict[str, Callable[[], TrainConfig]] = {
  # Embedded 8x8 images: a minute on a CPU.
  "digits": TrainConfig,
  # 28x28 images have less of a margin than CIFAR's 32x32.
  "fashion_mnist": lambda: dataclasses.replace(
    _PAPER, dataset="fashion_mnist", crop_padding=2
  ),
  "cifar10": lambda: dataclasses.replace(_PAPER),
  "cifar100": lambda: dataclasses.replace(_PAPER, dataset="cifar100"),
  "imagenet2012": lambda: dataclasses.replace(_IMAGENET),
}
