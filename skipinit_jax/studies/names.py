"""How studies name networks and data sets, and write numbers."""

import math

from skipinit_jax.training import TrainConfig


def network_name(config: TrainConfig) -> str:
  """Returns the name of a run's network, such as "Wide-ResNet 16-1"."""
  if config.model == "resnet":
    return f"{model_name(config.model)} {config.depth} v{config.version}"
  return f"{model_name(config.model)} {config.depth}-{config.width}"


def model_name(model: str) -> str:
  """Returns the name of a kind of network for people."""
  return {
    "wide_resnet": "Wide-ResNet",
    "residual_mlp": "MLP",
    "resnet": "ResNet",
    "vision_transformer": "Vision Transformer",
  }[model]


def dataset_name(dataset: str) -> str:
  """Returns the name of a data set for people."""
  return {
    "digits": "scikit-learn's 8x8 digits",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "imagenet2012": "ImageNet",
    "sample_photos": "sample photographs",
  }.get(dataset, dataset)


def format_accuracy(accuracy: float | None, deviation: float | None) -> str:
  """Returns a share in percent, with its deviation where that is known: 93.5±0.1."""
  if accuracy is None:
    return "none"
  error = "" if deviation is None else f"±{100 * deviation:.1f}"
  return f"{100 * accuracy:.1f}{error}"


def format_rate(rate: float) -> str:
  """Returns a rate as a power of two where it is one: 2^-5."""
  mantissa, exponent = math.frexp(rate)
  return f"2^{exponent - 1}" if mantissa == 0.5 else f"{rate:g}"


def format_alpha(alpha: float) -> str:
  """Returns alpha as a power of two where it is one below 1, else to three digits."""
  text = format_rate(alpha)
  return text if alpha < 1 and text.startswith("2^") else f"{alpha:.3g}"
