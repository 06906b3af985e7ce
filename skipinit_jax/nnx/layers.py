"""The layers of `skipinit_jax.layers`, with NNX's variables."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from skipinit_jax.layers import conv_general_dilated, standardize
from skipinit_jax.layers.normalization import (
  normalize_by_running,
  normalize_sub_batches,
)
from skipinit_jax.layers.scaling import (
  add_scalar,
  along_features,
  constant,
  multiply,
  times,
)

DType = jax.typing.DTypeLike

Conv: functools.partial[nnx.Conv] = functools.partial(
  nnx.Conv, conv_general_dilated=conv_general_dilated
)
"""`flax.nnx.Conv` on `layers.conv_general_dilated`."""


class SkipInit(nnx.Module):
  """Multiplies a residual branch by one scalar, alpha: see `layers.SkipInit`.

  Attributes:
    alpha: the scalar, an `nnx.Param`; None: it stays the initial value.
  """

  def __init__(
    self,
    initial_value: float = 0.0,
    *,
    learnable: bool = True,
    factor: float = 1.0,
    param_dtype: DType = jnp.float32,
    rngs: nnx.Rngs | None = None,
  ) -> None:
    """Makes the scalar.

    Args:
      initial_value: alpha at initialization.
      learnable: whether alpha is a parameter; otherwise it stays the initial value.
      factor: a constant beside alpha, such as the 0.2 of NF-ResNets.
      rngs: not needed; any module may be given it.
    """
    self.initial_value = initial_value
    self.factor = factor
    value = jnp.asarray(initial_value, param_dtype)
    self.alpha = nnx.Param(value) if learnable else None

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns factor alpha x, of the shape and dtype of x."""
    if self.alpha is None:
      return multiply(x, constant(self.factor * self.initial_value, x))
    return multiply(x, times(self.alpha[...], self.factor))


class LayerScale(nnx.Module):
  """Multiplies a residual branch by one factor for each channel.

  See `layers.LayerScale`.

  Attributes:
    scale: the factors, an `nnx.Param` [C]; None: they stay the initial value.
  """

  def __init__(
    self,
    num_features: int,
    initial_value: float = 0.1,
    *,
    learnable: bool = True,
    param_dtype: DType = jnp.float32,
    rngs: nnx.Rngs | None = None,
  ) -> None:
    """Makes the factors.

    Args:
      num_features: C, the channels.
      initial_value: each factor at initialization.
      learnable: whether the factors are a parameter.
      rngs: not needed; any module may be given it.
    """
    self.initial_value = initial_value
    value = jnp.full(num_features, initial_value, param_dtype)
    self.scale = nnx.Param(value) if learnable else None

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns diag(scale) x, of the shape and dtype of x, [..., C]."""
    if self.scale is None:
      return multiply(x, constant(self.initial_value, x))
    return multiply(x, self.scale[...])


class ScalarBias(nnx.Module):
  """Adds one learnable scalar, zero at initialization: see `layers.ScalarBias`.

  Attributes:
    bias: the scalar, an `nnx.Param`.
  """

  def __init__(
    self, *, param_dtype: DType = jnp.float32, rngs: nnx.Rngs | None = None
  ) -> None:
    self.bias = nnx.Param(jnp.zeros((), param_dtype))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns x + bias, of the shape and dtype of x."""
    return add_scalar(x, self.bias[...])


