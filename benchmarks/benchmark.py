"""What all benchmarks share: how they measure in turns, and what they print.

A benchmark's results are one JSON object. Its `tables` have, by name, the rows: numbers
by the title of their column. The tables in a page are those that the program printed.
"""

import contextlib
import importlib.metadata
import json
import pathlib
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from absl import app, flags

from skipinit_jax import document
from skipinit_jax.cores import num_cores
from skipinit_jax.document import Table
from skipinit_jax.errors import UsageError, unexpected_argument
from skipinit_jax.files import read_json

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")

Rows = Sequence[Mapping[str, Any]]
"""Entries by column: text, a number, a `benchmark.summary`, or None."""

# The flags defined here belong to the programs, whose --help shows them.
flags.disclaim_key_flags()

# How numbers of a column are written; others have all their digits.
_FORMATS = {
  "speedup": ".2f",
  "speedup to there": ".2f",
  "SkipInit / unnormalized": ".2f",
  "batch norm / SkipInit": ".2f",
  "of matrix product": ".0%",
  "share": ".0%",
  "layers": ",",
}

_K = TypeVar("_K")
_T = TypeVar("_T")


def run(measure: Callable[[], Mapping[str, Any]]) -> None:
  """Parses the flags, measures, and prints.

  Tables go to standard error, and one JSON object to standard output.

  Args:
    measure: returns the JSON object without the machine's description.
  """

  def main() -> None:
    results = {"machine": machine(), **measure()}
    for table in make_tables(results["tables"]).values():
      document.print_table(table, sys.stderr)
    print(json.dumps(results, indent=2))

  run_program(main)


def run_counts(
  count_missing: Callable[[pathlib.Path], None],
  read_tables: Callable[[pathlib.Path], Mapping[str, Table]],
) -> None:
  """Parses the flags, and prints the tables of the costs in a folder.

  Args:
    count_missing: compiles the steps that the folder's costs.json lacks, with --count.
    read_tables: returns the tables of a folder by name.
  """
  workdir = flags.DEFINE_string(
    "workdir", None, "Directory of costs.json.", required=True
  )
  count = flags.DEFINE_bool("count", False, "Compile the steps that costs.json lacks.")

  def main() -> None:
    folder = pathlib.Path(workdir.value)
    if count.value:
      folder.mkdir(parents=True, exist_ok=True)
      count_missing(folder)
    for table in read_tables(folder).values():
      document.print_table(table)

  run_program(main)


def run_program(main: Callable[[], None]) -> None:
  """Parses the flags and runs a benchmark, where a `UsageError` is one sentence."""

  def guarded(argv: Sequence[str]) -> None:
    try:
      if len(argv) > 1:
        raise unexpected_argument(argv[1])
      main()
    except UsageError as error:
      sys.exit(f"error: {error}")

  app.run(guarded)


def take_turns(ways: Mapping[_K, Callable[[], _T]], rounds: int) -> dict[_K, list[_T]]:
  """Measures each way once a round, so that other work on the machine slows them all.

  Args:
    ways: functions that measure once and return what they found, by name or setting.

  Returns:
    What each way found, round by round.
  """
  found: dict[_K, list[_T]] = {name: [] for name in ways}
  for _ in range(rounds):
    for name, measure in ways.items():
      found[name].append(measure())
  return found


def digits(number: float) -> float:
  """Returns a number to three digits."""
  return float(f"{number:.3g}")


def summary(values: Sequence[float]) -> dict[str, float]:
  """Returns median, smallest and largest value, to three digits."""
  return {
    "median": digits(statistics.median(values)),
    "min": digits(min(values)),
    "max": digits(max(values)),
  }


def machine() -> dict[str, Any]:
  """Returns the machine's cores and the versions of what is measured."""
  versions = {}
  for name in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  return {
    "cpu": _cpu_name(),
    "cores": num_cores(),
    "system": f"{platform.system()} {platform.machine()}, Python "
    f"{platform.python_version()}",
    "versions": versions,
  }


def _cpu_name() -> str:
  with contextlib.suppress(FileNotFoundError):
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        return line.partition(":")[2].strip()
  return platform.processor() or platform.machine()


def make_tables(tables: Mapping[str, Rows]) -> dict[str, Table]:
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


def read_tables(folder: pathlib.Path) -> dict[str, Table]:
  """Returns the tables of all results in a folder."""
  made: dict[str, Table] = {}
  for path in sorted(folder.glob("*.json")):
    made |= make_tables(read_json(path).get("tables", {}))
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
