"""What the models share: a method turned into fields of blocks, and the head."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from skipinit_jax.errors import UsageError
from skipinit_jax.layers import (
  Conv,
  ScalarBias,
  WeightStandardizedConv,
  WeightStandardizedDense,
  fixup,
  he_normal,
  he_normal_fan_out,
  scaled_relu,
)
from skipinit_jax.methods import Method, ModuleFactory
from skipinit_jax.models.blocks import Activation


def require_positive(**values: int) -> None:
  """Raises a UsageError that names the first value below one."""
  for name, value in values.items():
    if value < 1:
      raise UsageError(f"{name} is {value}: it must be at least 1.")


def normalizer(
  method: Method,
  *,
  train: bool,
  dtype: jax.typing.DTypeLike,
  param_dtype: jax.typing.DTypeLike,
) -> ModuleFactory | None:
  """Returns the method's normalizer, bound to what it accepts of the arguments."""
  if method.normalizer is None:
    return None
  # LayerNorm and GroupNorm have no running average, a user's own may have no dtype.
  return _bind(
    method.normalizer,
    {"use_running_average": not train, "dtype": dtype, "param_dtype": param_dtype},
  )


def _bind(
  factory: ModuleFactory, available: Mapping[str, Any]
) -> functools.partial[Any]:
  """Binds what a factory accepts and a `functools.partial` does not set already."""
  parameters = inspect.signature(factory).parameters
  accepts_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
  bound = getattr(factory, "keywords", {})
  keywords = {
    name: value
    for name, value in available.items()
    if (name in parameters or accepts_any) and name not in bound
  }
  return functools.partial(factory, **keywords)


def branch_scale(
  method: Method, num_blocks: int, *, param_dtype: jax.typing.DTypeLike
) -> ModuleFactory | None:
  """Returns the factory of the module at the end of each branch; None: there is none.

  Args:
    method: the method.
    num_blocks: residual blocks of the whole network.
    param_dtype: dtype of the parameters.

  Raises:
    UsageError: alpha is to be constant, and the method's own module cannot keep it so.
  """
  alpha = method.initial_alpha(num_blocks)
  if alpha is None:
    return None
  factory = _bind(
    functools.partial(method.branch_scale, initial_value=alpha),
    {"learnable": method.learnable_alpha, "param_dtype": param_dtype},
  )
  if not method.learnable_alpha and "learnable" not in factory.keywords:
    raise UsageError(
      f"learnable_alpha is False, but the branch_scale of method {method.name!r} has "
      "no field `learnable`: give it one."
    )
  return factory


def kernel_init(method: Method) -> jax.nn.initializers.Initializer:
  """Returns the initializer of kernels outside of residual branches."""
  return he_normal_fan_out if method.initialization == "fixup" else he_normal


def conv(method: Method) -> ModuleFactory:
  """Returns the factory of convolutions."""
  return WeightStandardizedConv if method.weight_standardization else Conv


def dense(method: Method) -> ModuleFactory:
  """Returns the factory of dense layers but the classifier."""
  return WeightStandardizedDense if method.weight_standardization else nn.Dense


def activation(method: Method) -> Activation:
  """Returns the activation."""
  return scaled_relu if method.weight_standardization else nn.relu


def expected_stds(
  method: Method, stage_blocks: Sequence[int]
) -> list[np.ndarray] | list[None]:
  """Returns what the blocks' inputs are divided by, in one array for each stage.

  Args:
    method: the method.
    stage_blocks: the blocks of each stage. The first block of a stage is a transition;
      where the network's first block is none, that makes no difference.

  Returns:
    Of each stage, the expected standard deviations, [blocks]; None for each stage if
    the method divides by none.
  """
  if not method.divide_by_expected_std:
    return [None] * len(stage_blocks)
  transitions = [block == 0 for blocks in stage_blocks for block in range(blocks)]
  stds = np.sqrt(method.expected_variances(transitions))
  return np.split(stds, np.cumsum(stage_blocks)[:-1])


def require_preactivation(method: Method, network: str) -> None:
  """Raises a UsageError for a method that is defined for pre-activation blocks only.

  Args:
    method: the method.
    network: the network that has other blocks, in words.
  """
  if method.weight_standardization or method.divide_by_expected_std:
    raise UsageError(
      f"Method {method.name!r} is not defined for {network}: weight standardization "
      "and division by the expected standard deviation need pre-activation blocks of "
      "convolutions or dense layers."
    )


def block_fields(
  method: Method,
  *,
  num_blocks: int,
  branch_layers: int,
  train: bool,
  dtype: jax.typing.DTypeLike,
  param_dtype: jax.typing.DTypeLike,
) -> dict[str, Any]:
  """Returns the fields of a method's residual blocks.

  Args:
    method: the method.
    num_blocks: residual blocks of the whole network.
    branch_layers: layers of one residual branch.
    train: whether normalizers use the statistics of the batch.
    dtype: dtype of the computation.
    param_dtype: dtype of the parameters.

  Returns:
    Keyword arguments of `models.blocks.ResidualBlock`.
  """
  fields: dict[str, Any] = {
    "sum_scale": method.sum_scale,
    "scalar_biases": method.scalar_biases,
    "use_bias": method.use_bias,
    "projection_init": kernel_init(method),
    "activation": activation(method),
    "dtype": dtype,
    "param_dtype": param_dtype,
  }
  if not method.output_normalizer_only:
    fields["normalizer"] = normalizer(
      method, train=train, dtype=dtype, param_dtype=param_dtype
    )
  fields["branch_scale"] = branch_scale(method, num_blocks, param_dtype=param_dtype)
  if method.initialization == "fixup":
    fields["last_kernel_init"] = nn.initializers.zeros
    if branch_layers > 1:
      fields["kernel_init"] = fixup(num_blocks, branch_layers)
  return fields


class Head(nn.Module):
  """From the last block's features to logits.

  Attributes:
    num_classes: number of logits.
    method: the method; it decides the output's normalizer, dropout and biases.
    preactivation: whether the features still need normalization and activation.
    classifier_init: initializer of the classifier; Fixup's is zero in any case. The
      default keeps the variance of the features; the paper does not name its own.
    dtype: dtype of the computation before the classifier.
    param_dtype: dtype of the parameters.
  """

  num_classes: int
  method: Method
  preactivation: bool = True
  classifier_init: jax.nn.initializers.Initializer = nn.initializers.lecun_normal()
  dtype: jax.typing.DTypeLike = jnp.float32
  param_dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps [N, ..., C] to logits, [N, num_classes] in float32 at least."""
    method = self.method
    if self.preactivation or method.output_normalizer_only:
      norm = normalizer(
        method, train=train, dtype=self.dtype, param_dtype=self.param_dtype
      )
      x = x if norm is None else norm(name="norm")(x)
    if self.preactivation:
      if method.scalar_biases:
        x = ScalarBias(self.param_dtype, name="activation_bias")(x)
      x = activation(method)(x)
    # The mean over many positions, and the loss, need more than bfloat16's 8 bits.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x = x.astype(wide).mean(axis=tuple(range(1, x.ndim - 1)))
    x = nn.Dropout(method.dropout_rate, deterministic=not train)(x)
    if method.scalar_biases:
      x = ScalarBias(self.param_dtype, name="classifier_bias")(x)
    fixup_method = method.initialization == "fixup"
    return nn.Dense(
      self.num_classes,
      kernel_init=nn.initializers.zeros if fixup_method else self.classifier_init,
      dtype=wide,
      param_dtype=self.param_dtype,
      name="classifier",
    )(x)
