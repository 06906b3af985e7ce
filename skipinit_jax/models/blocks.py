"""Residual blocks, with the normalizer, the branch scaling and the rest as fields.

    block = BasicBlock(64, normalizer=functools.partial(nn.GroupNorm, num_groups=8))
    block = BasicBlock(64, branch_scale=SkipInit)

As in Flax's own examples, a field such as `normalizer` is a factory of modules. A block
is called with its input x and, for a network whose normalization is the variance that
theory expects (Brock, De & Smith, ICLR 2021), with `expected_std`, the standard
deviation of x that is expected: the branch takes x / expected_std. So does a projection
of the shortcut. None, the default, divides nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from skipinit_jax.errors import UsageError
from skipinit_jax.layers import Conv, LayerScale, ScalarBias, SkipInit, he_normal
from skipinit_jax.methods import ModuleFactory

Activation = Callable[[jax.Array], jax.Array]
Scalar = float | jax.Array


class ResidualBlock(nn.Module):
  """What residual blocks share: their fields, and how a branch begins and ends.

  Attributes:
    features: the features of the branch's layers (bottleneck blocks return
      four times as many).
    strides: strides of the block, for convolutional blocks.
    normalizer: factory of the normalizers, called as `normalizer(name=...)`, such
      as `functools.partial(nn.BatchNorm, use_running_average=False)`; None: none.
    branch_scale: factory of the module at the end of the branch, such as
      `SkipInit`; None: none. Where the last layer is Flax's own, `SkipInit` and
      `LayerScale` act on its variables, which is the same function and costs nothing.
    sum_scale: a constant factor on the sum of shortcut and branch.
    scalar_biases: whether Fixup's scalar biases stand before each layer and each
      activation and at the end of the branch.
    use_bias: whether the layers have biases.
    kernel_init: initializer of the branch's layers.
    last_kernel_init: initializer of the branch's last layer; None: `kernel_init`.
    projection_init: initializer of the shortcut's projection.
    activation: the activation function.
    conv: factory of convolutions, with the fields of `flax.linen.Conv`.
    dtype: dtype of the computation; None: that of input and parameters.
    param_dtype: dtype of the parameters.
  """

  features: int
  strides: int = 1
  normalizer: ModuleFactory | None = None
  branch_scale: ModuleFactory | None = None
  sum_scale: float = 1.0
  scalar_biases: bool = False
  use_bias: bool = False
  kernel_init: jax.nn.initializers.Initializer = he_normal
  last_kernel_init: jax.nn.initializers.Initializer | None = None
  projection_init: jax.nn.initializers.Initializer = he_normal
  activation: Activation = nn.relu
  conv: ModuleFactory = Conv
  dtype: jax.typing.DTypeLike | None = None
  param_dtype: jax.typing.DTypeLike = jnp.float32

  def _downscale(self, x: jax.Array, expected_std: Scalar | None) -> jax.Array:
    return x if expected_std is None else (x / expected_std).astype(x.dtype)

  def _bias(self, x: jax.Array, name: str) -> jax.Array:
    return ScalarBias(self.param_dtype, name=name)(x) if self.scalar_biases else x

  def _normalize(self, x: jax.Array, name: str) -> jax.Array:
    return self.normalizer(name=name)(x) if self.normalizer is not None else x

  def _activate(self, x: jax.Array, index: int) -> jax.Array:
    """Normalizer and activation, each scalar bias before what it belongs to."""
    x = self._normalize(x, f"norm{index}")
    x = self.activation(self._bias(x, f"activation_bias{index}"))
    return self._bias(x, f"layer_bias{index}")

  def _convolve(
    self,
    x: jax.Array,
    features: int,
    size: int,
    strides: int = 1,
    *,
    name: str,
    last: bool = False,
    normalizer: str | None = None,
  ) -> jax.Array:
    layer = self.conv(
      features,
      (size, size),
      strides,
      use_bias=self.use_bias,
      kernel_init=(self.last_kernel_init if last else None) or self.kernel_init,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name=name,
    )
    return self._scaled_branch(layer, x, normalizer) if last else layer(x)

  def _scaled_branch(
    self, layer: Any, x: jax.Array, normalizer: str | None = None
  ) -> jax.Array:
    """Returns the branch from its last layer's input: the scaled output of that.

    Factors of the output's features are as well factors of the layer's kernel and
    bias. There they cost no pass over activations, and their gradient does not need
    the layer's output, which the backward pass would have to keep for nothing else.

    Args:
      layer: the last layer.
      x: its input.
      normalizer: name of a normalizer between layer and scale; None: there is none.
    """
    scale: Any = None
    if self.branch_scale is not None:
      scale = self.branch_scale(name="branch_scale")
    foldable = (
      isinstance(scale, SkipInit | LayerScale)
      # Not subclasses: kernels that are standardized lose their scale.
      and type(layer) in (nn.Conv, nn.Dense)
      and (normalizer is None or self.normalizer is None)
    )
    if foldable and not self.is_initializing():
      factors = scale(jnp.ones(layer.features, self.param_dtype))
      return nn.map_variables(
        lambda layer, x: layer(x),
        "params",
        lambda params: jax.tree.map(lambda leaf: leaf * factors, params),
      )(layer, x)
    y = layer(x)
    if normalizer is not None:
      y = self._normalize(y, normalizer)
    return y if scale is None else scale(y)

  def _project(self, x: jax.Array, features: int) -> jax.Array:
    return self.conv(
      features,
      (1, 1),
      self.strides,
      use_bias=self.use_bias,
      kernel_init=self.projection_init,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name="projection",
    )(x)

  def _changes_shape(self, x: jax.Array, features: int) -> bool:
    return self.strides != 1 or x.shape[-1] != features

  def _require_same_shape(self, x: jax.Array, kind: str) -> None:
    """Raises a UsageError unless the block keeps the shape of its input."""
    if self._changes_shape(x, self.features):
      raise UsageError(
        f"A {kind} block keeps its {self.features} features and has no strides: its "
        f"input has {x.shape[-1]} features and strides is {self.strides}."
      )

  def _merge(self, shortcut: jax.Array, branch: jax.Array) -> jax.Array:
    total = (shortcut + self._bias(branch, "branch_bias")) * self.sum_scale
    # A normalizer that knows no dtype may have widened it, which a scan forbids.
    return total if self.dtype is None else total.astype(self.dtype)


class BasicBlock(ResidualBlock):
  """Pre-activation block of two 3x3 convolutions (He et al., ECCV 2016).

  Where strides or features change, a projection of the activated input is the
  shortcut, as in Wide-ResNets (Zagoruyko & Komodakis, BMVC 2016).
  """

  @nn.compact
  def __call__(self, x: jax.Array, expected_std: Scalar | None = None) -> jax.Array:
    """Maps [N, H, W, C] to [N, H / strides, W / strides, features]."""
    y = self._activate(self._downscale(x, expected_std), 1)
    changes = self._changes_shape(x, self.features)
    shortcut = self._project(y, self.features) if changes else x
    y = self._convolve(y, self.features, 3, self.strides, name="conv1")
    y = self._activate(y, 2)
    y = self._convolve(y, self.features, 3, name="conv2", last=True)
    return self._merge(shortcut, y)


class BottleneckBlock(ResidualBlock):
  """Pre-activation block of 1x1, 3x3 and 1x1 convolutions (He et al., ECCV 2016).

  Where strides or features change, a projection of the activated input is the
  shortcut.
  """

  @nn.compact
  def __call__(self, x: jax.Array, expected_std: Scalar | None = None) -> jax.Array:
    """Maps [N, H, W, C] to [N, H / strides, W / strides, 4 features]."""
    y = self._activate(self._downscale(x, expected_std), 1)
    changes = self._changes_shape(x, 4 * self.features)
    shortcut = self._project(y, 4 * self.features) if changes else x
    y = self._convolve(y, self.features, 1, name="conv1")
    y = self._activate(y, 2)
    y = self._convolve(y, self.features, 3, self.strides, name="conv2")
    y = self._activate(y, 3)
    y = self._convolve(y, 4 * self.features, 1, name="conv3", last=True)
    return self._merge(shortcut, y)


class PostActivationBottleneckBlock(ResidualBlock):
  """Version-1 bottleneck block: the activation follows the sum.

  He et al. (CVPR 2016), with the stride on the 3x3 convolution. A normalizer
  follows each convolution and the projection. With scalar biases it is the block
  of Fixup's ResNet-50 (Zhang et al., 2019), where one bias on the input feeds
  both the branch and the projection.
  """

  @nn.compact
  def __call__(self, x: jax.Array, expected_std: Scalar | None = None) -> jax.Array:
    """Maps [N, H, W, C] to [N, H / strides, W / strides, 4 features]."""
    y = self._bias(self._downscale(x, expected_std), "layer_bias1")
    shortcut = x
    if self._changes_shape(x, 4 * self.features):
      shortcut = self._normalize(self._project(y, 4 * self.features), "projection_norm")
    y = self._convolve(y, self.features, 1, name="conv1")
    y = self._activate(y, 2)
    y = self._convolve(y, self.features, 3, self.strides, name="conv2")
    y = self._activate(y, 3)
    y = self._convolve(
      y, 4 * self.features, 1, name="conv3", last=True, normalizer="norm4"
    )
    return self.activation(self._merge(shortcut, y))


class FullyConnectedBlock(ResidualBlock):
  """Pre-activation block of fully connected layers.

  Attributes:
    num_layers: layers of the branch.
    dense: factory of the layers, with the fields of `flax.linen.Dense`.
  """

  num_layers: int = 1
  dense: ModuleFactory = nn.Dense

  @nn.compact
  def __call__(self, x: jax.Array, expected_std: Scalar | None = None) -> jax.Array:
    """Maps [N, features] to [N, features].

    Raises:
      UsageError: the input has other features, or strides is not 1.
    """
    self._require_same_shape(x, "fully connected")
    y = self._downscale(x, expected_std)
    for index in range(1, self.num_layers + 1):
      last = index == self.num_layers
      y = self._activate(y, index)
      layer = self.dense(
        self.features,
        use_bias=self.use_bias,
        kernel_init=(self.last_kernel_init if last else None) or self.kernel_init,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=f"dense{index}",
      )
      y = self._scaled_branch(layer, y) if last else layer(y)
    return self._merge(x, y)
