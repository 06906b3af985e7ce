"""Residual blocks for NNX.

    block = BasicBlock(16, 32, strides=2, normalizer=nnx.BatchNorm, rngs=nnx.Rngs(0))
    block = BasicBlock(16, 16, branch_scale=SkipInit, rngs=nnx.Rngs(0))

What a block computes is written once, in `skipinit_jax.models`: a block here owns its
layers, as NNX wants it, and calls them by the equation of its Linen twin. To make the
layers it runs that equation once, on blank features: each layer that is asked for is
then made, and not applied. Names of variables are the same, so that `from_linen` and
`to_linen` need no table.

The fields of the twins are keyword arguments here. A factory makes NNX modules:
`normalizer(num_features, rngs=rngs)`, `branch_scale(rngs=rngs)` (with `num_features`
where it accepts that), `conv` and `dense` with the arguments of `nnx.Conv` and
`nnx.Linear`. Factories of Linen modules that have a twin in NNX will do, too.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from skipinit_jax import models
from skipinit_jax.errors import UsageError
from skipinit_jax.methods import Activation, ModuleFactory, bind
from skipinit_jax.models.blocks import Scalar
from skipinit_jax.nnx.factories import FACTORIES, nnx_factory
from skipinit_jax.nnx.layers import ScalarBias, scaled

Initializer = jax.nn.initializers.Initializer
Layer = Callable[[jax.Array], jax.Array]


def _equation(method: Any) -> Callable[..., Any]:
  """Returns a method of a Linen module as the plain function that its class states."""
  return inspect.unwrap(method)


class ResidualBlock(nnx.Module):
  """What all residual blocks share: see `models.ResidualBlock`.

  Attributes:
    twin: the Linen block whose fields and equation this one has.
  """

  twin: ClassVar[type[models.ResidualBlock]] = models.ResidualBlock
  normalizer: ModuleFactory | None
  last_normalizer: ModuleFactory | None
  sum_scale: float
  use_bias: bool
  dtype: jax.typing.DTypeLike | None
  param_dtype: jax.typing.DTypeLike
  _branch_scale: ModuleFactory | None
  # While the layers are made.
  _rngs: nnx.Rngs | None = None

  def __init__(self, **fields: Any) -> None:
    """Keeps what the block's layers are made of.

    Args:
      **fields: those of the twin; its defaults are those of what is left out.

    Raises:
      UsageError: a factory makes no NNX modules.
    """
    known: dict[str, Any] = {
      field.name: field.default
      for field in dataclasses.fields(self.twin)
      if field.name not in ("parent", "name")
    }
    for name in fields:
      if name not in known:
        raise TypeError(f"{type(self).__name__} takes no argument {name!r}.")
    for name, value in (known | fields).items():
      if name in FACTORIES:
        value = nnx_factory(name, value)
      # The module has this name.
      setattr(self, "_branch_scale" if name == "branch_scale" else name, value)

  def __call__(self, x: jax.Array, *per_block: Scalar) -> jax.Array:
    """Returns the block's sum of shortcut and branch.

    Args:
      x: features, channels last.
      *per_block: `expected_std`, in blocks with an activation before each layer.
    """
    y: jax.Array = _equation(self.twin.__call__)(self, x, *per_block)
    return y

  merge = _equation(models.ResidualBlock.merge)
  require_features = _equation(models.ResidualBlock.require_features)

  def normalize(self, x: jax.Array, name: str) -> jax.Array:
    """Returns x behind the normalizer of this name; without normalization, x."""
    if self.normalizer is None:
      return x
    return self._child(name, x.shape[-1], self.normalizer)(x)

  def scale(
    self,
    layer: Layer,
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
      x = layer(x)
      layer = self._child(name, x.shape[-1], normalizer)
    if self._rngs is None:
      y: jax.Array = scaled(getattr(self, "branch_scale", None), layer, x)
      return y
    y = layer(x)
    if self._branch_scale is not None:
      accepted = {"num_features": y.shape[-1], "rngs": self._rngs}
      self.branch_scale = bind(self._branch_scale, accepted)()
    return y

  def _child(self, name: str, features: int, make: Callable[..., Any]) -> Layer:
    """Returns the child of this name; while layers are made, what makes it.

    Args:
      features: of what the child returns.
      make: makes it, called as `make(features of its input, rngs=rngs)`.
    """
    if self._rngs is None:
      child: Layer = getattr(self, name)
      return child

    def make_child(x: jax.Array) -> jax.Array:
      if not hasattr(self, name):
        setattr(self, name, make(x.shape[-1], rngs=self._rngs))
      return jnp.zeros((*x.shape[:-1], features), x.dtype)

    return make_child

  def _layer(
    self,
    factory: ModuleFactory,
    features: int,
    kernel_init: Initializer,
    name: str,
    *window: Any,
  ) -> Layer:
    def make_layer(in_features: int, rngs: nnx.Rngs) -> Any:
      make: Any = nnx_factory("conv" if window else "dense", factory)
      return make(
        in_features,
        features,
        *window,
        use_bias=self.use_bias,
        kernel_init=kernel_init,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        rngs=rngs,
      )

    return self._child(name, features, make_layer)

  def _make_layers(self, x: jax.Array, rngs: nnx.Rngs) -> None:
    """Makes the layers that the equation has for such an input."""
    self._rngs = rngs
    ResidualBlock.__call__(self, x)
    del self._rngs


class ActivatedBlock(ResidualBlock):
  """What blocks share in which an activation precedes each layer but the first.

  See `models.ActivatedBlock`.
  """

  twin: ClassVar[type[models.ActivatedBlock]] = models.ActivatedBlock
  activation: Activation
  kernel_init: Initializer
  last_kernel_init: Initializer | None
  scalar_biases: bool

  activate = _equation(models.ActivatedBlock.activate)

  def bias(self, x: jax.Array, name: str) -> jax.Array:
    """Returns x plus Fixup's scalar bias of this name; without such biases, x."""
    if not self.scalar_biases:
      return x

    def make(features: int, rngs: nnx.Rngs) -> ScalarBias:
      return ScalarBias(param_dtype=self.param_dtype)

    return self._child(name, x.shape[-1], make)(x)

  def scale(
    self,
    layer: Layer,
    x: jax.Array,
    normalizer: ModuleFactory | None = None,
    name: str = "last_norm",
  ) -> jax.Array:
    """Returns what `ResidualBlock.scale` does, plus the branch's bias."""
    return self.bias(super().scale(layer, x, normalizer, name), "branch_bias")


