"""Ghost batch normalization; other normalizers are those of Flax."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from skipinit_jax.errors import UsageError
from skipinit_jax.layers.scaling import along_features


class GhostBatchNorm(nn.Module):
  """Batch normalization with statistics over small sub-batches of the batch.

  Hoffer, Hubara & Soudry (NeurIPS 2017). Parameters, statistics and their names
  are those of `flax.linen.BatchNorm`, and so is evaluation. Running statistics
  average the sub-batches' means and variances.

  A sub-batch holds consecutive examples. A batch that is sharded over its first
  axis is therefore normalized without communication where a device holds whole
  sub-batches.

  Attributes:
    use_running_average: whether to normalize by the running statistics.
    ghost_batch_size: examples of a sub-batch; it must divide the batch.
    momentum: decay of the running statistics.
    epsilon: added to the variance.
    scale_init: initializer of the scale.
    dtype: dtype of the result; None keeps the input's.
    param_dtype: dtype of scale and bias.
  """

  use_running_average: bool
  ghost_batch_size: int
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
    scale, bias = (
      along_features(self.param(name, init, features, self.param_dtype), x)
      for name, init in (
        ("scale", self.scale_init),
        ("bias", nn.initializers.zeros),
      )
    )

    # Statistics are float32 for any input, as in Flax: squares overflow bfloat16's
    # precision long before the network does.
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if self.use_running_average:
      mean, var = running_mean.value, running_var.value
      y = normalize_by_running(y, mean, var, scale, bias, self.epsilon)
    else:
      # Initialization may pass any batch: it takes shapes only.
      size = x.shape[0] if self.is_initializing() else self.ghost_batch_size
      y, mean, var = normalize_sub_batches(y, size, scale, bias, self.epsilon)
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
  mean, var = along_features(mean, x), along_features(var, x)
  return (x - mean) * (scale * jax.lax.rsqrt(var + epsilon)) + bias


def normalize_sub_batches(
  x: jax.Array, size: int, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Normalizes sub-batches, each by its own statistics.

  Args:
    x: features, [N, ..., C].
    size: examples of a sub-batch, which divide the batch.
    scale: factor on the normalized features, [1, ..., C].
    bias: what is added to them, [1, ..., C].

  Returns:
    The features, and means and variances averaged over the sub-batches, [C].

  Raises:
    UsageError: the sub-batches do not fill the batch.
  """
  if size < 1 or x.shape[0] % size:
    raise UsageError(
      f"ghost_batch_size {size} does not divide the batch of {x.shape[0]}."
    )

  def normalize(
    x: jax.Array, scale: jax.Array, bias: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    y = x.reshape(-1, size, *x.shape[1:])
    axes = tuple(range(1, y.ndim - 1))
    mean = y.mean(axes, keepdims=True)
    var = jnp.square(y - mean).mean(axes, keepdims=True)
    y = (y - mean) * (scale[None] * jax.lax.rsqrt(var + epsilon)) + bias[None]
    means, variances = (each.reshape(-1, x.shape[-1]).mean(0) for each in (mean, var))
    return y.reshape(x.shape), means, variances

  sharding = jax.typeof(x).sharding
  if any(sharding.spec):
    # A sub-batch on several devices has no name on an explicit mesh.
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    normalize = jax.sharding.auto_axes(normalize, out_sharding=(sharding, whole, whole))
  return normalize(x, scale, bias)
