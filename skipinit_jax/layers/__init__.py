"""Layers of which residual blocks are made."""

from skipinit_jax.layers.convolution import Conv, conv_general_dilated
from skipinit_jax.layers.initializers import fixup, he_normal, he_normal_fan_out
from skipinit_jax.layers.normalization import GhostBatchNorm
from skipinit_jax.layers.scaling import ScalarBias, SkipInit

__all__ = [
  "Conv",
  "GhostBatchNorm",
  "ScalarBias",
  "SkipInit",
  "conv_general_dilated",
  "fixup",
  "he_normal",
  "he_normal_fan_out",
]
