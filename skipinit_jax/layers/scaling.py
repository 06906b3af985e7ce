"""Scales of a residual branch (SkipInit's, LayerScale's) and Fixup's scalar bias.

Their gradients are sums over the whole batch, which bfloat16 cannot hold: adding ones
stops at 256. The modules therefore compute in float32 at least, and return the dtype
of their input.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn


def wide(x: jax.Array) -> jax.Array:
  """Returns x in float32, or in float64 if it is."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def constant(value: float, x: jax.Array) -> jax.Array:
  """Returns a constant factor on x, of the precision that `multiply` has."""
  return jnp.asarray(value, jnp.promote_types(x.dtype, jnp.float32))


def times(alpha: jax.Array, factor: float) -> jax.Array:
  """Returns alpha times a constant, in float32 at least."""
  return alpha if factor == 1 else wide(alpha) * factor


def along_features(values: jax.Array, x: jax.Array) -> jax.Array:
  """Returns values, a scalar or [C], with as many axes as x, [..., C].

  JAX promotes ranks by itself, but `jax_numpy_rank_promotion` may forbid it.
  """
  return values.reshape((1,) * (x.ndim - values.ndim) + values.shape)


# Recomputes the cast in the backward pass, which otherwise keeps x twice as large.
@functools.partial(jax.checkpoint, prevent_cse=False)
def multiply(x: jax.Array, scale: jax.Array) -> jax.Array:
  """Returns x, [..., C], times a scalar or one factor for each channel, [C]."""
  return (wide(x) * along_features(scale, x)).astype(x.dtype)


def add_scalar(x: jax.Array, bias: jax.Array) -> jax.Array:
  """Returns x plus a scalar, in the dtype of x."""
  return (wide(x) + bias).astype(x.dtype)


class SkipInit(nn.Module):
  """Multiplies a residual branch by one scalar, alpha.

  De & Smith (2020), section 3. Fixup's scalar multiplier (Zhang et al., 2019) is
  the same module with the initial value 1.

  Attributes:
    initial_value: alpha at initialization.
    learnable: whether alpha is a parameter; otherwise it stays the initial value.
    factor: a constant beside alpha, such as the 0.2 of NF-ResNets.
    param_dtype: the parameter's dtype.
  """

  initial_value: float = 0.0
  learnable: bool = True
  factor: float = 1.0
  param_dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns factor alpha x, of the shape and dtype of x."""
    if not self.learnable:
      return multiply(x, constant(self.factor * self.initial_value, x))
    alpha = self.param(
      "alpha", nn.initializers.constant(self.initial_value), (), self.param_dtype
    )
    return multiply(x, times(alpha, self.factor))


class LayerScale(nn.Module):
  """Multiplies a residual branch by one learnable factor for each channel.

  Touvron et al. (ICCV 2021), section 2.

  Attributes:
    initial_value: each factor at initialization.
    learnable: whether the factors are a parameter; otherwise they stay as they are.
    param_dtype: the parameter's dtype.
  """

  initial_value: float = 0.1
  learnable: bool = True
  param_dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns diag(scale) x, of the shape and dtype of x, [..., C]."""
    if not self.learnable:
      return multiply(x, constant(self.initial_value, x))
    scale = self.param(
      "scale",
      nn.initializers.constant(self.initial_value),
      (x.shape[-1],),
      self.param_dtype,
    )
    return multiply(x, scale)


class ScalarBias(nn.Module):
  """Adds one learnable scalar, zero at initialization: Fixup's bias.

  Zhang, Dauphin & Ma (ICLR 2019).

  Attributes:
    param_dtype: the parameter's dtype.
  """

  param_dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns x + bias, of the shape and dtype of x."""
    bias = self.param("bias", nn.initializers.zeros, (), self.param_dtype)
    return add_scalar(x, bias)
