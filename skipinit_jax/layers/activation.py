"""Activations beside those of Flax."""

import math

import jax
from flax import linen as nn

RELU_GAIN = math.sqrt(2 / (1 - 1 / math.pi))
"""Gamma, the inverse standard deviation of ReLU's output for standard normal input."""


def scaled_relu(x: jax.Array) -> jax.Array:
  """Returns ReLU times `RELU_GAIN`: standard normal features keep variance one.

  Brock, De & Smith (ICLR 2021), section 4.
  """
  return nn.relu(x) * RELU_GAIN


def identity(x: jax.Array) -> jax.Array:
  """Returns x: the activation of a linear network."""
  return x
