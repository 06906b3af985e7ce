"""The tables of the benchmarks, on the terminal and in pages.

A benchmark's results are one JSON object. Its tables are made of that object alone, so
that those in a page are the ones that the program printed.
"""

import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from skipinit_jax import document
from skipinit_jax.document import Table

Results = dict[str, Any]

OURS = "skipinit_jax"
"""The peer that is this package."""


def show(benchmark: str, results: Results) -> None:
  """Prints tables to standard error, and the JSON object to standard output.

  Args:
    benchmark: the name of the program, such as "throughput".
    results: what it measured.
  """
  for table in make(benchmark, results):
    document.print_table(table, sys.stderr)
  print(json.dumps(results, indent=2))


def make(benchmark: str, results: Results) -> list[Table]:
  """Returns the tables of a benchmark.

  Args:
    benchmark: the name of the program.
    results: what it measured.
  """
  return _TABLES[benchmark](results)


def read(folder: pathlib.Path) -> dict[str, Table]:
  """Returns the tables of a folder of results by name.

  Args:
    folder: its files are named like the benchmarks, such as throughput.json.
  """
  made = [
    make(path.stem, json.loads(path.read_text("utf-8")))
    for path in sorted(folder.glob("*.json"))
  ]
  return {table.name: table for each in made for table in each}


def describe_machine(results: Results) -> str:
  """Returns the machine of the throughput benchmark in words."""
  machine = results["machine"]
  versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
  product = results["matrix_product_gflops_per_second"]
  return (
    f"{machine['cores']} cores of {machine['cpu']} ({machine['system']}), which "
    f"multiply large float32 matrices at {product:g} GFLOP/s. Versions: {versions}."
  )


def _range(summary: Mapping[str, float]) -> str:
  return f"{summary['median']:g} ({summary['min']:g} to {summary['max']:g})"


def _peers(cases: Sequence[Results]) -> Iterator[tuple[Results, str, Results, Results]]:
  """Yields each case with each peer's name and row, and with our row."""
  for case in cases:
    for name, row in case["peers"].items():
      yield case, name, row, case["peers"][OURS]


def _quotient(numerator: float, denominator: float) -> str:
  """Returns how many times one is the other; nothing for a peer beside itself."""
  return "" if numerator == denominator else f"{numerator / denominator:.2f}"


def _throughput(results: Results) -> list[Table]:
  product = results["matrix_product_gflops_per_second"]
  rows = [
    [
      f"{case['name'].split(',')[0]}, {case['case']['method']}, {name}",
      f"{peer['images_per_second']:g}",
      _quotient(ours["images_per_second"], peer["images_per_second"]),
      _range(peer["step_seconds"]),
      f"{peer['gflops_per_second'] / product:.0%}",
      f"{peer['seconds_to_first_step']:g}",
      f"{peer['peak_gigabytes']:g}",
    ]
    for case, name, peer, ours in _peers(results["cases"])
  ]
  header = [
    *("network and peer", "images/s", "speedup", "seconds a step"),
    *("of matrix product", "seconds to first step", "peak GB"),
  ]
  return [Table("throughput", "Train steps", header, rows)]


def _depth(results: Results) -> list[Table]:
  compared = [
    [
      f"batch {case['case']['batch_size']}, {name}",
      _range(peer["step_seconds"]),
      _quotient(peer["step_seconds"]["median"], ours["step_seconds"]["median"]),
      f"{peer['seconds_to_first_step']:g}",
      _quotient(peer["seconds_to_first_step"], ours["seconds_to_first_step"]),
      f"{peer['peak_gigabytes']:g}",
    ]
    for case, name, peer, ours in _peers(results["comparison"])
  ]
  by_depth = [
    [
      f"{case['case']['depth']:,}",
      f"{case['compile_seconds']:g}",
      f"{peer['seconds_to_first_step']:g}",
      f"{peer['step_seconds']['median']:g}",
      *(f"{megabytes:g}" for megabytes in case["activation_megabytes"].values()),
    ]
    for case, _, peer, _ in _peers(results["by_depth"])
  ]
  peers = [
    *("peer", "seconds a step", "speedup", "seconds to first step", "speedup"),
    "peak GB",
  ]
  depths = [
    *("layers", "seconds to compile a step", "to first step", "a step"),
    *("MB of activations", "MB with remat"),
  ]
  return [
    Table("depth", results["comparison"][0]["name"], peers, compared),
    Table("by_depth", "This package, by depth", depths, by_depth),
  ]


