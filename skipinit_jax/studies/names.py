"""How studies name networks and rates."""

import math
from collections.abc import Iterable

from skipinit_jax.training import TrainConfig


def network_name(config: TrainConfig) -> str:
  """Returns the name of a run's network, such as "Wide-ResNet 16-1"."""
  name = {"wide_resnet": "Wide-ResNet", "residual_mlp": "MLP"}
  return f"{name[config.model]} {config.depth}-{config.width}"


def format_rate(rate: float) -> str:
  """Returns a rate as a power of two where it is one: 2^-5."""
  mantissa, exponent = math.frexp(rate)
  return f"2^{exponent - 1}" if mantissa == 0.5 else f"{rate:g}"


def unique(values: Iterable[str]) -> list[str]:
  """Returns the values in the order of their first occurrence."""
  return list(dict.fromkeys(values))
