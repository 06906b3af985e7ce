"""Kernel initializers."""

import jax
from flax import linen as nn

he_normal: jax.nn.initializers.Initializer = nn.initializers.variance_scaling(
  2.0, "fan_in", "normal"
)
"""He initialization, normal with variance 2 / fan-in (He et al., 2015)."""

he_normal_fan_out: jax.nn.initializers.Initializer = nn.initializers.variance_scaling(
  2.0, "fan_out", "normal"
)
"""He initialization by fan-out, normal with variance 2 / fan-out."""


def fixup(num_blocks: int, branch_layers: int) -> jax.nn.initializers.Initializer:
  """Fixup's initializer of a branch's layers before its last.

  He initialization by fan-out, with weights scaled by d^(-1/(2m - 2)): Zhang,
  Dauphin & Ma (ICLR 2019), section 3. The last layer of a branch is zero.

  Args:
    num_blocks: d, the residual blocks of the whole network.
    branch_layers: m, the layers of one branch; at least 2, because a branch of
      one layer has no layer before its last.

  Returns:
    An initializer: normal, variance 2 d^(-1/(m - 1)) / fan-out.
  """
  variance = 2.0 * num_blocks ** (-1.0 / (branch_layers - 1))
  return nn.initializers.variance_scaling(variance, "fan_out", "normal")
