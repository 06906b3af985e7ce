"""Kernel initializers."""

import dataclasses
from typing import Any, Literal

import jax
from flax import linen as nn


@dataclasses.dataclass(frozen=True)
class VarianceScaling:
  """A normal initializer of variance `scale` / fan, which theory can read.

  It draws what `flax.linen.initializers.variance_scaling(scale, fan, "normal")` draws.

  Attributes:
    scale: the variance times the fan.
    fan: "fan_in" or "fan_out".
  """

  scale: float
  fan: Literal["fan_in", "fan_out"] = "fan_in"

  def __call__(
    self, key: jax.Array, shape: Any, dtype: Any = None, out_sharding: Any = None
  ) -> jax.Array:
    """Returns a kernel of this shape, [..., inputs, outputs]."""
    init = nn.initializers.variance_scaling(self.scale, self.fan, "normal")
    kernel: jax.Array = init(key, shape, dtype, out_sharding)
    return kernel


he_normal = VarianceScaling(2.0)
"""He initialization, normal with variance 2 / fan-in (He et al., 2015)."""

he_normal_fan_out = VarianceScaling(2.0, "fan_out")
"""He initialization by fan-out, normal with variance 2 / fan-out."""


def fixup(num_blocks: int, branch_layers: int) -> VarianceScaling:
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
  return VarianceScaling(2.0 * num_blocks ** (-1.0 / (branch_layers - 1)), "fan_out")
