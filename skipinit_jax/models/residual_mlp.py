"""Residual networks of fully connected blocks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from skipinit_jax import methods
from skipinit_jax.errors import require_positive
from skipinit_jax.fields import check_types
from skipinit_jax.methods import Method
from skipinit_jax.models.blocks import FullyConnectedBlock
from skipinit_jax.models.depth import DepthStack, Stacked
from skipinit_jax.models.head import Head
from skipinit_jax.models.stochastic_depth import branch_drops


class ResidualMLP(Stacked):
  """Pre-activation residual network of fully connected blocks of constant width.

  Attributes:
    depth: number of residual blocks.
    width: features of every layer.
    num_classes: number of logits.
    method: what keeps the network trainable, or its name; see `skipinit_jax.methods`.
    layers_per_block: layers of one residual branch.
    scan: whether to scan over the blocks, or to write them out.
    remat: whether to recompute blocks in the backward pass to save memory.
    dtype: dtype of the computation.
    param_dtype: dtype of the parameters.

  Raises:
    UsageError: a size is below 1.
  """

  depth: int
  width: int
  num_classes: int
  method: Method | str
  layers_per_block: int = 1
  scan: bool = True
  remat: bool = False
  dtype: jax.typing.DTypeLike = jnp.float32
  param_dtype: jax.typing.DTypeLike = jnp.float32

  def __post_init__(self) -> None:
    self.method = methods.get(self.method)
    super().__post_init__()
    check_types(self)
    require_positive(
      depth=self.depth,
      width=self.width,
      num_classes=self.num_classes,
      layers_per_block=self.layers_per_block,
    )

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    """Maps images [N, ...], flattened, to logits [N, num_classes], float32."""
    method = methods.get(self.method)
    dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = method.dense(
      self.width,
      use_bias=method.stem_bias,
      kernel_init=method.kernel_init,
      **dtypes,
      name="stem",
    )(images.reshape(images.shape[0], -1))
    block = functools.partial(
      FullyConnectedBlock,
      self.width,
      num_layers=self.layers_per_block,
      dense=method.dense,
      **method.activated_block_fields(
        num_blocks=self.depth,
        branch_layers=self.layers_per_block,
        train=train,
        **dtypes,
      ),
    )
    (stds,) = method.expected_stds([self.depth])
    (drops,) = branch_drops(self, method.drop_path, [self.depth], train=train)
    stack = DepthStack(block, self.depth, self.scan, self.remat, name="stack")
    x = stack(x, stds, drops)
    return Head(self.num_classes, method, **dtypes, name="head")(x, train)
