"""Checks of a study's configuration that all studies share."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from skipinit_jax.errors import UsageError
from skipinit_jax.fields import check_types, usual
from skipinit_jax.training import TrainConfig


def check_config(
  config: Any, *, varied: Mapping[str, str], optional: Sequence[str] = ()
) -> None:
  """Checks what flags leave unchecked in the configuration of a study.

  Args:
    config: a dataclass with defaults. The types of its fields, its lists, training
      configurations and searches are checked.
    varied: by each field of a training configuration that the study sets itself, the
      field of `config` to use instead.
    optional: the lists that may be empty.

  Raises:
    UsageError: a value is not allowed, or a varied field is not at its default.
  """
  check_types(config)
  check_lists(config, optional=optional)
  default = usual(config)
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if isinstance(value, TrainConfig):
      for name, other in varied.items():
        if getattr(value, name) != getattr(getattr(default, field.name), name):
          raise UsageError(
            f"{field.name}.{name} is {getattr(value, name)}, which this study sets "
            f"itself: use {other}."
          )
    elif dataclasses.is_dataclass(value):
      value.validate(field.name)  # type: ignore[union-attr]


def check_lists(config: Any, name: str = "", *, optional: Sequence[str] = ()) -> None:
  """Checks the values of a configuration's lists.

  Args:
    config: a dataclass; its lists are its tuples.
    name: what to call it in an error; empty: its fields' names say enough.
    optional: the lists that may be empty.

  Raises:
    UsageError: a list is empty, or holds a value twice.
  """
  for field in dataclasses.fields(config):
    values = getattr(config, field.name)
    if not isinstance(values, tuple | list):
      continue
    place = f"{name}.{field.name}" if name else field.name
    if not values and field.name not in optional:
      raise UsageError(f"{place} is empty: name at least one.")
    if len(set(values)) < len(values):
      raise UsageError(f"{place} is {values}: it names a value twice.")


def with_and_without_l2(
  methods: Sequence[str], methods_without_l2: Sequence[str], **trains: TrainConfig
) -> list[tuple[str, bool]]:
  """Returns the methods to train, each with whether it has L2.

  Args:
    **trains: the training configurations, by their names in the study's.

  Raises:
    UsageError: there is no method, or those without L2 would be the same as with it.
  """
  if not methods and not methods_without_l2:
    raise UsageError("methods is empty: name at least one method.")
  for name, train in trains.items():
    if methods_without_l2 and train.l2 == 0:
      raise UsageError(
        f"methods_without_l2 is {methods_without_l2}, but {name}.l2 is 0: name them "
        "in methods."
      )
  return [(name, True) for name in methods] + [
    (name, False) for name in methods_without_l2
  ]
