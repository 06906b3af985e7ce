"""Learning-rate schedules, relative to their highest rate."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import optax


class Steps(NamedTuple):
  """The steps of a run.

  Attributes:
    per_epoch: in an epoch.
    warmup: in which the rate rises from zero.
    total: in all epochs.
  """

  per_epoch: int
  warmup: int
  total: int


def halving(
  steps: Steps, constant_epochs: float, halve_every_epochs: float
) -> optax.Schedule:
  """Constant, then halved again and again: our reading of the paper's schedule.

  The first halving is after `constant_epochs`.

  Returns:
    The schedule: 1, then 1/2, 1/4, ...
  """
  constant_steps = constant_epochs * steps.per_epoch
  halve_every_steps = halve_every_epochs * steps.per_epoch

  def schedule(count: jnp.ndarray) -> jnp.ndarray:
    # JAX may be told not to mix dtypes.
    late = jnp.asarray(count, jnp.float32) - constant_steps
    halvings = 1 + jnp.floor(late / halve_every_steps)
    return 0.5 ** jnp.maximum(halvings, 0)

  return schedule


def cosine(steps: Steps) -> optax.Schedule:
  """Half a cosine from 1, where the warm-up ends, to 0 at the end of the run."""
  decay = optax.cosine_decay_schedule(1.0, steps.total - steps.warmup)
  return lambda count: decay(jnp.maximum(count - steps.warmup, 0))


def constant(steps: Steps) -> optax.Schedule:
  """Always 1."""
  del steps
  return optax.constant_schedule(1.0)


def exponential(steps: Steps, growth_per_epoch: float) -> optax.Schedule:
  """Starts at 1 and grows (Li & Arora, ICLR 2020) or decays."""
  return optax.exponential_decay(1.0, steps.per_epoch, growth_per_epoch)


# Beside the steps, each takes the fields of the configuration that it names.
SCHEDULES: Mapping[str, Callable[..., optax.Schedule]] = {
  "halving": halving,
  "cosine": cosine,
  "constant": constant,
  "exponential": exponential,
}
