"""What the models share: a method turned into fields of blocks, and the head."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from skipinit_jax.errors import UsageError
from skipinit_jax.layers import (
  ScalarBias,
  SkipInit,
  fixup,
  he_normal,
  he_normal_fan_out,
)
from skipinit_jax.methods import Method, ModuleFactory


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
  available = {
    "use_running_average": not train,
    "dtype": dtype,
    "param_dtype": param_dtype,
  }
  # LayerNorm and GroupNorm have no running average, a user's own may have no dtype.
  parameters = inspect.signature(method.normalizer).parameters
  accepts_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
  bound = getattr(method.normalizer, "keywords", {})
  keywords = {
    name: value
    for name, value in available.items()
    if (name in parameters or accepts_any) and name not in bound
  }
  return functools.partial(method.normalizer, **keywords)


def kernel_init(method: Method) -> jax.nn.initializers.Initializer:
  """Returns the initializer of kernels outside of residual branches."""
  return he_normal_fan_out if method.initialization == "fixup" else he_normal


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
    "dtype": dtype,
    "param_dtype": param_dtype,
  }
  if not method.output_normalizer_only:
    fields["normalizer"] = normalizer(
      method, train=train, dtype=dtype, param_dtype=param_dtype
    )
  alpha = method.initial_alpha(num_blocks)
  if alpha is not None:
    fields["branch_scale"] = functools.partial(
      SkipInit, alpha, method.learnable_alpha, param_dtype
    )
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
    """Maps [N, ..., C] to logits, [N, num_classes] float32."""
    method = self.method
    if self.preactivation or method.output_normalizer_only:
      norm = normalizer(
        method, train=train, dtype=self.dtype, param_dtype=self.param_dtype
      )
      x = x if norm is None else norm(name="norm")(x)
    if self.preactivation:
      if method.scalar_biases:
        x = ScalarBias(self.param_dtype, name="activation_bias")(x)
      x = nn.relu(x)
    # The mean over many positions, and the loss, need more than bfloat16's 8 bits.
    x = x.astype(jnp.float32).mean(axis=tuple(range(1, x.ndim - 1)))
    x = nn.Dropout(method.dropout_rate, deterministic=not train)(x)
    if method.scalar_biases:
      x = ScalarBias(self.param_dtype, name="classifier_bias")(x)
    fixup_method = method.initialization == "fixup"
    return nn.Dense(
      self.num_classes,
      kernel_init=nn.initializers.zeros if fixup_method else self.classifier_init,
      dtype=jnp.float32,
      param_dtype=self.param_dtype,
      name="classifier",
    )(x)
