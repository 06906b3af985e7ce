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


def _depth(results: dict[str, Any]) -> str:
  rows = []
  for case in results["comparison"]:
    ours = case["peers"][_OURS]
    for name, row in case["peers"].items():
      step, first = row["step_seconds"], row["seconds_to_first_step"]
      shares = [
        f"{step['median'] / ours['step_seconds']['median']:.2f}",
        f"{first / ours['seconds_to_first_step']:.1f}",
      ]
      rows.append(
        [
          f"batch {case['case']['batch_size']}, {name}",
          _range(step),
          "" if name == _OURS else shares[0],
          f"{first:g}",
          "" if name == _OURS else shares[1],
          f"{row['peak_gigabytes']:g}",
        ]
      )
  header = [
    *("peer", "seconds a step", "times ours", "seconds to first step", "times ours"),
    "peak GB",
  ]
  return _table(header, rows)


def _by_depth(results: dict[str, Any]) -> str:
  rows = []
  for case in results["by_depth"]:
    peer, memory = case["peers"][_OURS], case["activation_megabytes"]
    rows.append(
      [
        f"{case['case']['depth']:,}",
        f"{case['compile_seconds']:g}",
        f"{peer['seconds_to_first_step']:g}",
        f"{peer['step_seconds']['median']:g}",
        f"{memory['without_remat']:g}",
        f"{memory['with_remat']:g}",
      ]
    )
  header = [
    *("layers", "seconds to compile a step", "to first step", "a step"),
    *("MB of activations", "MB with `remat`"),
  ]
  return _table(header, rows)


def _skipinit_cost(results: dict[str, Any]) -> str:
  rows = []
  for case in results["by_batch_size"]:
    for library, methods in case["step_seconds"].items():
      seconds = {method: step["median"] for method, step in methods.items()}
      rows.append(
        [
          f"batch {case['batch_size']}, {library}",
          *(_range(step) for step in methods.values()),
          f"{seconds['skipinit'] / seconds['unnormalized']:.2f}",
          f"{seconds['batch_norm'] / seconds['skipinit']:.2f}",
        ]
      )
  header = [
    *("", "seconds a step, SkipInit", "unnormalized", "batch norm"),
    *("SkipInit / unnormalized", "batch norm / SkipInit"),
  ]
  return _table(header, rows)


def _activations(results: dict[str, Any]) -> str:
  megabytes = results["activations"]["megabytes"]
  header = ["", "SkipInit", "unnormalized", "batch norm"]
  return _table(header, [["MB", *(f"{size:g}" for size in megabytes.values())]])


def _train_loop(results: dict[str, Any]) -> str:
  rows = []
  for case in results["cases"]:
    bare = case["bare_step"]["images_per_second"]["median"]
    for name, loop in case["loop"].items():
      rows.append(
        [
          f"{case['network']}, {name}",
          _range(loop["epoch_seconds"]),
          f"{loop['images_per_second']['median']:g}",
          f"{bare:g}",
          f"{loop['share_of_bare_step']['median']:.0%}",
        ]
      )
  header = [
    *("network, and the loop with", "seconds an epoch", "images/s", "bare step's"),
    "share",
  ]
  return _table(header, rows)


def _trials(results: dict[str, Any]) -> str:
  rows = []
  for way in results["ways"]:
    threads = way["threads_per_worker"]
    rows.append(
      [
        f"{way['workers']} x {threads} thread{'s' * (threads > 1)}"
        + ", the default" * way["is_default"],
        _range(way["trials_per_hour"]),
        _range(way["trials_per_hour_from_command"]),
      ]
    )
  header = ["processes", "trials an hour", "from the command on"]
  return _table(header, rows)


def _start(results: dict[str, Any]) -> str:
  rows = []
  for result in results["results"]:
    for cache in ("empty", "filled"):
      start = result[f"{cache}_cache"]
      rows.append(
        [
          f"{result['network']}, {cache} cache",
          _range(start["seconds_to_start_of_step"]),
          _range(start["seconds_to_end_of_step"]),
        ]
      )
  header = ["", "seconds to the start of the first step", "to its end"]
  return _table(header, rows)


def _convolutions(results: dict[str, Any]) -> str:
  rows = []
  for row in results["convolutions"]:
    passes = row["gflops_per_second"].values()
    rows.append(
      [
        row["name"],
        *(" / ".join(f"{s['median']:g}" for s in each.values()) for each in passes),
      ]
    )
  header = [f"GFLOP/s here / in PyTorch, batch {results['batch_size']}"]
  header += [*results["convolutions"][0]["gflops_per_second"]]
  return _table(header, rows)


# By name: the program that measured it, and how the table is made.
_TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
  "machine": ("throughput", _machine),
  "throughput": ("throughput", _throughput),
  "depth": ("depth", _depth),
  "by_depth": ("depth", _by_depth),
  "skipinit_cost": ("skipinit_cost", _skipinit_cost),
  "activations": ("skipinit_cost", _activations),
  "train_loop": ("train_loop", _train_loop),
  "trials": ("trials", _trials),
  "start": ("start", _start),
  "convolutions": ("convolutions", _convolutions),
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
