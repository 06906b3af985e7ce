"""Fields of configurations, which are dataclasses: their types, and who takes them."""

import copy
import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from skipinit_jax.errors import UsageError
from skipinit_jax.files import as_type, to_json

_Config = TypeVar("_Config")

_WORDS: dict[Any, str] = {
  bool: "True or False",
  int: "a whole number",
  float: "a number",
  str: "a name",
  types.NoneType: "None",
}
_USUAL = "_usual"


def check_types(config: Any, name: str = "") -> None:
  """Checks the types of all fields, those of nested dataclasses too.

  Args:
    config: a dataclass. What `as_type` does not check is not checked.
    name: what to call it in an error; empty: its fields' names say enough.

  Raises:
    UsageError: a value is not what its field's annotation says.
  """
  kind_of_config: Any = type(config)
  hints = _hints(kind_of_config)
  for field in dataclasses.fields(config):
    place = f"{name}.{field.name}" if name else field.name
    value, kind = getattr(config, field.name), hints[field.name]
    nested = [
      each
      for each in typing.get_args(kind) or [kind]
      if isinstance(each, type) and dataclasses.is_dataclass(each)
    ]
    if isinstance(value, (*nested,)):
      check_types(value, place)
    elif kind in nested or not _is(value, kind):
      raise UsageError(f"{place} is {value!r}: it must be {_in_words(kind)}.")


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
  return typing.get_type_hints(kind)


def _is(value: Any, kind: Any) -> bool:
  try:
    as_type(kind, value)
  except ValueError:
    return False
  return True


def _in_words(kind: Any) -> str:
  arguments = typing.get_args(kind)
  if typing.get_origin(kind) is tuple:
    return f"a tuple, each {_in_words(arguments[0])}"
  if arguments:
    return " or ".join(map(_in_words, arguments))
  return _WORDS.get(kind, f"a {getattr(kind, '__name__', kind)}")


@functools.cache
def taken(part: Callable[..., Any]) -> frozenset[str]:
  """Returns the names of the fields that a function or class takes: its parameters."""
  return frozenset(inspect.signature(part).parameters)


def call(part: Callable[..., Any], config: Any, *arguments: Any, **given: Any) -> Any:
  """Calls a function or class with the fields that it takes.

  Args:
    part: what is called; a parameter named as a field of `config` gets that.
    *arguments: positional arguments, for other parameters.
    **given: arguments in place of fields, and others.
  """
  names = taken(part) & {field.name for field in dataclasses.fields(config)}
  fields = {name: getattr(config, name) for name in names}
  return part(*arguments, **{**fields, **given})


def take_as_usual(config: _Config) -> _Config:
  """Makes the values that a configuration has now its usual ones.

  A named configuration sets fields that nobody asked for. A field without effect is an
  error only where it differs from that.

  Returns:
    The configuration itself.
  """
  setattr(config, _USUAL, copy.deepcopy(config))
  for field in dataclasses.fields(config):  # type: ignore[arg-type]
    if dataclasses.is_dataclass(value := getattr(config, field.name)):
      take_as_usual(value)
  return config


def usual(config: _Config) -> _Config:
  """Returns the usual values: those of `take_as_usual`, or else the type's defaults."""
  return getattr(config, _USUAL, None) or type(config)()


def unusual(config: _Config, than: Any = None) -> Iterator[tuple[str, _Config]]:
  """Yields the fields with other values than the usual ones, nested ones too.

  Args:
    than: the usual values; None: those of `usual`.

  Yields:
    The field's dotted name, and a configuration in which it alone is as usual.
  """
  than = usual(config) if than is None else than
  for field in dataclasses.fields(config):  # type: ignore[arg-type]
    value, other = getattr(config, field.name), getattr(than, field.name)
    changes: list[tuple[str, Any]] = []
    if dataclasses.is_dataclass(value):
      changes = [(f".{name}", nested) for name, nested in unusual(value, other)]
    # JSON has lists in place of tuples.
    elif to_json(value) != to_json(other):
      changes = [("", other)]
    for name, change in changes:
      changed = copy.copy(config)
      setattr(changed, field.name, change)
      yield field.name + name, changed
