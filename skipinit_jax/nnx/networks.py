"""Residual networks for NNX: those of `skipinit_jax.models`, on the same methods."""

import functools
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from skipinit_jax import methods, models
from skipinit_jax.methods import Method, ModuleFactory, bind_normalizer
from skipinit_jax.models.blocks import symmetric_conv
from skipinit_jax.models.depth import apply_block, of_block
from skipinit_jax.models.head import Head as LinenHead
from skipinit_jax.models.head import mean_over_positions
from skipinit_jax.models.stochastic_depth import split_drops
from skipinit_jax.nnx.blocks import (
  BasicBlock,
  BottleneckBlock,
  ConvolutionalBlock,
  PostActivationBasicBlock,
  PostActivationBottleneckBlock,
)
from skipinit_jax.nnx.depth import DepthStack
from skipinit_jax.nnx.factories import nnx_factory
from skipinit_jax.nnx.layers import ScalarBias

DType = jax.typing.DTypeLike
Initializer = jax.nn.initializers.Initializer
_BLOCKS: dict[Any, type[ConvolutionalBlock]] = {
  block.twin: block
  for block in (
    BasicBlock,
    BottleneckBlock,
    PostActivationBasicBlock,
    PostActivationBottleneckBlock,
  )
}


class _Fields(TypedDict, total=False):
  scan: bool
  remat: bool
  symmetric_padding: bool
  dtype: DType
  param_dtype: DType


class _ResNetFields(_Fields, total=False):
  version: int | None
  symmetric_stem: bool
  average_projection: bool


class _Parts(nnx.Module):
  """A module of which some children are there with some methods only."""

  def _through(self, names: str, x: jax.Array) -> jax.Array:
    """Returns what the children of these names, where there are such, make of x."""
    for name in names.split():
      if (child := getattr(self, name, None)) is not None:
        x = child(x)
    return x

  def _add_norm(
    self,
    name: str,
    factory: ModuleFactory | None,
    features: int,
    dtypes: dict[str, Any],
    rngs: nnx.Rngs,
  ) -> None:
    bound = bind_normalizer(factory, train=True, **dtypes)
    if (make := nnx_factory("normalizer", bound)) is not None:
      setattr(self, name, make(features, rngs=rngs))


