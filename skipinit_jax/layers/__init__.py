"""Layers of which residual blocks are made."""

from skipinit_jax.layers.convolution import Conv, conv_general_dilated
from skipinit_jax.layers.initializers import fixup, he_normal, he_normal_fan_out
from skipinit_jax.layers.normalization import GhostBatchNorm
from skipinit_jax.layers.scaling import LayerScale, ScalarBias, SkipInit
from skipinit_jax.layers.weight_standardization import (
  RELU_GAIN,
  WeightStandardizedConv,
  WeightStandardizedDense,
  scaled_relu,
  standardize,
)

__all__ = [
  "RELU_GAIN",
  "Conv",
  "GhostBatchNorm",
  "LayerScale",
  "ScalarBias",
  "SkipInit",
  "WeightStandardizedConv",
  "WeightStandardizedDense",
  "conv_general_dilated",
  "fixup",
  "he_normal",
  "he_normal_fan_out",
  "scaled_relu",
  "standardize",
]
