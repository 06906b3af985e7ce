"""Residual blocks for NNX.

    block = BasicBlock(16, 32, strides=2, normalizer=nnx.BatchNorm, rngs=nnx.Rngs(0))
    block = BasicBlock(16, 16, branch_scale=SkipInit, rngs=nnx.Rngs(0))

What a block computes is written once, in `skipinit_jax.models`: a block here owns its
layers, as NNX wants it, and calls them by the equation of its Linen twin. Names of
variables are the same, so that `from_linen` and `to_linen` need no table.

The fields of the twins are keyword arguments here. A factory makes NNX modules:
`normalizer(num_features, rngs=rngs)`, `branch_scale(rngs=rngs)` (with `num_features`
where it accepts that), `conv` and `dense` with the arguments of `nnx.Conv` and
`nnx.Linear`. Factories of Linen modules that have a twin in NNX will do, too.
"""

import abc
import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from skipinit_jax import models
from skipinit_jax.errors import UsageError
from skipinit_jax.layers import he_normal
from skipinit_jax.methods import Activation, ModuleFactory, bind
from skipinit_jax.models.blocks import Scalar
from skipinit_jax.nnx.depth import drop_here
from skipinit_jax.nnx.factories import nnx_factory
from skipinit_jax.nnx.layers import Conv, ScalarBias, scaled

Initializer = jax.nn.initializers.Initializer
Layer = Callable[[jax.Array], jax.Array]
_lecun_normal: Initializer = nn.initializers.lecun_normal()


def _equation(method: Any) -> Callable[..., Any]:
  """Returns a method of a Linen module as the plain function that its class states."""
  return inspect.unwrap(method)


class ResidualBlock(nnx.Module):
  """What all residual blocks share: see `models.ResidualBlock`.

  Attributes:
    twin: the Linen block whose equation this one computes.
  """

  twin: ClassVar[type[models.ResidualBlock]]

  def __init__(
    self,
    *,
    normalizer: ModuleFactory | None = None,
    last_normalizer: ModuleFactory | None = None,
    branch_scale: ModuleFactory | None = None,
    sum_scale: float = 1.0,
    use_bias: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
  ) -> None:
    """Keeps what the block's layers are made of; see `models.ResidualBlock`."""
    self.normalizer = nnx_factory("normalizer", normalizer)
    self._last_normalizer = nnx_factory("last_normalizer", last_normalizer)
    self._branch_scale = nnx_factory("branch_scale", branch_scale)
    self.sum_scale = sum_scale
    self.use_bias = use_bias
    self.dtype = dtype
    self.param_dtype = param_dtype

  def __call__(self, x: jax.Array, *per_block: Scalar) -> jax.Array:
    """Returns the block's sum of shortcut and branch.

    Args:
      x: features, channels last.
      *per_block: `expected_std`, in blocks with an activation before each layer.
    """
    y: jax.Array = _equation(self.twin.__call__)(self, x, *per_block)
    return y

  def merge(self, shortcut: jax.Array, branch: jax.Array) -> jax.Array:
    """Returns the block's sum. `analysis.measure` reads both terms here."""
    y: jax.Array = _equation(models.ResidualBlock.merge)(
      self, shortcut, drop_here(branch)
    )
    return y

  require_features = _equation(models.ResidualBlock.require_features)

  def normalize(self, x: jax.Array, name: str) -> jax.Array:
    """Returns x behind the normalizer of this name; without normalization, x."""
    return self._through(name, x)

  def scale(
    self, layer: Layer, x: jax.Array, normalizer: Any = None, name: str = "last_norm"
  ) -> jax.Array:
    """Returns alpha times what the branch's last layer makes of x, normalized.

    Args:
      name: of the normalizer of the layer's output, where there is one.
    """
    del normalizer
    if (norm := getattr(self, name, None)) is not None:
      x, layer = layer(x), norm
    return scaled(getattr(self, "branch_scale", None), layer, x)

  def _through(self, name: str, x: jax.Array) -> jax.Array:
    """Returns what the child of this name makes of x; x, if there is none."""
    child = getattr(self, name, None)
    return x if child is None else child(x)

  def _add_norm(self, name: str, features: int, rngs: nnx.Rngs) -> None:
    if self.normalizer is not None:
      setattr(self, name, self.normalizer(features, rngs=rngs))

  def _add_scale(
    self,
    features: int,
    rngs: nnx.Rngs,
    normalizer: ModuleFactory | None = None,
    name: str = "last_norm",
  ) -> None:
    """Adds what `scale` needs, with the same last arguments."""
    if (make := self._last_normalizer or normalizer) is not None:
      setattr(self, name, make(features, rngs=rngs))
    if self._branch_scale is not None:
      accepted = {"num_features": features, "rngs": rngs}
      self.branch_scale = bind(self._branch_scale, accepted)()


