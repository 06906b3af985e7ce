"""The text of --help: flags in groups, with their defaults."""

import dataclasses
import inspect
import re
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from skipinit_jax import methods
from skipinit_jax.training import TrainConfig

# The first field of each group.
_GROUPS: Mapping[type, Mapping[str, str]] = {
  TrainConfig: {
    "dataset": "Data",
    "model": "Network",
    "batch_size": "Optimization",
    "seed": "Run",
  }
}
_FIELD = re.compile(r"^  (\w+): (.*(?:\n    .*)*)", re.MULTILINE)
_METHODS = "`skipinit_jax.methods.NAMES`"
_MARGIN = 34
_MAX_WIDTH = 100


def program_help(
  documentation: str,
  own_flags: Sequence[flags.Flag],
  configs: Mapping[str, Callable[[], Any]],
  name: str,
) -> str:
  """Returns the help of a program.

  Args:
    documentation: the program's own, with its examples.
    own_flags: its flags, without --config.
    configs: its configurations, dataclasses, by name; empty where it has none.
    name: the configuration whose values are shown as the defaults.
  """
  rows = [
    (f"--{flag.name}={_default(flag)}", flag.help)
    for flag in sorted(own_flags, key=lambda flag: (not _is_required(flag), flag.name))
  ]
  parts = [documentation.strip(), _section("Flags", rows)]
  if configs:
    config = configs[name]()
    meaning = (
      f"The default values of all that follows: {', '.join(configs)}. Shown are those "
      f"of {name}; --config=NAME --help shows others."
    )
    summary = (inspect.getdoc(type(config)) or "").partition("Attributes:")[0]
    parts.append(_section("Configuration", [(f"--config={name}", meaning)]))
    parts.append(_paragraphs(summary.strip()))
    parts += _config_sections(config)
    parts.append(
      _paragraphs(
        "A field that is true or false also takes --config.FIELD and "
        "--noconfig.FIELD; a tuple is given as --config.FIELD=\"('one', 'two')\"; a "
        "number may be a power, 2^-4."
      )
    )
  parts.append("--helpfull lists the flags of all libraries too.")
  return "\n\n".join(parts)


def _is_required(flag: flags.Flag) -> bool:
  return any(
    flag.name in validator.get_flags_names() and "None" in validator.message
    for validator in flag.validators
  )


def _default(flag: flags.Flag) -> str:
  if _is_required(flag):
    return "... (required)"
  if isinstance(flag.default, list):
    return ",".join(flag.default)
  return "" if flag.default is None else str(flag.default)


def _config_sections(config: Any) -> list[str]:
  """Returns the sections of a configuration's own fields, and of nested ones."""
  groups, documentation = _GROUPS.get(type(config), {}), _fields(type(config))
  title = "Fields"
  sections: dict[str, list[tuple[str, str]]] = {}
  nested: dict[type, list[str]] = {}
  for field in dataclasses.fields(config):
    title = groups.get(field.name, title)
    value, flag = getattr(config, field.name), f"--config.{field.name}"
    row = (f"{flag}={value}", documentation[field.name])
    if dataclasses.is_dataclass(value):
      row = (f"{flag}.FIELD", documentation[field.name] + _changes(value))
      nested.setdefault(type(value), []).append(f"{flag}.FIELD")
    sections.setdefault(title, []).append(row)
  parts = [_section(title, rows) for title, rows in sections.items()]
  for kind, names in nested.items():
    listed = " and ".join(names)
    if kind is TrainConfig:
      parts.append(
        _paragraphs(
          f"Fields of {listed} are those of --config.FIELD in `python -m "
          "experiments.train --help`. The study sets the ones that it varies."
        )
      )
    else:
      parts.append(_section(f"Fields of {listed}", [*_fields(kind).items()]))
  return parts


def _changes(config: Any) -> str:
  """Says which fields have other values than those of their type."""
  usual = type(config)()
  changes = ", ".join(
    f"{field.name}={getattr(config, field.name)}"
    for field in dataclasses.fields(config)
    if getattr(config, field.name) != getattr(usual, field.name)
  )
  return f" Set here: {changes}." if changes else ""


def _fields(config_type: type) -> dict[str, str]:
  """Returns what the docstring says of each field."""
  text = (inspect.getdoc(config_type) or "").partition("Attributes:")[2]
  # The name of a module's table helps nobody who types a flag.
  text = text.replace(_METHODS, f"{_METHODS} ({', '.join(methods.NAMES)})")
  return {name: " ".join(words.split()) for name, words in _FIELD.findall(text)}


def _width() -> int:
  return min(_MAX_WIDTH, shutil.get_terminal_size().columns)


def _paragraphs(text: str) -> str:
  return "\n\n".join(textwrap.fill(part, _width()) for part in text.split("\n\n"))


def _section(title: str, rows: Sequence[tuple[str, str]]) -> str:
  lines = [f"{title}:"]
  for name, text in rows:
    indent = first = " " * _MARGIN
    if len(name) + 2 < _MARGIN:
      first = f"  {name}".ljust(_MARGIN)
    else:
      lines += textwrap.wrap(f"  {name}", _width(), subsequent_indent="    ")
    lines += textwrap.wrap(
      text,
      _width(),
      initial_indent=first,
      subsequent_indent=indent,
      break_on_hyphens=False,
    )
  return "\n".join(lines)
