"""Wide residual networks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from skipinit_jax.errors import UsageError
from skipinit_jax.methods import Method
from skipinit_jax.models.blocks import BasicBlock
from skipinit_jax.models.common import (
  Head,
  block_fields,
  conv,
  expected_stds,
  kernel_init,
  require_positive,
)
from skipinit_jax.models.depth import DepthStack


class WideResNet(nn.Module):
  """Wide-ResNet of pre-activation basic blocks, with a stem for small images.

  Zagoruyko & Komodakis (BMVC 2016): a 3x3 stem of 16 features and three stages of
  n blocks with 16, 32 and 64 times `width` features, the last two with stride 2.

  Attributes:
    depth: 6 n + 4 layers.
    width: factor on the features.
    num_classes: number of logits.
    method: what keeps the network trainable; see `skipinit_jax.methods`.
    scan: whether to scan over the equal blocks of a stage, or to write them out.
    remat: whether to recompute blocks in the backward pass to save memory.
    dtype: dtype of the computation.
    param_dtype: dtype of the parameters.

  Raises:
    UsageError: the depth is not 6 n + 4, or a size is below 1.
  """

  depth: int
  width: int
  num_classes: int
  method: Method
  scan: bool = True
  remat: bool = False
  dtype: jax.typing.DTypeLike = jnp.float32
  param_dtype: jax.typing.DTypeLike = jnp.float32

  def __post_init__(self) -> None:
    super().__post_init__()
    require_positive(width=self.width, num_classes=self.num_classes)
    if self.depth < 10 or (self.depth - 4) % 6:
      below = max(10, self.depth - (self.depth - 4) % 6)
      raise UsageError(
        f"depth is {self.depth}: a Wide-ResNet has 6 n + 4 layers, such as {below} "
        f"or {below + 6}."
      )

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    """Maps images [N, H, W, C] to logits [N, num_classes], float32."""
    stage_blocks = (self.depth - 4) // 6
    dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    fields = block_fields(
      self.method, num_blocks=3 * stage_blocks, branch_layers=2, train=train, **dtypes
    )
    x = conv(self.method)(
      16,
      (3, 3),
      use_bias=False,
      kernel_init=kernel_init(self.method),
      **dtypes,
      name="stem",
    )(images)
    stds = expected_stds(self.method, [stage_blocks] * 3)
    for stage, (strides, std) in enumerate(zip((1, 2, 2), stds, strict=True), start=1):
      block = functools.partial(
        BasicBlock,
        2 ** (stage + 3) * self.width,
        conv=conv(self.method),
        **fields,
      )
      first, rest = (None, None) if std is None else (std[0], std[1:])
      x = block(strides=strides, name=f"stage{stage}_first")(x, first)
      x = DepthStack(
        block, stage_blocks - 1, self.scan, self.remat, name=f"stage{stage}_rest"
      )(x, rest)
    return Head(self.num_classes, self.method, **dtypes, name="head")(x, train)
