"""Learning-rate schedules, relative to their highest rate."""

import jax.numpy as jnp
import optax

from skipinit_jax.errors import unknown_name
from skipinit_jax.training.config import SCHEDULES, TrainConfig


def halving(constant_steps: float, halve_every_steps: float) -> optax.Schedule:
  """Constant, then halved again and again: our reading of the paper's schedule.

  The first halving is after `constant_steps`.

  Returns:
    The schedule: 1, then 1/2, 1/4, ...
  """

  def schedule(count: jnp.ndarray) -> jnp.ndarray:
    halvings = 1 + jnp.floor((count - constant_steps) / halve_every_steps)
    return 0.5 ** jnp.maximum(halvings, 0)

  return schedule


def make_schedule(config: TrainConfig, steps_per_epoch: int) -> optax.Schedule:
  """Returns the configured schedule, of step number, with highest value 1.

  "exponential" starts at 1 and grows (Li & Arora, ICLR 2020) or decays.

  Raises:
    UsageError: the schedule is unknown.
  """
  if config.schedule == "halving":
    return halving(
      config.constant_epochs * steps_per_epoch,
      config.halve_every_epochs * steps_per_epoch,
    )
  if config.schedule == "cosine":
    total_steps = config.epochs * steps_per_epoch
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    return optax.warmup_cosine_decay_schedule(
      init_value=0.0,
      peak_value=1.0,
      warmup_steps=min(warmup_steps, total_steps - 1),
      decay_steps=total_steps,
    )
  if config.schedule == "constant":
    return optax.constant_schedule(1.0)
  if config.schedule == "exponential":
    return optax.exponential_decay(1.0, steps_per_epoch, config.growth_per_epoch)
  raise unknown_name("schedule", config.schedule, SCHEDULES)
