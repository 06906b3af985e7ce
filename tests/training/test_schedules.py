import math

import jax
import jax.numpy as jnp
import pytest

from skipinit_jax.errors import UsageError
from skipinit_jax.training import schedules
from skipinit_jax.training.config import TrainConfig

STEPS = 100  # of an epoch


def factor(epoch, **fields):
  """Returns the rate's factor after so many epochs, as a traced step gives it."""
  schedule = schedules.make_schedule(TrainConfig(**fields), STEPS)
  step = round(epoch * STEPS)
  traced = float(jax.jit(schedule)(jnp.int32(step)))
  assert float(schedule(step)) == pytest.approx(traced, rel=1e-6)
  return traced


@pytest.mark.parametrize(
  ("epoch", "expected"),
  [
    (0, 1),
    (50, 1),
    (99.99, 1),
    (100, 1 / 2),
    (109.99, 1 / 2),
    (110, 1 / 4),
    (119.99, 1 / 4),
    (150, 1 / 64),
    (199.99, 1 / 1024),
  ],
)
def test_halving_is_the_papers(epoch, expected):
  # Powers of two are exact.
  assert (
    factor(epoch, schedule="halving", constant_epochs=100, halve_every_epochs=10)
    == expected
  )


def test_halving_from_the_start():
  halving = schedules.halving(0, 2)
  assert [float(halving(step)) for step in range(5)] == [0.5, 0.5, 0.25, 0.25, 0.125]


def test_halving_by_parts_of_an_epoch():
  fields = {"schedule": "halving", "constant_epochs": 0.5, "halve_every_epochs": 0.25}
  factors = [factor(step / STEPS, **fields) for step in (49, 50, 74, 75, 99, 100)]
  assert factors == [1, 0.5, 0.5, 0.25, 0.25, 0.125]


@pytest.mark.parametrize("epoch", [0, 0.01, 5, 10])
def test_constant(epoch):
  assert factor(epoch, schedule="constant") == 1


@pytest.mark.parametrize("warmup", [0.0, 2.0])
@pytest.mark.parametrize("epoch", [0, 0.01, 1, 1.99, 2, 2.01, 4, 6, 9.99, 10])
def test_cosine(warmup, epoch):
  if epoch < warmup:
    expected = epoch / warmup
  else:
    expected = (1 + math.cos(math.pi * (epoch - warmup) / (10 - warmup))) / 2
  actual = factor(epoch, schedule="cosine", epochs=10, warmup_epochs=warmup)
  assert actual == pytest.approx(expected, abs=1e-6)


def test_cosine_with_all_but_one_step_of_warmup():
  fields = {"schedule": "cosine", "epochs": 2, "warmup_epochs": 1.9999}
  TrainConfig(**fields).validate()
  # 199.99 steps round to 200, which leaves none for the cosine.
  assert factor(1.99, **fields) == 1
  assert factor(1.0, **fields) == pytest.approx(100 / 199, rel=1e-6)


@pytest.mark.parametrize("growth", [1.0, 1.5, 0.5])
@pytest.mark.parametrize("epoch", [0, 0.01, 0.5, 1, 3])
def test_exponential_grows_step_by_step(growth, epoch):
  actual = factor(epoch, schedule="exponential", growth_per_epoch=growth)
  assert actual == pytest.approx(growth**epoch, rel=1e-6)


def test_unknown_schedule():
  with pytest.raises(UsageError, match=r"'step'.*constant, cosine, exponential, halv"):
    schedules.make_schedule(TrainConfig(schedule="step"), STEPS)
