"""Residual networks for ImageNet."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from skipinit_jax.errors import UsageError, require_positive, unknown_name
from skipinit_jax.fields import check_types
from skipinit_jax.layers import ScalarBias
from skipinit_jax.methods import Method, ModuleFactory, bind_normalizer
from skipinit_jax.models.blocks import BottleneckBlock, PostActivationBottleneckBlock
from skipinit_jax.models.depth import Stacked, apply_stages
from skipinit_jax.models.head import Head
from skipinit_jax.models.stochastic_depth import branch_drops

STAGE_BLOCKS: dict[int, tuple[int, ...]] = {
  50: (3, 4, 6, 3),
  101: (3, 4, 23, 3),
  152: (3, 8, 36, 3),
  200: (3, 24, 36, 3),
}
"""Blocks of each stage, by depth."""


def _symmetric_conv(
  conv: ModuleFactory,
  features: int,
  kernel_size: tuple[int, ...],
  strides: int = 1,
  **fields: Any,
) -> nn.Module:
  """Returns a convolution that pads both sides alike."""
  padding = [(size // 2, size // 2) for size in kernel_size]
  module: nn.Module = conv(features, kernel_size, strides, padding=padding, **fields)
  return module


class ResNet(Stacked):
  """ResNet-50, 101, 152 or 200 of bottleneck blocks, with a stem for large images.

  Version 1 is post-activation (He et al., CVPR 2016), version 2 pre-activation
  (He et al., ECCV 2016). The stem is a 7x7 convolution without bias and a 3x3 max
  pool, both of stride 2. The classifier starts at zero, as in the code that the
  authors of SkipInit published later for normalizer-free networks.

  Attributes:
    depth: 50, 101, 152 or 200.
    num_classes: number of logits.
    method: what keeps the network trainable; see `skipinit_jax.methods`.
    version: 1 or 2.
    scan: whether to scan over the equal blocks of a stage, or to write them out.
    remat: whether to recompute blocks in the backward pass to save memory.
    symmetric_padding: whether layers with strides pad both sides alike, as PyTorch's
      do. XLA's SAME, the default, pads less at the top and left of even sizes.
    dtype: dtype of the computation.
    param_dtype: dtype of the parameters.

  Raises:
    UsageError: the depth or the version is none of the above, or the method is not
      defined for the version.
  """

  depth: int
  num_classes: int
  method: Method
  version: int = 2
  scan: bool = True
  remat: bool = False
  symmetric_padding: bool = False
  dtype: jax.typing.DTypeLike = jnp.float32
  param_dtype: jax.typing.DTypeLike = jnp.float32

  def __post_init__(self) -> None:
    super().__post_init__()
    check_types(self)
    require_positive(num_classes=self.num_classes)
    if self.depth not in STAGE_BLOCKS:
      depths = ", ".join(map(str, STAGE_BLOCKS))
      raise UsageError(f"depth is {self.depth}: a ResNet has one of {depths} layers.")
    if self.version not in (1, 2):
      raise unknown_name("ResNet version", self.version, ("1", "2"))
    if self.version == 1:
      self.method.require_default(
        "divide_by_expected_std", network="a ResNet of version 1"
      )

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    """Maps images [N, H, W, C] to logits [N, num_classes], float32."""
    method, preactivation = self.method, self.version == 2
    stage_blocks = STAGE_BLOCKS[self.depth]
    dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    conv = method.conv
    if self.symmetric_padding:
      conv = functools.partial(_symmetric_conv, conv)
    block = functools.partial(
      BottleneckBlock if preactivation else PostActivationBottleneckBlock,
      conv=conv,
      projection_init=method.kernel_init,
      **method.activated_block_fields(
        num_blocks=sum(stage_blocks), branch_layers=3, train=train, **dtypes
      ),
    )
    x = conv(
      64,
      (7, 7),
      2,
      use_bias=False,
      kernel_init=method.kernel_init,
      **dtypes,
      name="stem",
    )(images)
    if not preactivation:
      norm = bind_normalizer(method.normalizer, train=train, **dtypes)
      x = x if norm is None else norm(name="stem_norm")(x)
      if method.scalar_biases:
        x = ScalarBias(self.param_dtype, name="stem_bias")(x)
      x = method.activation(x)
    pool_padding = ((1, 1), (1, 1)) if self.symmetric_padding else "SAME"
    x = nn.max_pool(x, (3, 3), (2, 2), padding=pool_padding)
    x = apply_stages(
      x,
      block,
      features=[64, 128, 256, 512],
      num_blocks=stage_blocks,
      strides=[1, 2, 2, 2],
      per_block=method.expected_stds(stage_blocks),
      drops=branch_drops(self, method.drop_path, stage_blocks, train=train),
      scan=self.scan,
      remat=self.remat,
    )
    return Head(
      self.num_classes,
      method,
      preactivation=preactivation,
      classifier_init=nn.initializers.zeros,
      **dtypes,
      name="head",
    )(x, train)