def _skipinit_cost(results: Results) -> list[Table]:
  rows = []
  for case in results["by_batch_size"]:
    for library, methods in case["step_seconds"].items():
      seconds = {method: step["median"] for method, step in methods.items()}
      rows.append(
        [
          f"batch {case['batch_size']}, {library}",
          *map(_range, methods.values()),
          f"{seconds['skipinit'] / seconds['unnormalized']:.2f}",
          f"{seconds['batch_norm'] / seconds['skipinit']:.2f}",
        ]
      )
  header = [
    *("", "seconds a step, SkipInit", "unnormalized", "batch norm"),
    *("SkipInit / unnormalized", "batch norm / SkipInit"),
  ]
  activations = results["activations"]
  megabytes = [f"{size:g}" for size in activations["megabytes"].values()]
  return [
    Table("skipinit_cost", results["network"], header, rows),
    Table(
      "activations",
      f"Activations, batch {activations['batch_size']}",
      ["", "SkipInit", "unnormalized", "batch norm"],
      [["MB", *megabytes]],
    ),
  ]


def _train_loop(results: Results) -> list[Table]:
  rows = [
    [
      f"{case['network']}, {name}",
      _range(loop["epoch_seconds"]),
      f"{loop['images_per_second']['median']:g}",
      f"{case['bare_step']['images_per_second']['median']:g}",
      f"{loop['share_of_bare_step']['median']:.0%}",
    ]
    for case in results["cases"]
    for name, loop in case["loop"].items()
  ]
  header = [
    *("network, and the loop with", "seconds an epoch", "images/s", "bare step's"),
    "share",
  ]
  return [Table("train_loop", "The train loop", header, rows)]


def _trials(results: Results) -> list[Table]:
  rows = [
    [
      f"{way['workers']} x {way['threads_per_worker']} thread"
      + "s" * (way["threads_per_worker"] > 1)
      + ", the default" * way["is_default"],
      _range(way["trials_per_hour"]),
      _range(way["trials_per_hour_from_command"]),
    ]
    for way in results["ways"]
  ]
  header = ["processes", "trials an hour", "from the command on"]
  return [Table("trials", "Trials of a search", header, rows)]


def _start(results: Results) -> list[Table]:
  rows = [
    [f"{result['network']}, {cache}", _range(seconds)]
    for result in results["results"]
    for cache, seconds in result["seconds_to_first_step"].items()
  ]
  return [Table("start", "The first step", ["", "seconds to the first step"], rows)]


def _convolutions(results: Results) -> list[Table]:
  rows = [
    [
      row["name"],
      *(
        " / ".join(f"{speed['median']:g}" for speed in libraries.values())
        for libraries in row["gflops_per_second"].values()
      ),
    ]
    for row in results["convolutions"]
  ]
  title = f"GFLOP/s here / in PyTorch, batch {results['batch_size']}"
  header = [title, *results["convolutions"][0]["gflops_per_second"]]
  return [Table("convolutions", "Convolutions", header, rows)]


def _decode(results: Results) -> list[Table]:
  rates = {
    **results["images_per_core_second"],
    **{
      f"skipinit_jax, whole pipeline, workers: {workers}": way["images_per_core_second"]
      for workers, way in results["pipeline_by_workers"].items()
    },
  }
  chips = [
    [name, f"{chip['images_per_second']:,g}", str(chip["cores"])]
    for name, chip in results["chips"].items()
  ]
  return [
    Table(
      "decode",
      "Decode and crop",
      ["way", "images for each second of a core"],
      [[name, _range(rate)] for name, rate in rates.items()],
    ),
    Table("chips", "What feeds a chip", ["chip", "its images/s", "cores"], chips),
  ]


def _signal_log(results: Results) -> list[Table]:
  header = [name.replace("_", " ") for name in results["results"][0]]
  rows = [[*map(str, result.values())] for result in results["results"]]
  return [Table("signal_log", "The log of the signal", header, rows)]


_TABLES: dict[str, Callable[[Results], list[Table]]] = {
  "throughput": _throughput,
  "depth": _depth,
  "skipinit_cost": _skipinit_cost,
  "train_loop": _train_loop,
  "trials": _trials,
  "start": _start,
  "convolutions": _convolutions,
  "decode": _decode,
  "signal_log": _signal_log,
}