class ActivatedBlock(ResidualBlock):
  """What blocks share in which an activation precedes each layer but the first.

  See `models.ActivatedBlock`.
  """

  def __init__(
    self,
    *,
    activation: Activation = jax.nn.relu,
    kernel_init: Initializer = he_normal,
    last_kernel_init: Initializer | None = None,
    scalar_biases: bool = False,
    **fields: Any,
  ) -> None:
    """Keeps what the block's layers are made of; see `models.ActivatedBlock`."""
    super().__init__(**fields)
    self.activation = activation
    self.kernel_init = kernel_init
    self.last_kernel_init = last_kernel_init
    self.scalar_biases = scalar_biases

  activate = _equation(models.ActivatedBlock.activate)

  def bias(self, x: jax.Array, name: str) -> jax.Array:
    """Returns x plus Fixup's scalar bias of this name; without such biases, x."""
    return self._through(name, x)

  def scale(
    self, layer: Layer, x: jax.Array, normalizer: Any = None, name: str = "last_norm"
  ) -> jax.Array:
    """Returns what `ResidualBlock.scale` does, plus the branch's bias."""
    return self.bias(super().scale(layer, x, normalizer, name), "branch_bias")

  def _init(self, last: bool) -> Initializer:
    return (self.last_kernel_init if last else None) or self.kernel_init

  def _add_bias(self, name: str) -> None:
    if self.scalar_biases:
      setattr(self, name, ScalarBias(param_dtype=self.param_dtype))

  def _add_activation(self, index: int, features: int, rngs: nnx.Rngs) -> None:
    """Adds what `activate` needs before layer `index`."""
    self._add_norm(f"norm{index}", features, rngs)
    self._add_bias(f"activation_bias{index}")
    self._add_bias(f"layer_bias{index}")

  def _add_scale(
    self,
    features: int,
    rngs: nnx.Rngs,
    normalizer: ModuleFactory | None = None,
    name: str = "last_norm",
  ) -> None:
    super()._add_scale(features, rngs, normalizer, name)
    self._add_bias("branch_bias")


class ConvolutionalBlock(ActivatedBlock):
  """What blocks of convolutions share: see `models.ConvolutionalBlock`.

  Attributes:
    expansion: the features that the block returns over those of its inner layers.
  """

  twin: ClassVar[type[models.ConvolutionalBlock]]
  expansion: ClassVar[int] = 1

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    strides: int = 1,
    conv: ModuleFactory = Conv,
    projection_init: Initializer = he_normal,
    rngs: nnx.Rngs,
    **fields: Any,
  ) -> None:
    """Makes the block's layers.

    Args:
      in_features: channels of the input.
      out_features: channels of the result; a bottleneck's must be a multiple of four.
      strides: strides of the block.
      conv: factory of convolutions, with the arguments of `flax.nnx.Conv`.
      projection_init: initializer of the shortcut's projection.
      rngs: the layers' random numbers.
      **fields: `normalizer`, `branch_scale`, `activation`, `use_bias` and the other
        fields of the Linen block.

    Raises:
      UsageError: a factory makes no NNX modules, or the features do not divide.
    """
    super().__init__(**fields)
    if out_features < 1 or out_features % self.expansion:
      raise UsageError(
        f"out_features is {out_features}: for a {type(self).__name__} it must be a "
        f"positive multiple of {self.expansion}."
      )
    self.in_features = in_features
    self.features = out_features // self.expansion
    self.strides = strides
    self._conv = nnx_factory("conv", conv)
    self.projection_init = projection_init
    if strides != 1 or in_features != out_features:
      self._add_conv("projection", in_features, out_features, 1, strides, rngs=rngs)
    self._add_layers(in_features, out_features, rngs)

  projects = _equation(models.ConvolutionalBlock.projects)

  def project(self, x: jax.Array, features: int) -> jax.Array:
    """Returns the shortcut's 1x1 convolution of x."""
    del features
    return self._through("projection", x)

  def convolution(
    self, features: int, size: int, strides: int = 1, *, name: str, last: bool = False
  ) -> Layer:
    """Returns one of the branch's convolutions."""
    del features, size, strides, last
    layer: Layer = getattr(self, name)
    return layer

  @abc.abstractmethod
  def _add_layers(self, in_features: int, out_features: int, rngs: nnx.Rngs) -> None:
    """Adds the layers of the branch."""

  def _add_conv(
    self,
    name: str,
    in_features: int,
    out_features: int,
    size: int,
    strides: int = 1,
    *,
    last: bool = False,
    rngs: nnx.Rngs,
  ) -> None:
    conv: Any = self._conv
    is_projection = name == "projection"
    layer = conv(
      in_features,
      out_features,
      (size, size),
      strides,
      use_bias=self.use_bias,
      kernel_init=self.projection_init if is_projection else self._init(last),
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      rngs=rngs,
    )
    setattr(self, name, layer)


