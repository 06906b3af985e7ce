"""Residual blocks: x + alpha f(x), with the normalizer, alpha and the rest as fields.

    block = BasicBlock(64, normalizer=functools.partial(nn.GroupNorm, num_groups=8))
    block = BasicBlock(64, branch_scale=SkipInit)

As in Flax's own examples, a field such as `normalizer` is a factory of modules.

Pre-activation blocks take, beside x, `expected_std`: the standard deviation that theory
expects of x, which normalizes in place of a normalizer (Brock, De & Smith, ICLR 2021).
The branch and a projection of the shortcut take x / expected_std. None, the default,
divides nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from skipinit_jax.errors import UsageError
from skipinit_jax.layers import Conv, ScalarBias, he_normal, scaled
from skipinit_jax.methods import Activation, ModuleFactory, require_linen
from skipinit_jax.models.stochastic_depth import drop_here

Initializer = jax.nn.initializers.Initializer
Scalar = float | jax.Array


class ResidualBlock(nn.Module, kw_only=True):
  """What all residual blocks share: how a branch is normalized, scaled and added.

  Attributes:
    normalizer: factory of the normalizers, called as `normalizer(name=...)`, such
      as `functools.partial(nn.BatchNorm, use_running_average=False)`; None: none.
    last_normalizer: likewise, of one behind the branch's last layer; None: none, and in
      blocks of version 1 `normalizer`.
    branch_scale: factory of the module that multiplies the branch by alpha, such as
      `SkipInit`; None: alpha is one. See `layers.scaled`.
    sum_scale: a constant factor on the sum of shortcut and branch.
    use_bias: whether the layers have biases.
    dtype: dtype of the computation; None: that of input and parameters.
    param_dtype: dtype of the parameters.
  """

  normalizer: ModuleFactory | None = None
  last_normalizer: ModuleFactory | None = None
  branch_scale: ModuleFactory | None = None
  sum_scale: float = 1.0
  use_bias: bool = False
  dtype: jax.typing.DTypeLike | None = None
  param_dtype: jax.typing.DTypeLike = jnp.float32

  def __post_init__(self) -> None:
    for name in ("normalizer", "last_normalizer", "branch_scale"):
      require_linen(name, getattr(self, name))
    super().__post_init__()

  def normalize(self, x: jax.Array, name: str) -> jax.Array:
    """Returns x behind a normalizer of this name; without normalization, x."""
    return self.normalizer(name=name)(x) if self.normalizer is not None else x

  def scale(
    self,
    layer: Any,
    x: jax.Array,
    normalizer: ModuleFactory | None = None,
    name: str = "last_norm",
  ) -> jax.Array:
    """Returns alpha times what the branch's last layer makes of x, normalized.

    Args:
      normalizer: of the layer's output, where there is no `last_normalizer`.
      name: the name of either.
    """
    normalizer = self.last_normalizer or normalizer
    if normalizer is not None:
      x, layer = layer(x), normalizer(name=name)
    alpha = self.branch_scale(name="branch_scale") if self.branch_scale else None
    return scaled(alpha, layer, x)

  @nn.nowrap
  def _layer(
    self,
    factory: ModuleFactory,
    features: int,
    kernel_init: Initializer,
    name: str,
    *window: Any,
  ) -> Any:
    """Returns a convolution, with the size and strides of its window, or dense."""
    return factory(
      features,
      *window,
      use_bias=self.use_bias,
      kernel_init=kernel_init,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name=name,
    )

  def merge(self, shortcut: jax.Array, branch: jax.Array) -> jax.Array:
    """Returns the block's sum, where stochastic depth leaves the branch in.

    `analysis.measure` reads both terms here.
    """
    total = (shortcut + drop_here(branch)) * self.sum_scale
    # A normalizer that knows no dtype may have widened it, which a scan forbids.
    return total if self.dtype is None else total.astype(self.dtype)

  @nn.nowrap
  def require_features(self, x: jax.Array, features: int) -> None:
    """Raises a UsageError unless x has the features that the block returns."""
    if x.shape[-1] != features:
      raise UsageError(
        f"{type(self).__name__} has {features} features, but its input has "
        f"{x.shape[-1]}: they must be the same."
      )


class ActivatedBlock(ResidualBlock, kw_only=True):
  """What blocks share in which an activation precedes each layer but the first.

  Attributes:
    activation: the activation function.
    kernel_init: initializer of the branch's layers.
    last_kernel_init: initializer of the branch's last layer; None: `kernel_init`.
    scalar_biases: whether Fixup's scalar biases stand before each layer and each
      activation and at the end of the branch.
  """

  activation: Activation = nn.relu
  kernel_init: Initializer = he_normal
  last_kernel_init: Initializer | None = None
  scalar_biases: bool = False

  def bias(self, x: jax.Array, name: str) -> jax.Array:
    """Returns x plus Fixup's scalar bias of this name; without such biases, x."""
    return ScalarBias(self.param_dtype, name=name)(x) if self.scalar_biases else x

  def activate(self, x: jax.Array, index: int) -> jax.Array:
    """Returns the input of layer `index`: normalized, activated and biased."""
    x = self.normalize(x, f"norm{index}")
    x = self.activation(self.bias(x, f"activation_bias{index}"))
    return self.bias(x, f"layer_bias{index}")

  def scale(
    self,
    layer: Any,
    x: jax.Array,
    normalizer: ModuleFactory | None = None,
    name: str = "last_norm",
  ) -> jax.Array:
    """Returns what `ResidualBlock.scale` does, plus the branch's bias."""
    return self.bias(super().scale(layer, x, normalizer, name), "branch_bias")


