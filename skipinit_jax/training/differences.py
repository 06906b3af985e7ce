"""What two configurations differ in, in words."""

import json
from collections.abc import Mapping
from typing import Any

from skipinit_jax.training.metrics import to_json


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
  """Returns a clause for each value that differs.

  Args:
    there: nested dicts of what `to_json` takes.
    here: likewise.

  Returns:
    Such as "model.depth is 16 there and absent here", by the values' dotted names.
  """
  flat_there, flat_here = _flatten(to_json(there)), _flatten(to_json(here))

  def show(flat: Mapping[str, Any], name: str) -> str:
    return json.dumps(flat[name]) if name in flat else "absent"

  return [
    f"{name} is {show(flat_there, name)} there and {show(flat_here, name)} here"
    for name in flat_there | flat_here
    if name not in flat_there
    or name not in flat_here
    or flat_there[name] != flat_here[name]
  ]


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns the values of nested dicts by their dotted names."""
  flat: dict[str, Any] = {}
  for name, value in config.items():
    if isinstance(value, Mapping) and value:
      flat |= _flatten(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = value
  return flat