class BasicBlock(ConvolutionalBlock):
  """Pre-activation block of two 3x3 convolutions: see `models.BasicBlock`.

  Its layers are `norm1`, `conv1`, `norm2`, `conv2`, `branch_scale` and `projection`.
  """

  twin = models.BasicBlock

  def _add_layers(self, in_features: int, out_features: int, rngs: nnx.Rngs) -> None:
    self._add_activation(1, in_features, rngs)
    self._add_conv("conv1", in_features, out_features, 3, self.strides, rngs=rngs)
    self._add_activation(2, out_features, rngs)
    self._add_conv("conv2", out_features, out_features, 3, last=True, rngs=rngs)
    self._add_scale(out_features, rngs)


class BottleneckBlock(ConvolutionalBlock):
  """Pre-activation block of 1x1, 3x3 and 1x1 convolutions.

  See `models.BottleneckBlock`. The inner layers have a quarter of `out_features`.
  """

  twin = models.BottleneckBlock
  expansion = 4

  def _add_layers(self, in_features: int, out_features: int, rngs: nnx.Rngs) -> None:
    self._add_activation(1, in_features, rngs)
    self._add_conv("conv1", in_features, self.features, 1, rngs=rngs)
    self._add_activation(2, self.features, rngs)
    self._add_conv("conv2", self.features, self.features, 3, self.strides, rngs=rngs)
    self._add_activation(3, self.features, rngs)
    self._add_conv("conv3", self.features, out_features, 1, last=True, rngs=rngs)
    self._add_scale(out_features, rngs)


class PostActivationBottleneckBlock(ConvolutionalBlock):
  """Version-1 bottleneck block: see `models.PostActivationBottleneckBlock`.

  The inner layers have a quarter of `out_features`.
  """

  twin = models.PostActivationBottleneckBlock
  expansion = 4

  def _add_layers(self, in_features: int, out_features: int, rngs: nnx.Rngs) -> None:
    if hasattr(self, "projection"):
      self._add_norm("projection_norm", out_features, rngs)
    self._add_bias("layer_bias1")
    self._add_conv("conv1", in_features, self.features, 1, rngs=rngs)
    self._add_activation(2, self.features, rngs)
    self._add_conv("conv2", self.features, self.features, 3, self.strides, rngs=rngs)
    self._add_activation(3, self.features, rngs)
    self._add_conv("conv3", self.features, out_features, 1, last=True, rngs=rngs)
    self._add_scale(out_features, rngs, self.normalizer, "norm4")


class PostActivationBasicBlock(ConvolutionalBlock):
  """Version-1 block of two 3x3 convolutions: see `models.PostActivationBasicBlock`."""

  twin = models.PostActivationBasicBlock

  def _add_layers(self, in_features: int, out_features: int, rngs: nnx.Rngs) -> None:
    if hasattr(self, "projection"):
      self._add_norm("projection_norm", out_features, rngs)
    self._add_bias("layer_bias1")
    self._add_conv("conv1", in_features, out_features, 3, self.strides, rngs=rngs)
    self._add_activation(2, out_features, rngs)
    self._add_conv("conv2", out_features, out_features, 3, last=True, rngs=rngs)
    self._add_scale(out_features, rngs, self.normalizer, "norm3")


