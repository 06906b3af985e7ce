"""What all benchmarks share: how they measure in turns, and what they print."""

import contextlib
import importlib.metadata
import json
import pathlib
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from absl import app

from benchmarks import tables
from skipinit_jax import document
from skipinit_jax.cores import num_cores
from skipinit_jax.errors import UsageError

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")

_K = TypeVar("_K")
_T = TypeVar("_T")


def run(measure: Callable[[], Mapping[str, Any]]) -> None:
  """Parses the flags, measures, and prints.

  Tables go to standard error, and one JSON object to standard output.

  Args:
    measure: returns the JSON object without the machine's description. Its `tables`
      are those of `benchmarks.tables`.
  """

  def main(_: Sequence[str]) -> None:
    try:
      results = {"machine": machine(), **measure()}
    except UsageError as error:
      sys.exit(f"error: {error}")
    for table in tables.make(results["tables"]).values():
      document.print_table(table, sys.stderr)
    print(json.dumps(results, indent=2))

  app.run(main)


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
