"""Residual networks for ImageNet."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from skipinit_jax import methods
from skipinit_jax.errors import UsageError, require_positive, unknown_name
from skipinit_jax.fields import check_types
from skipinit_jax.layers import ScalarBias
from skipinit_jax.methods import Method, bind_normalizer, require_linen
from skipinit_jax.models.blocks import (
  BasicBlock,
  BottleneckBlock,
  PostActivationBasicBlock,
  PostActivationBottleneckBlock,
  symmetric_conv,
)
from skipinit_jax.models.depth import Stacked, Stages, apply_stages
from skipinit_jax.models.head import Head

STAGE_BLOCKS: dict[int, tuple[int, ...]] = {
  18: (2, 2, 2, 2),
  34: (3, 4, 6, 3),
  50: (3, 4, 6, 3),
  101: (3, 4, 23, 3),
  152: (3, 8, 36, 3),
  200: (3, 24, 36, 3),
}
"""Blocks of each stage, by depth."""

BASIC_DEPTHS = (18, 34)
"""The depths of basic blocks; the others have bottleneck blocks."""


class ResNet(Stacked):
  """ResNet-18 or 34 of basic blocks, 50, 101, 152 or 200 of bottleneck blocks.

  Version 1 is post-activation (He et al., CVPR 2016), version 2 pre-activation
  (He et al., ECCV 2016). The stem is for large images: a 7x7 convolution and a 3x3 max
  pool, both of stride 2. The classifier starts at zero unless the method has its own
  initializer, as in the SkipInit, Fixup and batch norm networks of the code that the
  authors of SkipInit published later.

  Attributes:
    depth: 18, 34, 50, 101, 152 or 200.
    num_classes: number of logits.
    method: what keeps the network trainable, or its name; see `skipinit_jax.methods`.
    version: 1 or 2; None: `method.resnet_version`, or else 2.
    scan: whether to scan over the equal blocks of a stage, or to write them out.
    remat: whether to recompute blocks in the backward pass to save memory.
    symmetric_padding: whether layers with strides pad both sides alike, as PyTorch's
      do. XLA's SAME, the default, pads less at the top and left of even sizes.
    symmetric_stem: whether the stem's convolution does, whatever the other layers do.
      Alone it gives the padding of Flax's ImageNet example.
    average_projection: whether projections with strides take means of pixels, as
      timm's `nf_resnet50` does; theory does not know them.
    dtype: dtype of the computation.
    param_dtype: dtype of the parameters.

  Raises:
    UsageError: the depth or the version is none of the above, or the method is not
      defined for the version.
  """

  depth: int
  num_classes: int
  method: Method | str
  version: int | None = None
  scan: bool = True
  remat: bool = False
  symmetric_padding: bool = False
  symmetric_stem: bool = False
  average_projection: bool = False
  dtype: jax.typing.DTypeLike = jnp.float32
  param_dtype: jax.typing.DTypeLike = jnp.float32

  def __post_init__(self) -> None:
    method = self.method = methods.get(self.method)
    if self.version is None:
      self.version = method.resnet_version or 2
    super().__post_init__()
    check_types(self)
    require_positive(num_classes=self.num_classes)
    if self.depth not in STAGE_BLOCKS:
      depths = ", ".join(map(str, STAGE_BLOCKS))
      raise UsageError(f"depth is {self.depth}: a ResNet has one of {depths} layers.")
    if self.version not in (1, 2):
      raise unknown_name("ResNet version", self.version, ("1", "2"))
    if self.symmetric_stem and self.symmetric_padding:
      raise UsageError(
        "symmetric_stem is True: symmetric_padding is for the stem too, so it must be "
        "left out."
      )
    if self.version == 1:
      method.require_default("divide_by_expected_std", network="a ResNet of version 1")

  @nn.nowrap
  def stages(self) -> Stages:
    """Returns the kind, features, numbers and strides of the blocks."""
    basic = self.depth in BASIC_DEPTHS
    kinds = (
      (PostActivationBasicBlock, BasicBlock)
      if basic
      else (PostActivationBottleneckBlock, BottleneckBlock)
    )
    return Stages(
      kinds[self.version == 2],
      2 if basic else 3,
      [64, 128, 256, 512],
      STAGE_BLOCKS[self.depth],
      [1, 2, 2, 2],
    )

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    """Maps images [N, H, W, C] to logits [N, num_classes], float32."""
    method, preactivation = methods.get(self.method), self.version == 2
    dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    symmetric = functools.partial(symmetric_conv, method.conv)
    conv = symmetric if self.symmetric_padding else method.conv
    stem = symmetric if self.symmetric_stem else conv
    x = stem(
      64,
      (7, 7),
      2,
      use_bias=method.stem_bias,
      kernel_init=method.kernel_init,
      **dtypes,
      name="stem",
    )(images)
    if not preactivation:
      require_linen("normalizer", method.normalizer)
      norm = bind_normalizer(method.normalizer, train=train, **dtypes)
      x = x if norm is None else norm(name="stem_norm")(x)
      if method.scalar_biases:
        x = ScalarBias(self.param_dtype, name="stem_bias")(x)
      x = method.activation(x)
    pool_padding = ((1, 1), (1, 1)) if self.symmetric_padding else "SAME"
    x = nn.max_pool(x, (3, 3), (2, 2), padding=pool_padding)
    x = apply_stages(
      self, x, conv, train=train, average_projection=self.average_projection
    )
    return Head(
      self.num_classes,
      method,
      preactivation=preactivation,
      classifier_init=nn.initializers.zeros,
      **dtypes,
      name="head",
    )(x, train)