class Head(_Parts):
  """From the last block's features to logits: see `models.head.Head`."""

  def __init__(
    self,
    in_features: int,
    num_classes: int,
    method: Method,
    *,
    preactivation: bool = True,
    classifier_init: Initializer = LinenHead.classifier_init,
    dtype: DType = jnp.float32,
    param_dtype: DType = jnp.float32,
    rngs: nnx.Rngs,
  ) -> None:
    normalizer = method.output_normalizer
    if preactivation:
      normalizer = normalizer or method.normalizer
      self.activation = method.activation
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}
    self._add_norm("norm", normalizer, in_features, dtypes, rngs)
    if method.scalar_biases:
      if preactivation:
        self.activation_bias = ScalarBias(param_dtype=param_dtype)
      self.classifier_bias = ScalarBias(param_dtype=param_dtype)
    if method.dropout_rate:
      self.dropout = nnx.Dropout(method.dropout_rate, rngs=rngs)
    self.classifier = nnx.Linear(
      in_features,
      num_classes,
      kernel_init=method.classifier_init or classifier_init,
      dtype=jnp.promote_types(dtype, jnp.float32),
      param_dtype=param_dtype,
      rngs=rngs,
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [N, ..., C] to logits, [N, num_classes] in float32 at least."""
    x = self._through("norm activation_bias activation", x)
    return self._through("dropout classifier_bias classifier", mean_over_positions(x))


class _ConvolutionalNetwork(_Parts):
  """A stem, stages of blocks, and a head."""

  def __init__(
    self,
    twin: models.WideResNet | models.ResNet,
    in_features: int,
    stem: tuple[int, int, int],
    *,
    preactivation: bool = True,
    rngs: nnx.Rngs,
    **head: Any,
  ) -> None:
    """Makes the layers.

    Args:
      twin: the Linen network, whose plan of stages this one has.
      in_features: channels of the images.
      stem: features, size and strides of the first convolution.
      **head: further arguments of the head.
    """
    method, stages = methods.get(twin.method), twin.stages()
    block = _BLOCKS[stages.block]
    dtypes: dict[str, Any] = {"dtype": twin.dtype, "param_dtype": twin.param_dtype}
    conv: Any = nnx_factory("conv", method.conv)
    symmetric = functools.partial(symmetric_conv, conv)
    if twin.symmetric_padding:
      conv = symmetric
    features, size, strides = stem
    self.stem = (symmetric if getattr(twin, "symmetric_stem", False) else conv)(
      in_features,
      features,
      (size, size),
      strides,
      use_bias=method.stem_bias,
      kernel_init=method.kernel_init,
      **dtypes,
      rngs=rngs,
    )
    if not preactivation:
      self._add_norm("stem_norm", method.normalizer, features, dtypes, rngs)
      if method.scalar_biases:
        self.stem_bias = ScalarBias(param_dtype=twin.param_dtype)
      self.stem_activation = method.activation

    make = functools.partial(
      block,
      conv=conv,
      projection_init=method.kernel_init,
      average_projection=getattr(twin, "average_projection", False),
      **method.activated_block_fields(
        num_blocks=sum(stages.num_blocks),
        branch_layers=stages.branch_layers,
        train=True,
        **dtypes,
      ),
    )
    sizes = zip(stages.features, stages.num_blocks, stages.strides, strict=True)
    for stage, (width, length, stride) in enumerate(sizes, start=1):
      width *= block.expansion
      first = make(features, width, strides=stride, rngs=rngs)
      rest = DepthStack(
        functools.partial(make, width, width),
        length - 1,
        scan=twin.scan,
        remat=twin.remat,
        rngs=rngs,
      )
      setattr(self, f"stage{stage}_first", first)
      setattr(self, f"stage{stage}_rest", rest)
      features = width
    self.stage_blocks = tuple(stages.num_blocks)
    self.expected_stds = tuple(
      None if stds is None else tuple(map(float, stds))
      for stds in method.expected_stds(stages.num_blocks)
    )
    self.drop_path = method.drop_path
    self.deterministic = False
    self.drop_rngs = rngs.dropout.fork() if method.drop_path else None
    self.head = Head(
      features,
      twin.num_classes,
      method,
      preactivation=preactivation,
      **dtypes,
      rngs=rngs,
      **head,
    )

  def _stages(self, x: jax.Array) -> jax.Array:
    drops: Any = [None] * len(self.stage_blocks)
    if self.drop_rngs is not None and not self.deterministic:
      drops = split_drops(self.drop_rngs(), self.drop_path, self.stage_blocks)
    parts = zip(self.expected_stds, drops, strict=True)
    for stage, (stds, drop) in enumerate(parts, start=1):
      own = (None if stds is None else np.asarray(stds, np.float32), drop)
      x = apply_block(getattr(self, f"stage{stage}_first"), x, of_block(own, 0))
      rest = of_block(own, slice(1, None))
      x = getattr(self, f"stage{stage}_rest")(x, *rest)
    return x


class WideResNet(_ConvolutionalNetwork):
  """Wide-ResNet of pre-activation basic blocks: see `models.WideResNet`.

  `train()` and `eval()` switch normalizers, dropout and stochastic depth; a new network
  is in training.
  """

  def __init__(
    self,
    depth: int,
    width: int,
    num_classes: int,
    method: Method | str,
    *,
    in_features: int = 3,
    rngs: nnx.Rngs,
    **fields: Unpack[_Fields],
  ) -> None:
    """Makes the network.

    Args:
      depth: 6 n + 4 layers.
      width: factor on the features.
      num_classes: number of logits.
      method: what keeps the network trainable, or its name; see `skipinit_jax.methods`.
      in_features: channels of the images.
      rngs: the random numbers of layers and dropout.
      **fields: `scan`, `remat`, `symmetric_padding`, `dtype` and `param_dtype`, as in
        `models.WideResNet`.

    Raises:
      UsageError: as `models.WideResNet`, or the method has factories of Linen modules
        that have no twin in NNX.
    """
    twin = models.WideResNet(depth, width, num_classes, method, **fields)
    super().__init__(twin, in_features, (16, 3, 1), rngs=rngs)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images [N, H, W, C] to logits [N, num_classes], float32."""
    return self.head(self._stages(self.stem(images)))


class ResNet(_ConvolutionalNetwork):
  """ResNet-18, 34, 50, 101, 152 or 200: see `models.ResNet`.

  Modes are those of `WideResNet`.
  """

  def __init__(
    self,
    depth: int,
    num_classes: int,
    method: Method | str,
    *,
    in_features: int = 3,
    rngs: nnx.Rngs,
    **fields: Unpack[_ResNetFields],
  ) -> None:
    """Makes the network.

    Args:
      depth: 18, 34, 50, 101, 152 or 200.
      num_classes: number of logits.
      method: what keeps the network trainable, or its name; see `skipinit_jax.methods`.
      in_features: channels of the images.
      rngs: the random numbers of layers and dropout.
      **fields: `version`, `scan`, `remat`, `symmetric_padding`, `symmetric_stem`,
        `average_projection`, `dtype` and `param_dtype`, as in `models.ResNet`.

    Raises:
      UsageError: as `models.ResNet`, or the method has factories of Linen modules that
        have no twin in NNX.
    """
    twin = models.ResNet(depth, num_classes, method, **fields)
    super().__init__(
      twin,
      in_features,
      (64, 7, 2),
      preactivation=twin.version == 2,
      classifier_init=nn.initializers.zeros,
      rngs=rngs,
    )
    self.pool_padding = ((1, 1), (1, 1)) if twin.symmetric_padding else "SAME"

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images [N, H, W, C] to logits [N, num_classes], float32."""
    x = self._through("stem stem_norm stem_bias stem_activation", images)
    x = nnx.max_pool(x, (3, 3), (2, 2), padding=self.pool_padding)
    return self.head(self._stages(x))
