"""Residual blocks, stacks of them, and networks."""

from skipinit_jax.models.blocks import (
  BasicBlock,
  BottleneckBlock,
  FullyConnectedBlock,
  PostActivationBottleneckBlock,
  ResidualBlock,
)
from skipinit_jax.models.depth import DepthStack, scan_variables, unroll_variables
from skipinit_jax.models.residual_mlp import ResidualMLP
from skipinit_jax.models.resnet import ResNet
from skipinit_jax.models.transformer import (
  AttentionBlock,
  EncoderBlock,
  MLPBlock,
  VisionTransformer,
)
from skipinit_jax.models.wide_resnet import WideResNet

__all__ = [
  "AttentionBlock",
  "BasicBlock",
  "BottleneckBlock",
  "DepthStack",
  "EncoderBlock",
  "FullyConnectedBlock",
  "MLPBlock",
  "PostActivationBottleneckBlock",
  "ResNet",
  "ResidualBlock",
  "ResidualMLP",
  "VisionTransformer",
  "WideResNet",
  "scan_variables",
  "unroll_variables",
]
