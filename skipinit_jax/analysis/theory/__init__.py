"""Signal propagation at initialization, in the limit of infinite width."""

from skipinit_jax.analysis.theory.kernel import (
  BatchNorm,
  ExampleNorm,
  Kernel,
  Layer,
  Operation,
  ReLU,
)
from skipinit_jax.analysis.theory.network import (
  Block,
  Network,
  describe,
  uniform,
)
from skipinit_jax.analysis.theory.paths import (
  mean_path_length,
  path_weights,
)
from skipinit_jax.analysis.theory.prediction import predict, predict_model

__all__ = [
  "BatchNorm",
  "Block",
  "ExampleNorm",
  "Kernel",
  "Layer",
  "Network",
  "Operation",
  "ReLU",
  "describe",
  "mean_path_length",
  "path_weights",
  "predict",
  "predict_model",
  "uniform",
]
