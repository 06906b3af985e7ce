"""Moments of initializers, against the papers' formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skipinit_jax.layers import fixup, he_normal, he_normal_fan_out


# Shape, fan-in and fan-out: a kernel's window counts into both.
@pytest.mark.parametrize(
  ("shape", "fan_in", "fan_out"),
  [
    ((300, 200), 300, 200),
    ((3, 3, 40, 80), 360, 720),
    ((1, 1, 64, 512), 64, 512),
    ((7, 5, 3, 96), 105, 3360),
  ],
)
def test_variance(shape, fan_in, fan_out):
  for initializer, variance in (
    (he_normal, 2 / fan_in),
    (he_normal_fan_out, 2 / fan_out),
    # Weights scaled by d^(-1/(2m - 2)): by one half, one seventh, and one.
    (fixup(16, 3), 2 / fan_out / 2**2),
    (fixup(49, 2), 2 / fan_out / 7**2),
    (fixup(1, 2), 2 / fan_out),
  ):
    weights = initializer(jax.random.key(0), shape, jnp.float32)
    # The first, second and fourth moments, within five standard errors of a normal's.
    n = weights.size
    x = np.asarray(weights, np.float64).ravel() / np.sqrt(variance)
    assert abs(x.mean()) < 5 / np.sqrt(n)
    assert abs((x**2).mean() - 1) < 5 * np.sqrt(2 / n)
    # Not truncated, not uniform: the variance of x^4 is 105 - 9.
    assert abs((x**4).mean() - 3) < 5 * np.sqrt(96 / n)