class ConvolutionalBlock(ActivatedBlock):
  """What blocks of convolutions share.

  Attributes:
    features: the features of the branch's layers; bottleneck blocks return four times
      as many.
    strides: strides of the block.
    conv: factory of convolutions, with the fields of `flax.linen.Conv`.
    projection_init: initializer of the shortcut's projection.
    average_projection: whether the projection takes the mean of the pixels that its
      strides would pass over, as timm's NF-ResNets do.
  """

  features: int
  strides: int = 1
  conv: ModuleFactory = Conv
  projection_init: Initializer = he_normal
  average_projection: bool = False

  @nn.nowrap
  def convolution(
    self, features: int, size: int, strides: int = 1, *, name: str, last: bool = False
  ) -> Any:
    """Returns one of the branch's convolutions."""
    init = (self.last_kernel_init if last else None) or self.kernel_init
    return self._layer(self.conv, features, init, name, (size, size), strides)

  @nn.nowrap
  def projects(self, x: jax.Array, features: int) -> bool:
    """Tells whether the block changes the shape of x, so that a shortcut projects."""
    return self.strides != 1 or x.shape[-1] != features

  def project(self, x: jax.Array, features: int) -> jax.Array:
    """Returns the shortcut's 1x1 convolution of x."""
    strides = self.strides
    if self.average_projection and strides != 1:
      # At the end of an odd size there are fewer.
      pads = [(0, -size % strides) for size in x.shape[1:3]]
      window = (strides, strides)
      x = nn.avg_pool(x, window, window, pads, count_include_pad=False)
      strides = 1
    y: jax.Array = self._layer(
      self.conv, features, self.projection_init, "projection", (1, 1), strides
    )(x)
    return y


class BasicBlock(ConvolutionalBlock):
  """Pre-activation block of two 3x3 convolutions (He et al., ECCV 2016).

  Where strides or features change, a projection of the activated input is the
  shortcut, as in Wide-ResNets (Zagoruyko & Komodakis, BMVC 2016).
  """

  @nn.compact
  def __call__(self, x: jax.Array, expected_std: Scalar | None = None) -> jax.Array:
    """Maps [N, H, W, C] to [N, H / strides, W / strides, features]."""
    y = self.activate(_divide(x, expected_std), 1)
    shortcut = x
    if self.projects(x, self.features):
      shortcut = self.project(y, self.features)
    y = self.convolution(self.features, 3, self.strides, name="conv1")(y)
    y = self.activate(y, 2)
    last = self.convolution(self.features, 3, name="conv2", last=True)
    return self.merge(shortcut, self.scale(last, y))