class GhostBatchNorm(nnx.Module):
  """Batch normalization with statistics over small sub-batches of the batch.

  See `layers.GhostBatchNorm`. Variables and modes are those of `flax.nnx.BatchNorm`.
  """

  def __init__(
    self,
    num_features: int,
    *,
    ghost_batch_size: int | None = None,
    use_running_average: bool = False,
    momentum: float = 0.99,
    epsilon: float = 1e-5,
    scale_init: jax.nn.initializers.Initializer = jax.nn.initializers.ones,
    dtype: DType | None = None,
    param_dtype: DType = jnp.float32,
    rngs: nnx.Rngs,
  ) -> None:
    """Makes parameters and running statistics.

    Args:
      num_features: C, the channels.
      ghost_batch_size: examples of a sub-batch; it must divide the batch. None: the
        whole batch.
      use_running_average: whether to normalize by the running statistics, which
        `eval()` and `train()` of a network set.
      momentum: decay of the running statistics.
      epsilon: added to the variance.
      scale_init: initializer of the scale.
      dtype: dtype of the result; None keeps the input's.
      rngs: the scale's random numbers.
    """
    self.mean = nnx.BatchStat(jnp.zeros(num_features))
    self.var = nnx.BatchStat(jnp.ones(num_features))
    self.scale = nnx.Param(scale_init(rngs.params(), (num_features,), param_dtype))
    self.bias = nnx.Param(jnp.zeros(num_features, param_dtype))
    self.ghost_batch_size = ghost_batch_size
    self.use_running_average = use_running_average
    self.momentum = momentum
    self.epsilon = epsilon
    self.dtype = dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalizes x, [N, ..., C].

    Raises:
      UsageError: the batch N is not a multiple of `ghost_batch_size`.
    """
    scale, bias = self.scale[...], self.bias[...]
    if self.use_running_average:
      running = self.mean[...], self.var[...]
      y = normalize_by_running(x, *running, scale, bias, self.epsilon)
    else:
      y, mean, var = normalize_sub_batches(
        x, self.ghost_batch_size, scale, bias, self.epsilon
      )
      self.mean[...] += (1 - self.momentum) * (mean - self.mean[...])
      self.var[...] += (1 - self.momentum) * (var - self.var[...])
    return y.astype(self.dtype or x.dtype)


class WeightStandardizedConv(nnx.Conv):
  """`Conv` of this module with scaled weight standardization.

  See `layers.WeightStandardizedConv`.

  Attributes:
    scale: the factor on the standardized weights of each output feature.
  """

  def __init__(
    self, *args: Any, param_dtype: DType = jnp.float32, rngs: nnx.Rngs, **fields: Any
  ) -> None:
    """Makes the layer, from the arguments of `flax.nnx.Conv`."""
    fields = {"conv_general_dilated": conv_general_dilated} | fields
    super().__init__(*args, param_dtype=param_dtype, rngs=rngs, **fields)
    self.scale = nnx.Param(jnp.ones(self.kernel.shape[-1], param_dtype))

  def __call__(self, inputs: jax.Array, *args: Any, **options: Any) -> jax.Array:
    """Returns the convolution of [..., H, W, C] with the standardized kernel."""
    y: jax.Array = nnx.Conv.__call__(_standardized(self), inputs, *args, **options)
    return y


class WeightStandardizedLinear(nnx.Linear):
  """`flax.nnx.Linear` with scaled weight standardization.

  See `layers.WeightStandardizedDense`.

  Attributes:
    scale: the factor on the standardized weights of each output feature.
  """

  def __init__(
    self, *args: Any, param_dtype: DType = jnp.float32, rngs: nnx.Rngs, **fields: Any
  ) -> None:
    """Makes the layer, from the arguments of `flax.nnx.Linear`."""
    super().__init__(*args, param_dtype=param_dtype, rngs=rngs, **fields)
    self.scale = nnx.Param(jnp.ones(self.kernel.shape[-1], param_dtype))

  def __call__(self, inputs: jax.Array, *args: Any, **options: Any) -> jax.Array:
    """Returns the product of [..., C] with the standardized kernel."""
    y: jax.Array = nnx.Linear.__call__(_standardized(self), inputs, *args, **options)
    return y


def _standardized(layer: Any) -> Any:
  kernel = layer.kernel[...]
  factors = along_features(layer.scale[...], kernel)
  return _with(layer, kernel=standardize(kernel) * factors)


# What of a layer a factor of its output multiplies: see `layers.scaled`.
_FACTORED: dict[Any, tuple[str, ...]] = {
  nnx.Conv: ("kernel", "bias"),
  nnx.Linear: ("kernel", "bias"),
  WeightStandardizedConv: ("scale", "bias"),
  WeightStandardizedLinear: ("scale", "bias"),
}


def scaled(scale: Any, layer: Callable[[jax.Array], jax.Array], x: jax.Array) -> Any:
  """Returns scale(layer(x)): a branch's last layer and its scale, as one layer.

  As in `layers.scaled`, the scale goes into the weights of NNX's own layers and of
  standardized ones.
  """
  if scale is None:
    return layer(x)
  factored = _FACTORED.get(type(layer))
  if factored is None or not isinstance(scale, SkipInit | LayerScale):
    return scale(layer(x))
  sized: Any = layer
  factors = scale(jnp.ones(sized.out_features, sized.param_dtype))
  weights = {
    name: weight[...] * along_features(factors, weight[...])
    for name in factored
    if (weight := getattr(layer, name)) is not None
  }
  return _with(layer, **weights)(x)


def _with(layer: Any, **weights: jax.Array) -> Any:
  """Returns a copy of a layer with other weights."""
  layer = nnx.merge(*nnx.split(layer))
  for name, weight in weights.items():
    setattr(layer, name, nnx.Param(weight))
  return layer
