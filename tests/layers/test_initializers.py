"""Second moments of initializers, against the papers' formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skipinit_jax.layers import fixup, he_normal, he_normal_fan_out

# Shape, fan-in and fan-out: a kernel's window counts into both.
SHAPES = [
  ((300, 200), 300, 200),
  ((3, 3, 40, 80), 360, 720),
  ((1, 1, 64, 512), 64, 512),
  ((7, 5, 3, 96), 105, 3360),
]


def assert_normal(weights, variance):
  """Mean, second and fourth moments within five standard errors of a normal's."""
  n = weights.size
  x = np.asarray(weights, np.float64).ravel() / np.sqrt(variance)
  assert abs(x.mean()) < 5 / np.sqrt(n)
  assert abs((x**2).mean() - 1) < 5 * np.sqrt(2 / n)
  # Not truncated, not uniform: variance of x^4 is 105 - 9.
  assert abs((x**4).mean() - 3) < 5 * np.sqrt(96 / n)


@pytest.mark.parametrize(("shape", "fan_in", "fan_out"), SHAPES)
def test_he_normal(shape, fan_in, fan_out):
  assert_normal(he_normal(jax.random.key(0), shape, jnp.float32), 2 / fan_in)


@pytest.mark.parametrize(("shape", "fan_in", "fan_out"), SHAPES)
def test_he_normal_fan_out(shape, fan_in, fan_out):
  assert_normal(he_normal_fan_out(jax.random.key(1), shape, jnp.float32), 2 / fan_out)


@pytest.mark.parametrize(("shape", "fan_in", "fan_out"), SHAPES)
@pytest.mark.parametrize(("num_blocks", "branch_layers"), [(16, 3), (49, 2), (1, 2)])
def test_fixup(shape, fan_in, fan_out, num_blocks, branch_layers):
  # Weights scaled by d^(-1/(2m - 2)).
  scale = num_blocks ** (-1 / (2 * branch_layers - 2))
  weights = fixup(num_blocks, branch_layers)(jax.random.key(2), shape, jnp.float32)
  assert_normal(weights, scale**2 * 2 / fan_out)


def test_fixup_of_bottleneck_blocks_scales_by_the_fourth_root():
  # Sixteen blocks of three layers: 16^(-1/4) is one half.
  key, shape = jax.random.key(3), (3, 3, 8, 8)
  np.testing.assert_allclose(
    fixup(16, 3)(key, shape, jnp.float32),
    0.5 * he_normal_fan_out(key, shape, jnp.float32),
    rtol=1e-6,
  )
