"""Wide residual networks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from skipinit_jax import methods
from skipinit_jax.errors import UsageError, require_positive
from skipinit_jax.fields import check_types
from skipinit_jax.methods import Method
from skipinit_jax.models.blocks import BasicBlock, symmetric_conv
from skipinit_jax.models.depth import Stacked, Stages, apply_stages
from skipinit_jax.models.head import Head


class WideResNet(Stacked):
  """Wide-ResNet of pre-activation basic blocks, with a stem for small images.

  Zagoruyko & Komodakis (BMVC 2016): a 3x3 stem of 16 features and three stages of
  n blocks with 16, 32 and 64 times `width` features, the last two with stride 2.

  Attributes:
    depth: 6 n + 4 layers.
    width: factor on the features.
    num_classes: number of logits.
    method: what keeps the network trainable, or its name; see `skipinit_jax.methods`.
    scan: whether to scan over the equal blocks of a stage, or to write them out.
    remat: whether to recompute blocks in the backward pass to save memory.
    symmetric_padding: whether layers with strides pad both sides alike, as PyTorch's
      do. XLA's SAME, the default, pads less at the top and left of even sizes.
    dtype: dtype of the computation.
    param_dtype: dtype of the parameters.

  Raises:
    UsageError: the depth is not 6 n + 4, or a size is below 1.
  """

  depth: int
  width: int
  num_classes: int
  method: Method | str
  scan: bool = True
  remat: bool = False
  symmetric_padding: bool = False
  dtype: jax.typing.DTypeLike = jnp.float32
  param_dtype: jax.typing.DTypeLike = jnp.float32

  def __post_init__(self) -> None:
    self.method = methods.get(self.method)
    super().__post_init__()
    check_types(self)
    require_positive(width=self.width, num_classes=self.num_classes)
    if self.depth < 10 or (self.depth - 4) % 6:
      below = max(10, self.depth - (self.depth - 4) % 6)
      raise UsageError(
        f"depth is {self.depth}: a Wide-ResNet has 6 n + 4 layers, such as {below} "
        f"or {below + 6}."
      )

  @nn.nowrap
  def stages(self) -> Stages:
    """Returns the kind, features, numbers and strides of the blocks."""
    features = [16 * self.width, 32 * self.width, 64 * self.width]
    return Stages(BasicBlock, 2, features, [(self.depth - 4) // 6] * 3, [1, 2, 2])

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    """Maps images [N, H, W, C] to logits [N, num_classes], float32."""
    method = methods.get(self.method)
    dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    conv = method.conv
    if self.symmetric_padding:
      conv = functools.partial(symmetric_conv, conv)
    x = conv(
      16,
      (3, 3),
      use_bias=method.stem_bias,
      kernel_init=method.kernel_init,
      **dtypes,
      name="stem",
    )(images)
    x = apply_stages(self, x, conv, train=train)
    return Head(self.num_classes, method, **dtypes, name="head")(x, train)
