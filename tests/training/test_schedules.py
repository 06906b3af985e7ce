"""Schedules of the rate, as factors on the highest, against their formulas."""

import math

import jax
import jax.numpy as jnp
import pytest

from skipinit_jax.errors import UsageError
from skipinit_jax.training import optimizer
from skipinit_jax.training.config import TrainConfig

STEPS = 100  # of an epoch


def assert_factors(factors, **fields):
  """Compares the factor after so many epochs, also as a traced step gives it."""
  schedule = optimizer.make_schedule(TrainConfig(**fields), STEPS)
  traced = jax.jit(schedule)
  for epoch, expected in factors.items():
    step = round(epoch * STEPS)
    for factor in (schedule(step), traced(jnp.int32(step))):
      assert float(factor) == pytest.approx(expected, rel=1e-6, abs=1e-6), epoch


@pytest.mark.parametrize(
  ("constant", "every", "factors"),
  [
    # The paper's.
    (100, 10, {0: 1, 99.99: 1, 100: 1 / 2, 109.99: 1 / 2, 110: 1 / 4, 150: 1 / 64}),
    (0, 0.02, {0: 1 / 2, 0.01: 1 / 2, 0.02: 1 / 4, 0.04: 1 / 8}),
    # Parts of an epoch.
    (0.5, 0.25, {0.49: 1, 0.5: 1 / 2, 0.74: 1 / 2, 0.75: 1 / 4, 0.99: 1 / 4, 1: 1 / 8}),
  ],
)
def test_halving(constant, every, factors):
  assert_factors(
    factors, schedule="halving", constant_epochs=constant, halve_every_epochs=every
  )


@pytest.mark.parametrize("warmup", [0.0, 2.0])
@pytest.mark.parametrize(
  ("fields", "factor"),
  [
    ({"schedule": "constant"}, lambda epoch, _: 1),
    ({"schedule": "exponential", "growth_per_epoch": 1.5}, lambda epoch, _: 1.5**epoch),
    ({"schedule": "exponential", "growth_per_epoch": 0.5}, lambda epoch, _: 0.5**epoch),
    (
      {"schedule": "halving", "constant_epochs": 1, "halve_every_epochs": 2},
      lambda epoch, _: 1 if epoch < 1 else 0.5 ** (1 + (epoch - 1) // 2),
    ),
    (
      # It begins where the warm-up ends.
      {"schedule": "cosine"},
      lambda epoch, warmup: (
        (1 + math.cos(math.pi * max(epoch - warmup, 0) / (10 - warmup))) / 2
      ),
    ),
  ],
)
def test_warmup_multiplies_every_schedule(fields, factor, warmup):
  epochs = (0, 0.01, 0.99, 1, 1.99, 2, 2.01, 6, 10)
  factors = {
    epoch: (min(epoch / warmup, 1) if warmup else 1) * factor(epoch, warmup)
    for epoch in epochs
  }
  assert_factors(factors, epochs=10, warmup_epochs=warmup, **fields)


def test_cosine_with_all_but_one_step_of_warmup():
  # 199.99 steps round to 200, which leaves none for the cosine.
  factors = {1.99: 1, 1.0: 100 / 199}
  assert_factors(factors, schedule="cosine", epochs=2, warmup_epochs=1.9999)


def test_no_warmup_is_too_short():
  factors = {0: 0, 0.01: 1}
  assert_factors(factors, schedule="constant", epochs=2, warmup_epochs=0.001)


def test_unknown_schedule():
  with pytest.raises(UsageError, match=r"'step'.*constant, cosine, exponential, halv"):
    optimizer.make_schedule(TrainConfig(schedule="step"), STEPS)
