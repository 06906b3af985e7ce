"""Residual blocks, stacks of blocks, and networks."""

from skipinit_jax.models.blocks import (
  ActivatedBlock,
  BasicBlock,
  BottleneckBlock,
  ConvolutionalBlock,
  FullyConnectedBlock,
  PostActivationBasicBlock,
  PostActivationBottleneckBlock,
  ResidualBlock,
)
from skipinit_jax.models.depth import DepthStack, scan_variables, unroll_variables
from skipinit_jax.models.registry import known_names, register
from skipinit_jax.models.residual_mlp import ResidualMLP
from skipinit_jax.models.resnet import ResNet
from skipinit_jax.models.stochastic_depth import BranchDrop, branch_drops
from skipinit_jax.models.transformer import (
  AttentionBlock,
  EncoderBlock,
  MLPBlock,
  VisionTransformer,
)
from skipinit_jax.models.wide_resnet import WideResNet

__all__ = [
  "ActivatedBlock",
  "AttentionBlock",
  "BasicBlock",
  "BottleneckBlock",
  "BranchDrop",
  "ConvolutionalBlock",
  "DepthStack",
  "EncoderBlock",
  "FullyConnectedBlock",
  "MLPBlock",
  "PostActivationBasicBlock",
  "PostActivationBottleneckBlock",
  "ResNet",
  "ResidualBlock",
  "ResidualMLP",
  "VisionTransformer",
  "WideResNet",
  "branch_drops",
  "known_names",
  "register",
  "scan_variables",
  "unroll_variables",
]
