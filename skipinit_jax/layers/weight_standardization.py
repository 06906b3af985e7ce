"""Scaled weight standardization: layers that normalize their weights, not features.

Brock, De & Smith (ICLR 2021), section 4.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from skipinit_jax.layers.convolution import conv_general_dilated
from skipinit_jax.layers.scaling import along_features, wide

# The authors' code adds it to the weights' variance times the fan-in.
_EPSILON = 1e-4


def standardize(kernel: jax.Array) -> jax.Array:
  """Returns a kernel with mean zero and norm one for each output feature.

  W_hat = (W - mean(W)) / (std(W) sqrt(N)), over the fan-in N of each output feature.
  The mean of its input does not reach the output, so that there is no mean shift;
  and features of variance one keep it.

  Args:
    kernel: [..., out], of at least two dimensions.
  """
  axes = tuple(range(kernel.ndim - 1))
  centered = wide(kernel) - wide(kernel).mean(axes, keepdims=True)
  squares = jnp.square(centered).sum(axes, keepdims=True)
  return (centered * jax.lax.rsqrt(jnp.maximum(squares, _EPSILON))).astype(kernel.dtype)


class _WeightStandardization(nn.Module):
  """Standardizes the kernel of the layer that it is mixed into, and scales it."""

  def param(self, name: str, *args: Any, **keywords: Any) -> Any:
    value = super().param(name, *args, **keywords)
    if name != "kernel":
      return value
    scale = super().param("scale", nn.initializers.ones, value.shape[-1:], value.dtype)
    return standardize(value) * along_features(scale, value)


class WeightStandardizedConv(_WeightStandardization, nn.Conv):
  """`layers.Conv` with scaled weight standardization.

  Its further parameter `scale`, [out], starts at one and multiplies the standardized
  weights of each output feature. The gain that belongs to the activation is in the
  activation: see `scaled_relu`.
  """

  conv_general_dilated: Any = conv_general_dilated


class WeightStandardizedDense(_WeightStandardization, nn.Dense):
  """`flax.linen.Dense` with scaled weight standardization.

  See `WeightStandardizedConv`.
  """