class BottleneckBlock(ConvolutionalBlock):
  """Pre-activation block of 1x1, 3x3 and 1x1 convolutions (He et al., ECCV 2016).

  Where strides or features change, a projection of the activated input is the
  shortcut.
  """

  @nn.compact
  def __call__(self, x: jax.Array, expected_std: Scalar | None = None) -> jax.Array:
    """Maps [N, H, W, C] to [N, H / strides, W / strides, 4 features]."""
    y = self.activate(_divide(x, expected_std), 1)
    shortcut = x
    if self.projects(x, 4 * self.features):
      shortcut = self.project(y, 4 * self.features)
    y = self.convolution(self.features, 1, name="conv1")(y)
    y = self.activate(y, 2)
    y = self.convolution(self.features, 3, self.strides, name="conv2")(y)
    y = self.activate(y, 3)
    last = self.convolution(4 * self.features, 1, name="conv3", last=True)
    return self.merge(shortcut, self.scale(last, y))


class PostActivationBottleneckBlock(ConvolutionalBlock):
  """Version-1 bottleneck block: the activation follows the sum.

  He et al. (CVPR 2016), with the stride on the 3x3 convolution. A normalizer
  follows each convolution and the projection. With scalar biases it is the block
  of Fixup's ResNet-50 (Zhang et al., 2019), where one bias on the input feeds
  both the branch and the projection.
  """

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [N, H, W, C] to [N, H / strides, W / strides, 4 features]."""
    y = self.bias(x, "layer_bias1")
    shortcut = x
    if self.projects(x, 4 * self.features):
      shortcut = self.normalize(self.project(y, 4 * self.features), "projection_norm")
    y = self.convolution(self.features, 1, name="conv1")(y)
    y = self.activate(y, 2)
    y = self.convolution(self.features, 3, self.strides, name="conv2")(y)
    y = self.activate(y, 3)
    last = self.convolution(4 * self.features, 1, name="conv3", last=True)
    branch = self.scale(last, y, self.normalizer, "norm4")
    return self.activation(self.merge(shortcut, branch))


class PostActivationBasicBlock(ConvolutionalBlock):
  """Version-1 block of two 3x3 convolutions: the activation follows the sum.

  He et al. (CVPR 2016), as the blocks of ResNet-18 and 34. Normalizers and scalar
  biases are as in `PostActivationBottleneckBlock`.
  """

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [N, H, W, C] to [N, H / strides, W / strides, features]."""
    y = self.bias(x, "layer_bias1")
    shortcut = x
    if self.projects(x, self.features):
      shortcut = self.normalize(self.project(y, self.features), "projection_norm")
    y = self.convolution(self.features, 3, self.strides, name="conv1")(y)
    y = self.activate(y, 2)
    last = self.convolution(self.features, 3, name="conv2", last=True)
    branch = self.scale(last, y, self.normalizer, "norm3")
    return self.activation(self.merge(shortcut, branch))


class FullyConnectedBlock(ActivatedBlock):
  """Pre-activation block of fully connected layers.

  Attributes:
    features: the features of the input and of every layer.
    num_layers: layers of the branch.
    dense: factory of the layers, with the fields of `flax.linen.Dense`.
  """

  features: int
  num_layers: int = 1
  dense: ModuleFactory = nn.Dense

  @nn.compact
  def __call__(self, x: jax.Array, expected_std: Scalar | None = None) -> jax.Array:
    """Maps [N, features] to [N, features].

    Raises:
      UsageError: the input has other features.
    """
    self.require_features(x, self.features)
    y = _divide(x, expected_std)
    for index in range(1, self.num_layers):
      y = self.layer(index)(self.activate(y, index))
    y = self.activate(y, self.num_layers)
    return self.merge(x, self.scale(self.layer(self.num_layers), y))

  @nn.nowrap
  def layer(self, index: int) -> Any:
    """Returns one of the branch's layers, counted from 1."""
    last = index == self.num_layers
    init = (self.last_kernel_init if last else None) or self.kernel_init
    return self._layer(self.dense, self.features, init, f"dense{index}")


def symmetric_conv(conv: ModuleFactory, *args: Any, **fields: Any) -> Any:
  """Returns a convolution of these arguments that pads both sides alike."""
  (kernel_size,) = (each for each in args if isinstance(each, tuple))
  padding = [(size // 2, size // 2) for size in kernel_size]
  return conv(*args, padding=padding, **fields)


def _divide(x: jax.Array, expected_std: Scalar | None) -> jax.Array:
  return x if expected_std is None else (x / expected_std).astype(x.dtype)
