"""From a configuration to its optimizer, with the schedule of its rate."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from skipinit_jax.errors import UsageError, unknown_name
from skipinit_jax.fields import call, unusual
from skipinit_jax.training.config import TrainConfig
from skipinit_jax.training.schedules import SCHEDULES, Steps
from skipinit_jax.training.transformations import (
  OPTIMIZERS,
  ROLES,
  adaptive_grad_clip,
  average_params,
  frozen_parameters,
  parameter_roles,
  scale_by_role,
)

OptimizerFactory = Callable[[optax.Schedule], optax.GradientTransformation]
"""Returns an optimizer for a schedule of rates, as the functions of optax do."""


def optimizer_name(optimizer: OptimizerFactory) -> str:
  """Returns the name of a factory, with what a `functools.partial` sets."""
  function = getattr(optimizer, "func", optimizer)
  name = f"{function.__module__}.{getattr(function, '__qualname__', function)}"
  keywords = getattr(optimizer, "keywords", {})
  settings = ", ".join(f"{key}={value!r}" for key, value in keywords.items())
  return f"{name}({settings})" if settings else name


def check_parameters(
  config: TrainConfig, model: nn.Module, image_shape: tuple[int, ...]
) -> None:
  """Checks the fields that are for some of a network's parameters.

  Raises:
    UsageError: `freeze` does not fit them, or a role has a field, and none to train.
  """
  idle = idle_fields(config, model, image_shape)
  for name, _ in unusual(config):
    if name in idle and getattr(config, name):
      raise idle_field(name, getattr(config, name))


def idle_fields(
  config: TrainConfig, model: nn.Module, image_shape: tuple[int, ...]
) -> set[str]:
  """Returns the fields for roles that no trained parameter has, or that are not set.

  Raises:
    UsageError: `freeze` does not fit the parameters.
  """
  fields = {f"{role}_rate_factor": {role} for role in ROLES}
  fields["l2_exempt"] = {*config.l2_exempt}
  changed = {name for name, _ in unusual(config, type(config)())}
  if not changed.intersection(fields) and not config.freeze:
    return {*fields}
  images = jnp.zeros((1, *image_shape))
  params = jax.eval_shape(
    lambda: model.init(jax.random.key(0), images, train=False)["params"]
  )
  trained = parameter_roles(params)
  if config.freeze:
    frozen = frozen_parameters(params, config.freeze)
    trained = jax.tree.map(lambda role, is_: None if is_ else role, trained, frozen)
  found = {*jax.tree.leaves(trained)}
  return {name for name in fields if name not in changed or not found & fields[name]}


def idle_field(name: str, value: Any) -> UsageError:
  """Returns the error for a field whose role no parameter has."""
  return UsageError(
    f"{name} is {value}: no such parameter is trained here, so it must be left out."
  )


def make_schedule(config: TrainConfig, steps_per_epoch: int) -> optax.Schedule:
  """Returns the configured schedule, of step number, with highest value 1.

  A warm-up, of a step at least, multiplies any schedule by what grows linearly from 0
  to 1. The schedule does not wait for its end, but for the cosine, which begins there.

  Raises:
    UsageError: the schedule is unknown.
  """
  if config.schedule not in SCHEDULES:
    raise unknown_name("schedule", config.schedule, SCHEDULES)
  total = config.epochs * steps_per_epoch
  warmup = 0
  if config.warmup_epochs:
    warmup = min(max(1, round(config.warmup_epochs * steps_per_epoch)), total - 1)
  steps = Steps(steps_per_epoch, warmup, total)
  schedule: optax.Schedule = call(SCHEDULES[config.schedule], config, steps)
  if not warmup:
    return schedule
  rise = optax.linear_schedule(0.0, 1.0, warmup)
  return lambda count: rise(count) * schedule(count)


def make_optimizer(
  config: TrainConfig,
  steps_per_epoch: int,
  learning_rate: jax.typing.ArrayLike | None = None,
  optimizer: OptimizerFactory | None = None,
) -> optax.GradientTransformation:
  """Returns the configured optimizer.

  The gradient is clipped; with SGD L2 is then added to it, and momentum accumulates it,
  as in PyTorch; last come the rate and the factor of each parameter's role. The highest
  rate is part of the optimizer's state: runs that differ in it share one compiled
  program. Frozen parameters take no part, and an average sees all of them.

  Args:
    learning_rate: the schedule's highest rate, which may be traced; None: the
      configuration's.
    optimizer: in place of the configuration's, such as `optax.lion`, called with its
      schedule of rates; clipping, factors and the rest stay the configuration's.
  """
  if learning_rate is None:
    learning_rate = config.learning_rate
  transformations = []
  if config.clip_norm is not None:
    transformations.append(optax.clip_by_global_norm(config.clip_norm))
  if config.adaptive_clip is not None:
    transformations.append(adaptive_grad_clip(config.adaptive_clip))
  schedule = make_schedule(config, steps_per_epoch)
  if optimizer is not None:
    peak = learning_rate
    transformations.append(optimizer(lambda step: peak * schedule(step)))
  else:
    transformations += [
      *(call(part, config) for part in OPTIMIZERS[config.optimizer]),
      optax.scale_by_schedule(schedule),
      optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate),
    ]
  factors = config.make_method().rate_factors
  # Without a factor, the state is as it was before there were any.
  by_role = [scale_by_role(factors)] if {*factors.values()} != {1.0} else []
  chain = optax.chain(*transformations, *by_role)
  if config.freeze:
    chain = optax.multi_transform(
      {"trained": chain, "frozen": optax.set_to_zero()},
      lambda params: jax.tree.map(
        lambda frozen: "frozen" if frozen else "trained",
        frozen_parameters(params, config.freeze),
      ),
    )
  if config.ema_decay is not None:
    chain = optax.chain(chain, average_params(config.ema_decay))
  return chain
