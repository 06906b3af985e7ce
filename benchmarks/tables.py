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

_OURS = "skipinit_jax"


def show(benchmark: str, results: Results) -> None:
  """Prints tables to standard error, and the JSON object to standard output.

  Args:
    benchmark: the name of the program, such as "throughput".
    results: what it measured.
  """
  for table in _TABLES[benchmark](results):
    document.print_table(table, sys.stderr)
  print(json.dumps(results, indent=2))


def read(folder: pathlib.Path) -> dict[str, Table]:
  """Returns the tables of a folder of results by name.

  Args:
    folder: its files are named like the benchmarks, such as throughput.json.
  """
  made = [
    _TABLES[path.stem](json.loads(path.read_text("utf-8")))
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


def _table(name: str, title: str, rows: Sequence[Mapping[str, str]]) -> Table:
  """Returns a table of rows that have their entries by the column's header."""
  return Table(name, title, list(rows[0]), [list(row.values()) for row in rows])


def _range(summary: Mapping[str, float]) -> str:
  return f"{summary['median']:g} ({summary['min']:g} to {summary['max']:g})"


def _peers(cases: Sequence[Results]) -> Iterator[tuple[Results, str, Results, Results]]:
  """Yields each case with each peer's name and row, and with our row."""
  for case in cases:
    for name, row in case["peers"].items():
      yield case, name, row, case["peers"][_OURS]


def _speedup(theirs: float, ours: float) -> str:
  """Returns how many times as long the peer takes; nothing for ourselves."""
  return "" if theirs == ours else f"{theirs / ours:.2f}"


def _throughput(results: Results) -> list[Table]:
  product = results["matrix_product_gflops_per_second"]
  rows = [
    {
      "network and peer": f"{case['name'].split(',')[0]}, {case['case']['method']}, "
      f"{name}",
      "images/s": f"{peer['images_per_second']:g}",
      "speedup": _speedup(1 / peer["images_per_second"], 1 / ours["images_per_second"]),
      "seconds a step": _range(peer["step_seconds"]),
      "of matrix product": f"{peer['gflops_per_second'] / product:.0%}",
      "seconds to first step": f"{peer['seconds_to_first_step']:g}",
      "peak GB": f"{peer['peak_gigabytes']:g}",
    }
    for case, name, peer, ours in _peers(results["cases"])
  ]
  return [_table("throughput", "Train steps", rows)]


def _depth(results: Results) -> list[Table]:
  peers = [
    {
      "peer": f"batch {case['case']['batch_size']}, {name}",
      "seconds a step": _range(peer["step_seconds"]),
      "speedup": _speedup(
        peer["step_seconds"]["median"], ours["step_seconds"]["median"]
      ),
      "seconds to first step": f"{peer['seconds_to_first_step']:g}",
      "speedup to there": _speedup(
        peer["seconds_to_first_step"], ours["seconds_to_first_step"]
      ),
      "peak GB": f"{peer['peak_gigabytes']:g}",
    }
    for case, name, peer, ours in _peers(results["comparison"])
  ]
  depths = [
    {
      "layers": f"{case['case']['depth']:,}",
      "seconds to compile a step": f"{case['compile_seconds']:g}",
      "to first step": f"{peer['seconds_to_first_step']:g}",
      "a step": f"{peer['step_seconds']['median']:g}",
      "MB of activations": f"{case['activation_megabytes']['without_remat']:g}",
      "MB with remat": f"{case['activation_megabytes']['with_remat']:g}",
    }
    for case, _, peer, _ in _peers(results["by_depth"])
  ]
  return [
    _table("depth", results["comparison"][0]["name"], peers),
    _table("by_depth", "This package, by depth", depths),
  ]


def _skipinit_cost(results: Results) -> list[Table]:
  rows = []
  for case in results["by_batch_size"]:
    for library, steps in case["step_seconds"].items():
      seconds = {method: step["median"] for method, step in steps.items()}
      rows.append(
        {
          "library": f"batch {case['batch_size']}, {library}",
          "seconds a step, SkipInit": _range(steps["skipinit"]),
          "unnormalized": _range(steps["unnormalized"]),
          "batch norm": _range(steps["batch_norm"]),
          "SkipInit / unnormalized": (
            f"{seconds['skipinit'] / seconds['unnormalized']:.2f}"
          ),
          "batch norm / SkipInit": f"{seconds['batch_norm'] / seconds['skipinit']:.2f}",
        }
      )
  activations = results["activations"]
  megabytes = {
    "": "MB",
    **{method: f"{size:g}" for method, size in activations["megabytes"].items()},
  }
  title = f"Activations, batch {activations['batch_size']}"
  return [
    _table("skipinit_cost", results["network"], rows),
    _table("activations", title, [megabytes]),
  ]


def _train_loop(results: Results) -> list[Table]:
  rows = [
    {
      "network, and the loop with": f"{case['network']}, {name}",
      "seconds an epoch": _range(loop["epoch_seconds"]),
      "images/s": f"{loop['images_per_second']['median']:g}",
      "bare step's": f"{case['bare_step']['images_per_second']['median']:g}",
      "share": f"{loop['share_of_bare_step']['median']:.0%}",
    }
    for case in results["cases"]
    for name, loop in case["loop"].items()
  ]
  return [_table("train_loop", "The train loop", rows)]


def _trials(results: Results) -> list[Table]:
  rows = [
    {
      "processes": f"{way['workers']} x {way['threads_per_worker']} thread"
      + "s" * (way["threads_per_worker"] > 1)
      + ", the default" * way["is_default"],
      "trials an hour": _range(way["trials_per_hour"]),
      "from the command on": _range(way["trials_per_hour_from_command"]),
    }
    for way in results["ways"]
  ]
  return [_table("trials", "Trials of a search", rows)]


def _start(results: Results) -> list[Table]:
  rows = [
    {
      "network": f"{result['network']}, {cache}",
      "seconds to the first step": _range(seconds),
    }
    for result in results["results"]
    for cache, seconds in result["seconds_to_first_step"].items()
  ]
  return [_table("start", "The first step", rows)]


def _convolutions(results: Results) -> list[Table]:
  title = f"GFLOP/s here / in PyTorch, batch {results['batch_size']}"
  rows = [
    {
      title: row["name"],
      **{
        gradient: " / ".join(f"{speed['median']:g}" for speed in libraries.values())
        for gradient, libraries in row["gflops_per_second"].items()
      },
    }
    for row in results["convolutions"]
  ]
  return [_table("convolutions", "Convolutions", rows)]


def _decode(results: Results) -> list[Table]:
  rates = {
    **results["images_per_core_second"],
    **{
      f"skipinit_jax, whole pipeline, workers: {workers}": way["images_per_core_second"]
      for workers, way in results["pipeline_by_workers"].items()
    },
  }
  ways = [
    {"way": name, "images for each second of a core": _range(rate)}
    for name, rate in rates.items()
  ]
  chips = [
    {
      "chip": name,
      "its images/s": f"{chip['images_per_second']:,g}",
      "cores": str(chip["cores"]),
    }
    for name, chip in results["chips"].items()
  ]
  return [
    _table("decode", "Decode and crop", ways),
    _table("chips", "What feeds a chip", chips),
  ]


def _signal_log(results: Results) -> list[Table]:
  rows = [
    {name.replace("_", " "): str(value) for name, value in row.items()}
    for row in results["results"]
  ]
  return [_table("signal_log", "The log of the signal", rows)]


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
