"""Checks of a study's configuration that all studies share."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from skipinit_jax.errors import UsageError
from skipinit_jax.training import TrainConfig

_TYPES: dict[type, tuple[type, ...]] = {float: (float, int)}
_TYPE_NAMES: dict[type, str] = {
  bool: "True or False",
  int: "a whole number",
  float: "a number",
  str: "a name",
}


def check_config(
  config: Any, *, varied: Mapping[str, str], optional: Sequence[str] = ()
) -> None:
  """Checks what flags leave unchecked in the configuration of a study.

  Args:
    config: a dataclass with defaults. Its lists, training configurations and searches
      are checked.
    varied: by each field of a training configuration that the study sets itself, the
      field of `config` to use instead.
    optional: the lists that may be empty.

  Raises:
    UsageError: a value is not allowed, or a varied field is not at its default.
  """
  check_lists(config, optional=optional)
  default = type(config)()
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
    config: a dataclass; its lists are its fields of type `tuple`.
    name: what to call it in an error; empty: its fields' names say enough.
    optional: the lists that may be empty.

  Raises:
    UsageError: a list is empty, or holds a value twice or of another type.
  """
  for field in dataclasses.fields(config):
    if typing.get_origin(field.type) is not tuple:
      continue
    place = f"{name}.{field.name}" if name else field.name
    values = getattr(config, field.name)
    if not values and field.name not in optional:
      raise UsageError(f"{place} is empty: name at least one.")
    kind = typing.get_args(field.type)[0]
    for value in values:
      # To Python, True is a whole number too.
      if not isinstance(value, _TYPES.get(kind, kind)) or (
        isinstance(value, bool) and kind is not bool
      ):
        raise UsageError(f"{place} has {value!r}: each must be {_TYPE_NAMES[kind]}.")
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
