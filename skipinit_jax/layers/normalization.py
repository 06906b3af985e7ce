"""Batch normalization over a batch or its ghost batches; others are Flax's."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from skipinit_jax.errors import UsageError
from skipinit_jax.layers.scaling import along_features, wide


class GhostBatchNorm(nn.Module):
  """Batch normalization with statistics over small sub-batches of the batch.

  Hoffer, Hubara & Soudry (NeurIPS 2017). Parameters, statistics and their names
  are those of `flax.linen.BatchNorm`, and so is evaluation. Running statistics
  average the sub-batches' means and variances.

  A sub-batch holds consecutive examples. A batch that is sharded over its first
  axis is therefore normalized without communication where a device holds whole
  sub-batches.

  Statistics are float32, or float64 for float64. The variance is that of the deviations
  from the mean, and so is right whatever the mean. Where a TPU or GPU normalizes
  bfloat16, it is the mean square less the squared mean, as in Flax, which takes one
  pass over the features less.

  Attributes:
    use_running_average: whether to normalize by the running statistics.
    ghost_batch_size: examples of a sub-batch; it must divide the batch. None: the whole
      batch, as in Ioffe & Szegedy (ICML 2015).
    momentum: decay of the running statistics.
    epsilon: added to the variance.
    scale_init: initializer of the scale.
    dtype: dtype of the result; None keeps the input's.
    param_dtype: dtype of scale and bias.
  """

  use_running_average: bool
  ghost_batch_size: int | None = None
  momentum: float = 0.99
  epsilon: float = 1e-5
  scale_init: jax.nn.initializers.Initializer = nn.initializers.ones
  dtype: jax.typing.DTypeLike | None = None
  param_dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalizes x.

    Args:
      x: features, [N, ..., C].

    Returns:
      The normalized features, [N, ..., C].

    Raises:
      UsageError: the batch N is not a multiple of `ghost_batch_size`.
    """
    features = (x.shape[-1],)
    running_mean = self.variable(
      "batch_stats", "mean", jnp.zeros, features, jnp.float32
    )
    running_var = self.variable("batch_stats", "var", jnp.ones, features, jnp.float32)
    scale = self.param("scale", self.scale_init, features, self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, features, self.param_dtype)

    if self.use_running_average:
      mean, var = running_mean.value, running_var.value
      y = normalize_by_running(x, mean, var, scale, bias, self.epsilon)
    else:
      # Initialization may pass any batch: it takes shapes only.
      size = None if self.is_initializing() else self.ghost_batch_size
      y, mean, var = normalize_sub_batches(x, size, scale, bias, self.epsilon)
      if not self.is_initializing():
        for running, average in ((running_mean, mean), (running_var, var)):
          running.value += (1 - self.momentum) * (average - running.value)
    return y.astype(self.dtype or x.dtype)


def normalize_by_running(
  x: jax.Array,
  mean: jax.Array,
  var: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  epsilon: float,
) -> jax.Array:
  """Normalizes features, [N, ..., C], by running statistics, [C]."""
  factor = scale * jax.lax.rsqrt(var + epsilon)
  mean, factor, bias = (along_features(each, x) for each in (mean, factor, bias))
  return (wide(x) - mean) * factor + bias


def normalize_sub_batches(
  x: jax.Array, size: int | None, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Normalizes sub-batches, each by its own statistics, in float32 or more.

  Args:
    x: features, [N, ..., C].
    size: examples of a sub-batch, which divide the batch; None: the whole batch.
    scale: factor on the normalized features, [C].
    bias: what is added to them, [C].

  Returns:
    The features, and means and variances averaged over the sub-batches, [C].

  Raises:
    UsageError: the sub-batches do not fill the batch.
  """

  def normalize(
    x: jax.Array, scale: jax.Array, bias: jax.Array, first: int
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    axes = tuple(range(first, x.ndim - 1))
    mean = wide(x).mean(axes, keepdims=True)
    var = _variance(x, mean, axes)
    factor = along_features(scale, x) * jax.lax.rsqrt(var + epsilon)
    return (wide(x) - mean) * factor + along_features(bias, x), mean, var

  if size is None:
    y, mean, var = normalize(x, scale, bias, 0)
    return y, mean.reshape(-1), var.reshape(-1)
  if size < 1 or x.shape[0] % size:
    raise UsageError(
      f"ghost_batch_size {size} does not divide the batch of {x.shape[0]}."
    )

  def normalize_each(
    x: jax.Array, scale: jax.Array, bias: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    sub_batches = x.reshape(-1, size, *x.shape[1:])
    y, *statistics = normalize(sub_batches, scale, bias, 1)
    mean, var = (each.reshape(-1, x.shape[-1]).mean(0) for each in statistics)
    return y.reshape(x.shape), mean, var

  sharding = jax.typeof(x).sharding
  if any(sharding.spec):
    # A sub-batch on several devices has no name on an explicit mesh.
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    normalize_each = jax.sharding.auto_axes(
      normalize_each, out_sharding=(sharding, whole, whole)
    )
  return normalize_each(x, scale, bias)


def _variance(x: jax.Array, mean: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """Returns the variance of x over axes, which the mean keeps, as the result does.

  It is the mean square deviation, which is right whatever the mean, and waits for it.

  An accelerator sums bfloat16 features and their squares at once, as it computes them,
  and need not read them again: the variance is the mean square less the squared mean.
  Both are float32, which has 16 bits more than what they are made of. Most are left as
  long as the deviation is more than bfloat16's rounding of the mean. float32 features
  would lose all bits where the mean is a thousand times the deviation.
  """
  if x.dtype != jnp.bfloat16:
    return _mean_square_deviation(x, mean, axes)
  return jax.lax.platform_dependent(
    x,
    mean,
    cpu=lambda x, mean: _mean_square_deviation(x, mean, axes),
    default=lambda x, mean: jnp.maximum(
      jnp.square(wide(x)).mean(axes, keepdims=True) - jnp.square(mean), 0
    ),
  )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _mean_square_deviation(
  x: jax.Array, mean: jax.Array, axes: tuple[int, ...]
) -> jax.Array:
  return jnp.square(wide(x) - mean).mean(axes, keepdims=True)


@_mean_square_deviation.defjvp
def _mean_square_deviation_jvp(
  axes: tuple[int, ...],
  primals: tuple[jax.Array, jax.Array],
  tangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
  # Deviations sum to zero, and so does what comes by way of the mean. XLA would read
  # all features once more in the backward pass to find that out.
  (x, mean), (x_dot, _) = primals, tangents
  product = (wide(x) - mean) * wide(x_dot)
  return _mean_square_deviation(x, mean, axes), 2 * product.mean(axes, keepdims=True)
