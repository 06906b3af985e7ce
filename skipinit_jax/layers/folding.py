"""A branch's last layer and its scale as one layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from skipinit_jax.layers.scaling import LayerScale, SkipInit, along_features
from skipinit_jax.layers.weight_standardization import (
  WeightStandardizedConv,
  WeightStandardizedDense,
)

# What of a layer a factor of its output multiplies. A standardized kernel would lose
# it. Subclasses may use their weights in another way.
_FACTORED = {
  nn.Conv: {"kernel", "bias"},
  nn.Dense: {"kernel", "bias"},
  WeightStandardizedConv: {"scale", "bias"},
  WeightStandardizedDense: {"scale", "bias"},
}


def scaled(scale: nn.Module | None, layer: nn.Module, x: jax.Array) -> jax.Array:
  """Returns scale(layer(x)): a branch's last layer and its scale, as one layer.

  Factors of the output's features are as well factors of the layer's weights. There
  they cost no pass over activations, and their gradient does not need the layer's
  output, which the backward pass would have to keep for nothing else. So the scale goes
  into the weights where it is `SkipInit` or `LayerScale` and the layer is Flax's own
  `Conv` or `Dense` or a standardized one; anywhere else it follows the layer.

  Args:
    scale: a module that multiplies each feature by a factor; None: there is none.
    layer: the layer, whose output has the features last.
  """
  if scale is None:
    return layer(x)
  factored = _FACTORED.get(type(layer))
  # Initialization has to see the weights as they are.
  if (
    factored is None
    or not isinstance(scale, SkipInit | LayerScale)
    or layer.is_initializing()
  ):
    return scale(layer(x))
  sized: Any = layer
  factors = scale(jnp.ones(sized.features, sized.param_dtype))

  def multiply(path: Any, leaf: jax.Array) -> jax.Array:
    name = path[-1].key
    return leaf * along_features(factors, leaf) if name in factored else leaf

  apply = nn.map_variables(
    lambda layer, x: layer(x),
    "params",
    lambda params: jax.tree.map_with_path(multiply, params),
  )
  y: jax.Array = apply(layer, x)
  return y
