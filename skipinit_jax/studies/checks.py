"""Checks that the configurations of all studies share."""

import dataclasses
import typing
from collections.abc import Sequence

from skipinit_jax.errors import UsageError
from skipinit_jax.training import TrainConfig

_KINDS: dict[type, tuple[type, ...]] = {float: (float, int)}
_NAMES: dict[type, str] = {
  bool: "True or False",
  int: "a whole number",
  float: "a number",
  str: "a name",
}


def check_lists(config: object, name: str = "", *, filled: Sequence[str] = ()) -> None:
  """Checks the values of a configuration's lists, which flags leave unchecked.

  Args:
    config: a dataclass.
    name: what to call it in an error; empty: its fields' names say enough.
    filled: names of the lists that may not be empty.

  Raises:
    UsageError: a list holds a value of another type than its own, or one twice, or is
      empty and may not be.
  """
  for field_name in filled:
    if not getattr(config, field_name):
      raise UsageError(f"{field_name} is empty: name at least one.")
  assert dataclasses.is_dataclass(config)
  for field in dataclasses.fields(config):
    if typing.get_origin(field.type) is not tuple:
      continue
    place = f"{name}.{field.name}" if name else field.name
    values = getattr(config, field.name)
    kind = typing.get_args(field.type)[0]
    for value in values:
      # To Python, True is a whole number too.
      if not isinstance(value, _KINDS.get(kind, kind)) or (
        isinstance(value, bool) and kind is not bool
      ):
        raise UsageError(f"{place} has {value!r}: each must be {_NAMES[kind]}.")
    if len(set(values)) < len(values):
      raise UsageError(f"{place} is {values}: it names a value twice.")


def refuse_l2_twice(
  config: TrainConfig, name: str, methods_without_l2: tuple[str, ...]
) -> None:
  """Checks that methods without L2 differ from those with it.

  Args:
    config: the training configuration with L2.
    name: its name in the study's configuration.
    methods_without_l2: names of the methods to train also without L2.

  Raises:
    UsageError: nothing is trained with L2.
  """
  if methods_without_l2 and config.l2 == 0:
    raise UsageError(
      f"methods_without_l2 is {methods_without_l2}, but {name}.l2 is 0: name them "
      "in methods."
    )


def refuse_fields(
  config: TrainConfig, name: str, default: TrainConfig, instead: dict[str, str]
) -> None:
  """Checks that a study's training configuration leaves alone what the study sets.

  Args:
    config: the training configuration.
    name: its name in the study's configuration.
    default: the values that it may have.
    instead: by each field that the study sets, the field to use for it.

  Raises:
    UsageError: such a field has another value.
  """
  for field, other in instead.items():
    value = getattr(config, field)
    if value != getattr(default, field):
      raise UsageError(
        f"{name}.{field} is {value}, which this study sets itself: use {other}."
      )
