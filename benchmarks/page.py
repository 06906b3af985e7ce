"""Writes the tables of docs/performance.md from the measurements.

Each benchmark's JSON object is a file in results/performance, named like the program.
The page's other text stays as it is; a table stands between two comments, of which the
first names it.

Example:
  python -m benchmarks.page
"""

import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from experiments import program
from skipinit_jax.errors import UsageError

_ROOT = pathlib.Path(__file__).parents[1]
_RESULTS = _ROOT / "results" / "performance"
_PAGE = _ROOT / "docs" / "performance.md"
_TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_OURS = "skipinit_jax"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _machine(results: dict[str, Any]) -> str:
  machine = results["machine"]
  versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
  product = results["matrix_product_gflops_per_second"]
  return (
    f"{machine['cores']} cores of {machine['cpu']} ({machine['system']}), which "
    f"multiply large float32 matrices at {product:g} GFLOP/s. Versions: {versions}.\n"
  )


def _range(summary: dict[str, float]) -> str:
  return f"{summary['median']:g} ({summary['min']:g} to {summary['max']:g})"


def _throughput(results: dict[str, Any]) -> str:
  product = results["matrix_product_gflops_per_second"]
  rows = []
  for case in results["cases"]:
    ours = case["peers"][_OURS]["images_per_second"]
    network = case["name"].split(",")[0]
    for name, row in case["peers"].items():
      rows.append(
        [
          f"{network}, {case['case']['method']}, {name}",
          f"{row['images_per_second']:g}",
          "" if name == _OURS else f"{ours / row['images_per_second']:.2f}",
          _range(row["step_seconds"]),
          f"{row['gflops_per_second'] / product:.0%}",
          f"{row['seconds_to_first_step']:g}",
          f"{row['peak_gigabytes']:g}",
        ]
      )
  header = [
    *("network and peer", "images/s", "ours, in its speed", "seconds a step"),
    *("of matrix product", "seconds to first step", "peak GB"),
  ]
  return _table(header, rows)


_TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
  "machine": ("throughput", _machine),
  "throughput": ("throughput", _throughput),
}


def fill(page: str, results: pathlib.Path) -> str:
  """Returns the page with the tables of the measurements.

  Args:
    page: the page.
    results: the folder of the measurements.

  Raises:
    UsageError: the page names a table that there is none of, or a file is missing.
  """

  def replace(match: re.Match[str]) -> str:
    name = match[2]
    if name not in _TABLES:
      raise UsageError(f"The page names a table {name!r}: there are {[*_TABLES]}.")
    source, make = _TABLES[name]
    path = results / f"{source}.json"
    if not path.exists():
      raise UsageError(f"{path} is missing: `make bench` writes it.")
    return match[1] + make(json.loads(path.read_text("utf-8"))) + match[3]

  return _TABLE.sub(replace, page)


def main() -> None:
  """Runs the program."""
  _PAGE.write_text(fill(_PAGE.read_text("utf-8"), _RESULTS), "utf-8")
  print(f"Tables: {_PAGE.relative_to(_ROOT)}")


if __name__ == "__main__":
  program.run(main)