class ConvolutionalBlock(ActivatedBlock):
  """What blocks of convolutions share: see `models.ConvolutionalBlock`.

  Attributes:
    expansion: the features that the block returns over those of its inner layers.
  """

  twin: ClassVar[type[models.ConvolutionalBlock]] = models.ConvolutionalBlock
  expansion: ClassVar[int] = 1

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    strides: int = 1,
    rngs: nnx.Rngs,
    **fields: Any,
  ) -> None:
    """Makes the block's layers.

    Args:
      in_features: channels of the input.
      out_features: channels of the result; a bottleneck's must be a multiple of four.
      strides: strides of the block.
      rngs: the layers' random numbers.
      **fields: `normalizer`, `branch_scale`, `activation`, `use_bias` and the other
        fields of the Linen block; `conv` is called with the arguments of
        `flax.nnx.Conv`.

    Raises:
      UsageError: a factory makes no NNX modules, or the features do not divide.
    """
    features = out_features // self.expansion
    super().__init__(features=features, strides=strides, **fields)
    if out_features < 1 or out_features % self.expansion:
      raise UsageError(
        f"out_features is {out_features}: for a {type(self).__name__} it must be a "
        f"positive multiple of {self.expansion}."
      )
    x = jnp.zeros((1, 1, 1, in_features))
    self._rngs = rngs
    # First, so that the others' random numbers are as they were.
    if self.projects(x, out_features):
      self.project(x, out_features)
    self._make_layers(x, rngs)

  projects = _equation(models.ConvolutionalBlock.projects)
  project = _equation(models.ConvolutionalBlock.project)
  convolution = _equation(models.ConvolutionalBlock.convolution)


class BasicBlock(ConvolutionalBlock):
  """Pre-activation block of two 3x3 convolutions: see `models.BasicBlock`.

  Its layers are `norm1`, `conv1`, `norm2`, `conv2`, `branch_scale` and `projection`.
  """

  twin = models.BasicBlock


