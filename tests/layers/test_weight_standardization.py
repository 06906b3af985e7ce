"""Scaled weight standardization, against its definition.

What it is for is tested in test_normalizer_free.py and test_measure.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy import integrate, stats

from skipinit_jax.layers import (
  RELU_GAIN,
  Conv,
  WeightStandardizedConv,
  WeightStandardizedDense,
  scaled_relu,
  standardize,
)


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(0.7, 2, shape).astype(np.float32)


def by_definition(kernel):
  """(W - mean) / (std sqrt(N)) for each output feature, as the paper writes it."""
  rows = np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1])
  return ((rows - rows.mean(0)) / (rows.std(0) * len(rows) ** 0.5)).reshape(
    kernel.shape
  )


@pytest.mark.parametrize("shape", [(7, 5), (3, 3, 4, 6), (1, 1, 8, 2)])
def test_standardize(shape):
  kernel = draw(*shape)
  np.testing.assert_allclose(standardize(kernel), by_definition(kernel), atol=1e-6)
  # The scale of the weights does not matter, so the gradient has no part along them.
  np.testing.assert_allclose(
    standardize(3 * kernel + 5), standardize(kernel), atol=1e-5
  )


def test_equal_weights_are_zero_and_not_undefined():
  np.testing.assert_array_equal(standardize(jnp.ones((4, 3))), 0)


def test_bfloat16_weights_are_standardized_in_float32():
  kernel = jnp.asarray(draw(3, 3, 256, 4), jnp.bfloat16)
  actual = standardize(kernel)
  assert actual.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    np.asarray(actual, np.float64), by_definition(kernel), rtol=1 / 128, atol=1e-5
  )


def test_gain_is_the_inverse_deviation_of_relu():
  moments = [
    integrate.quad(lambda x, k=power: x**k * stats.norm.pdf(x), 0, np.inf)[0]
    for power in (1, 2)
  ]
  np.testing.assert_allclose(RELU_GAIN, (moments[1] - moments[0] ** 2) ** -0.5)
  x = jnp.array([-1.0, 0.0, 2.0])
  np.testing.assert_allclose(scaled_relu(x), [0, 0, 2 * RELU_GAIN], rtol=1e-6)


@pytest.mark.parametrize(
  ("module", "plain", "shape"),
  [
    (WeightStandardizedConv(5, (3, 3), 2), Conv(5, (3, 3), 2), (2, 7, 6, 4)),
    (WeightStandardizedDense(5), nn.Dense(5), (2, 6)),
  ],
)
def test_layer_is_the_plain_one_with_other_weights(module, plain, shape):
  x = draw(*shape)
  params = module.init(jax.random.key(0), x)["params"]
  np.testing.assert_array_equal(params["scale"], np.ones(5))
  params = jax.tree.map(lambda leaf: draw(*leaf.shape, seed=leaf.size), params)
  kernel = by_definition(params["kernel"]) * params["scale"]
  expected = plain.apply({"params": {"kernel": kernel, "bias": params["bias"]}}, x)
  actual = module.apply({"params": params}, x)
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
