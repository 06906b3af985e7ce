"""The tables of the benchmarks, on the terminal and in pages.

A benchmark's results are one JSON object. Its `tables` have, by name, the rows: numbers
by the title of their column. The tables in a page are those that the program printed.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from skipinit_jax.document import Table
from skipinit_jax.files import read_json

Rows = Sequence[Mapping[str, Any]]
"""Entries by column: text, a number, a `benchmark.summary`, or None."""

# How numbers of a column are written; others have all their digits.
_FORMATS = {
  "speedup": ".2f",
  "speedup to there": ".2f",
  "SkipInit / unnormalized": ".2f",
  "batch norm / SkipInit": ".2f",
  "of matrix product": ".0%",
  "share": ".0%",
  "layers": ",",
  "its images/s": ",g",
}


def make(tables: Mapping[str, Rows]) -> dict[str, Table]:
  """Returns tables by name, made of their rows by name."""
  return {
    name: Table(
      name,
      name.replace("_", " "),
      [*rows[0]],
      [[_entry(column, value) for column, value in row.items()] for row in rows],
    )
    for name, rows in tables.items()
  }


def read(folder: pathlib.Path) -> dict[str, Table]:
  """Returns the tables of all benchmarks whose results are in a folder."""
  made: dict[str, Table] = {}
  for path in sorted(folder.glob("*.json")):
    made |= make(read_json(path)["tables"])
  return made


def describe_machine(results: Mapping[str, Any]) -> str:
  """Returns the machine of the throughput benchmark in words."""
  machine = results["machine"]
  versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
  product = results["matrix_product_gflops_per_second"]
  return (
    f"{machine['cores']} cores of {machine['cpu']} ({machine['system']}), which "
    f"multiply large float32 matrices at {product:g} GFLOP/s. Versions: {versions}."
  )


def _entry(column: str, value: Any) -> str:
  if value is None or isinstance(value, str):
    return value or ""
  if isinstance(value, dict):
    return f"{value['median']:g} ({value['min']:g} to {value['max']:g})"
  return format(value, _FORMATS.get(column, "g"))
