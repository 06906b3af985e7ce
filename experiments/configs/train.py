"""Typed default configurations of training runs, by data set."""

from collections.abc import Callable

from skipinit_jax.training import TrainConfig


def digits() -> TrainConfig:
  """Real 8x8 digits, embedded: a Wide-ResNet 16-1 in seconds on a CPU."""
  return TrainConfig()


def _paper(**fields: object) -> TrainConfig:
  """The paper's protocol on small images, as read in the design's notes."""
  defaults = TrainConfig(
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
    crop_padding=4,
    flip=True,
    eval_every_epochs=5,
  )
  for name, value in fields.items():
    setattr(defaults, name, value)
  return defaults


def cifar10() -> TrainConfig:
  """CIFAR-10 with the paper's protocol: a Wide-ResNet 16-2, 200 epochs."""
  return _paper(dataset="cifar10")


def cifar100() -> TrainConfig:
  """CIFAR-100, as CIFAR-10."""
  return _paper(dataset="cifar100")


def fashion_mnist() -> TrainConfig:
  """Fashion-MNIST, as CIFAR-10 with less padding for its smaller images."""
  return _paper(dataset="fashion_mnist", crop_padding=2)


CONFIGS: dict[str, Callable[[], TrainConfig]] = {
  "digits": digits,
  "fashion_mnist": fashion_mnist,
  "cifar10": cifar10,
  "cifar100": cifar100,
}
