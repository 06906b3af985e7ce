"""Layers, residual blocks and networks for Flax NNX.

    model = nnx.WideResNet(16, 1, 10, methods.get("skipinit"), rngs=flax.nnx.Rngs(0))
    model.eval()
    logits = model(images)

They compute what `skipinit_jax.layers` and `skipinit_jax.models` compute, on the same
methods; what differs is where the variables are: in the modules.
"""

from skipinit_jax.nnx.blocks import (
  ActivatedBlock,
  AttentionBlock,
  BasicBlock,
  BottleneckBlock,
  ConvolutionalBlock,
  FullyConnectedBlock,
  MLPBlock,
  PostActivationBasicBlock,
  PostActivationBottleneckBlock,
  ResidualBlock,
)
from skipinit_jax.nnx.depth import DepthStack
from skipinit_jax.nnx.layers import (
  Conv,
  GhostBatchNorm,
  LayerScale,
  ScalarBias,
  SkipInit,
  WeightStandardizedConv,
  WeightStandardizedLinear,
)
from skipinit_jax.nnx.networks import ResNet, WideResNet
from skipinit_jax.nnx.variables import from_linen, to_linen

__all__ = [
  "ActivatedBlock",
  "AttentionBlock",
  "BasicBlock",
  "BottleneckBlock",
  "Conv",
  "ConvolutionalBlock",
  "DepthStack",
  "FullyConnectedBlock",
  "GhostBatchNorm",
  "LayerScale",
  "MLPBlock",
  "PostActivationBasicBlock",
  "PostActivationBottleneckBlock",
  "ResNet",
  "ResidualBlock",
  "ScalarBias",
  "SkipInit",
  "WeightStandardizedConv",
  "WeightStandardizedLinear",
  "WideResNet",
  "from_linen",
  "to_linen",
]