class BottleneckBlock(ConvolutionalBlock):
  """Pre-activation block of 1x1, 3x3 and 1x1 convolutions.

  See `models.BottleneckBlock`. The inner layers have a quarter of `out_features`.
  """

  twin = models.BottleneckBlock
  expansion = 4


class PostActivationBottleneckBlock(ConvolutionalBlock):
  """Version-1 bottleneck block: see `models.PostActivationBottleneckBlock`.

  The inner layers have a quarter of `out_features`.
  """

  twin = models.PostActivationBottleneckBlock
  expansion = 4


class PostActivationBasicBlock(ConvolutionalBlock):
  """Version-1 block of two 3x3 convolutions: see `models.PostActivationBasicBlock`."""

  twin = models.PostActivationBasicBlock


class FullyConnectedBlock(ActivatedBlock):
  """Pre-activation block of fully connected layers: see `models.FullyConnectedBlock`.

  Its layers are `norm1`, `dense1`, ... and `branch_scale`.
  """

  twin = models.FullyConnectedBlock

  def __init__(self, features: int, *, rngs: nnx.Rngs, **fields: Any) -> None:
    """Makes the block's layers.

    Args:
      features: the features of the input and of every layer.
      rngs: the layers' random numbers.
      **fields: `num_layers` and the other fields of the Linen block; `dense` is called
        with the arguments of `flax.nnx.Linear`.

    Raises:
      UsageError: a factory makes no NNX modules.
    """
    super().__init__(features=features, **fields)
    self._make_layers(jnp.zeros((1, features)), rngs)

  layer = _equation(models.FullyConnectedBlock.layer)


class AttentionBlock(ResidualBlock):
  """Residual block of multi-head self-attention: see `models.AttentionBlock`.

  Its layers are `norm1`, `attention` and `branch_scale`.
  """

  twin = models.AttentionBlock
  num_heads: int
  kernel_init: Initializer
  last_kernel_init: Initializer | None

  def __init__(
    self, features: int, *, num_heads: int = 1, rngs: nnx.Rngs, **fields: Any
  ) -> None:
    """Makes the block's layers.

    Args:
      features: the features of a token, which stay.
      num_heads: heads, which must divide the features.
      rngs: the layers' random numbers.
      **fields: `normalizer`, `branch_scale`, `use_bias` and the other fields of the
        Linen block.

    Raises:
      UsageError: a factory makes no NNX modules, or the heads do not divide.
    """
    super().__init__(features=features, num_heads=num_heads, **fields)
    if num_heads < 1 or features % num_heads:
      raise UsageError(
        f"num_heads is {num_heads}: it must divide the features, {features}."
      )
    self._make_layers(jnp.zeros((1, 1, features)), rngs)

  def layer(self, x: jax.Array) -> Layer:
    """Returns the attention."""

    def make(in_features: int, rngs: nnx.Rngs) -> nnx.MultiHeadAttention:
      return nnx.MultiHeadAttention(
        self.num_heads,
        in_features,
        use_bias=self.use_bias,
        kernel_init=self.kernel_init,
        out_kernel_init=self.last_kernel_init,
        attention_fn=_attend,
        decode=False,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        rngs=rngs,
      )

    return self._child("attention", x.shape[-1], make)


class MLPBlock(ResidualBlock):
  """Residual block of two dense layers applied to each token: see `models.MLPBlock`.

  Its layers are `norm1`, `dense1`, `dense2` and `branch_scale`.
  """

  twin = models.MLPBlock

  def __init__(self, features: int, *, rngs: nnx.Rngs, **fields: Any) -> None:
    """Makes the block's layers.

    Args:
      features: the features of a token, which stay; the hidden layer has four times
        as many.
      rngs: the layers' random numbers.
      **fields: as in `AttentionBlock`.

    Raises:
      UsageError: a factory makes no NNX modules.
    """
    super().__init__(features=features, **fields)
    self._make_layers(jnp.zeros((1, 1, features)), rngs)

  layer = _equation(models.MLPBlock.layer)


def _attend(
  query: jax.Array, *args: Any, is_causal: bool = False, **options: Any
) -> jax.Array:
  """Linen's attention, because NNX's sums weights of many tokens in bfloat16."""
  del is_causal
  wide = jnp.promote_types(query.dtype, jnp.float32)
  options["force_fp32_for_softmax"] = wide == jnp.float32
  return nn.dot_product_attention(query, *args, **options)
