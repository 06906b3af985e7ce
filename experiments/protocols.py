"""How the networks of De & Smith (2020) are trained, by our reading of the paper."""

import dataclasses
from typing import Any

from skipinit_jax.training import TrainConfig


def cifar10() -> TrainConfig:
  """Wide-ResNet 16-2 on CIFAR-10; docs/training.md says what the protocol is."""
  return TrainConfig(
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


def cifar100() -> TrainConfig:
  """The same on CIFAR-100."""
  return dataclasses.replace(cifar10(), dataset="cifar100")


def fashion_mnist() -> TrainConfig:
  """The same on Fashion-MNIST, whose 28x28 images have less of a margin."""
  return dataclasses.replace(cifar10(), dataset="fashion_mnist", crop_padding=2)


def imagenet() -> TrainConfig:
  """ResNet-50 on ImageNet: 90 epochs, warm-up, cosine decay.

  Rate, warm-up and L2 are those of Goyal et al. (2017). Sixteen blocks compile as fast
  written out as scanned, and their step needs a third of the memory with batch norm:
  see docs/performance.md.
  """
  return TrainConfig(
    dataset="imagenet2012",
    model="resnet",
    depth=50,
    scan=False,
    batch_size=256,
    epochs=90,
    learning_rate=0.1,
    momentum=0.9,
    l2=1e-4,
    schedule="cosine",
    warmup_epochs=5,
    checkpoint_every_seconds=600,
  )


def without_rate(config: TrainConfig, **changes: Any) -> TrainConfig:
  """Returns a protocol for a study that searches the rate, with other changes."""
  rate = TrainConfig().learning_rate
  return dataclasses.replace(config, learning_rate=rate, **changes)