class FullyConnectedBlock(ActivatedBlock):
  """Pre-activation block of fully connected layers: see `models.FullyConnectedBlock`.

  Its layers are `norm1`, `dense1`, ... and `branch_scale`.
  """

  twin = models.FullyConnectedBlock

  def __init__(
    self,
    features: int,
    *,
    num_layers: int = 1,
    dense: ModuleFactory = nnx.Linear,
    rngs: nnx.Rngs,
    **fields: Any,
  ) -> None:
    """Makes the block's layers.

    Args:
      features: the features of the input and of every layer.
      num_layers: layers of the branch.
      dense: factory of the layers, with the arguments of `flax.nnx.Linear`.
      rngs: the layers' random numbers.
      **fields: as in `BasicBlock`.

    Raises:
      UsageError: a factory makes no NNX modules.
    """
    super().__init__(**fields)
    self.features = features
    self.num_layers = num_layers
    make: Any = nnx_factory("dense", dense)
    for index in range(1, num_layers + 1):
      self._add_activation(index, features, rngs)
      layer = make(
        features,
        features,
        use_bias=self.use_bias,
        kernel_init=self._init(last=index == num_layers),
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        rngs=rngs,
      )
      setattr(self, f"dense{index}", layer)
    self._add_scale(features, rngs)

  def layer(self, index: int) -> Layer:
    """Returns one of the branch's layers, counted from 1."""
    layer: Layer = getattr(self, f"dense{index}")
    return layer


class AttentionBlock(ResidualBlock):
  """Residual block of multi-head self-attention: see `models.AttentionBlock`.

  Its layers are `norm1`, `attention` and `branch_scale`.
  """

  twin = models.AttentionBlock

  def __init__(
    self,
    features: int,
    *,
    num_heads: int = 1,
    kernel_init: Initializer = _lecun_normal,
    last_kernel_init: Initializer | None = None,
    rngs: nnx.Rngs,
    **fields: Any,
  ) -> None:
    """Makes the block's layers.

    Args:
      features: the features of a token, which stay.
      num_heads: heads, which must divide the features.
      kernel_init: initializer of the layers; the default has variance 1 / fan-in.
      last_kernel_init: initializer of the last layer; None: `kernel_init`.
      rngs: the layers' random numbers.
      **fields: `normalizer`, `branch_scale`, `use_bias` and the other fields of
        `ResidualBlock`.

    Raises:
      UsageError: a factory makes no NNX modules, or the heads do not divide.
    """
    super().__init__(**fields)
    if num_heads < 1 or features % num_heads:
      raise UsageError(
        f"num_heads is {num_heads}: it must divide the features, {features}."
      )
    self.features = features
    self._add_norm("norm1", features, rngs)
    self.attention = nnx.MultiHeadAttention(
      num_heads,
      features,
      use_bias=self.use_bias,
      kernel_init=kernel_init,
      out_kernel_init=last_kernel_init,
      attention_fn=_attend,
      decode=False,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      rngs=rngs,
    )
    self._add_scale(features, rngs)

  def layer(self, x: jax.Array) -> Layer:
    """Returns the attention."""
    del x
    layer: Layer = self.attention
    return layer


class MLPBlock(ResidualBlock):
  """Residual block of two dense layers applied to each token: see `models.MLPBlock`.

  Its layers are `norm1`, `dense1`, `dense2` and `branch_scale`.
  """

  twin = models.MLPBlock

  def __init__(
    self,
    features: int,
    *,
    activation: Activation = jax.nn.relu,
    kernel_init: Initializer = _lecun_normal,
    last_kernel_init: Initializer = he_normal,
    rngs: nnx.Rngs,
    **fields: Any,
  ) -> None:
    """Makes the block's layers.

    Args:
      features: the features of a token, which stay; the hidden layer has four times
        as many.
      activation: the activation function between the layers.
      kernel_init: initializer of the first layer; the default has variance 1 / fan-in.
      last_kernel_init: initializer of the second layer, which follows the activation.
      rngs: the layers' random numbers.
      **fields: as in `AttentionBlock`.

    Raises:
      UsageError: a factory makes no NNX modules.
    """
    super().__init__(**fields)
    self.features = features
    self.activation = activation
    linear = functools.partial(
      nnx.Linear,
      use_bias=self.use_bias,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      rngs=rngs,
    )
    self._add_norm("norm1", features, rngs)
    self.dense1 = linear(features, 4 * features, kernel_init=kernel_init)
    self.dense2 = linear(4 * features, features, kernel_init=last_kernel_init)
    self._add_scale(features, rngs)

  def layer(self, index: int) -> Layer:
    """Returns one of the two layers, counted from 1."""
    layer: Layer = self.dense1 if index == 1 else self.dense2
    return layer


def _attend(
  query: jax.Array, *args: Any, is_causal: bool = False, **options: Any
) -> jax.Array:
  """Linen's attention, because NNX's sums weights of many tokens in bfloat16."""
  del is_causal
  wide = jnp.promote_types(query.dtype, jnp.float32)
  options["force_fp32_for_softmax"] = wide == jnp.float32
  return nn.dot_product_attention(query, *args, **options)
