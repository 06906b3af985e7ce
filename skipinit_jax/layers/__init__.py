"""The layers that residual blocks are made of."""

from skipinit_jax.layers.activation import RELU_GAIN, identity, scaled_relu
from skipinit_jax.layers.convolution import Conv, conv_general_dilated
from skipinit_jax.layers.folding import scaled
from skipinit_jax.layers.initializers import (
  VarianceScaling,
  fixup,
  he_normal,
  he_normal_fan_out,
)
from skipinit_jax.layers.normalization import GhostBatchNorm
from skipinit_jax.layers.scaling import LayerScale, ScalarBias, SkipInit
from skipinit_jax.layers.weight_standardization import (
  WeightStandardizedConv,
  WeightStandardizedDense,
  standardize,
)

__all__ = [
  "RELU_GAIN",
  "Conv",
  "GhostBatchNorm",
  "LayerScale",
  "ScalarBias",
  "SkipInit",
  "VarianceScaling",
  "WeightStandardizedConv",
  "WeightStandardizedDense",
  "conv_general_dilated",
  "fixup",
  "he_normal",
  "he_normal_fan_out",
  "identity",
  "scaled",
  "scaled_relu",
  "standardize",
]
