"""The head that all models share: from the last block's features to logits."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from skipinit_jax.layers import ScalarBias
from skipinit_jax.layers.scaling import wide
from skipinit_jax.methods import Method, bind_normalizer


class Head(nn.Module):
  """From the last block's features to logits.

  Attributes:
    num_classes: number of logits.
    method: the method; it decides the output's normalizer, dropout and biases.
    preactivation: whether the features still need normalization and activation.
    classifier_init: initializer of the classifier, unless the method has its own. The
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
    norm = bind_normalizer(
      method.output_normalizer or (method.normalizer if self.preactivation else None),
      train=train,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
    )
    if norm is not None:
      x = norm(name="norm")(x)
    if self.preactivation:
      if method.scalar_biases:
        x = ScalarBias(self.param_dtype, name="activation_bias")(x)
      x = method.activation(x)
    x = mean_over_positions(x)
    x = nn.Dropout(method.dropout_rate, deterministic=not train)(x)
    if method.scalar_biases:
      x = ScalarBias(self.param_dtype, name="classifier_bias")(x)
    return nn.Dense(
      self.num_classes,
      kernel_init=method.classifier_init or self.classifier_init,
      dtype=x.dtype,
      param_dtype=self.param_dtype,
      name="classifier",
    )(x)


def mean_over_positions(x: jax.Array) -> jax.Array:
  """Returns the mean of [N, ..., C] over all but the first and last axis, [N, C].

  It is float32 at least: the mean over many positions, and the loss, need more than
  bfloat16's 8 bits.
  """
  return wide(x).mean(axis=tuple(range(1, x.ndim - 1)))
