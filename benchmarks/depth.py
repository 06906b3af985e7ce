"""Compares networks of 1000 layers here, in PyTorch and in unrolled Flax.

Wide-ResNets of width 1 on images of 8x8 with SkipInit, by `benchmarks.side_by_side`.
Then this package alone trains 100, 1000 and 10,000 layers.

Example:
  python -m benchmarks.depth
"""

import dataclasses
import json
import time
from typing import Any

import rich.console
import rich.table
from absl import flags

from benchmarks import machine, peer_jax, side_by_side
from benchmarks.side_by_side import Case
from experiments import program

_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each peer.", lower_bound=1)

_DEPTH = 1000
_DEPTHS = (100, 1000, 10_000)
_BATCH_SIZES = (16, 64)


def _case(depth: int, batch_size: int) -> Case:
  return Case(depth, 1, image_size=8, batch_size=batch_size, method="skipinit")


def _compile(depth: int) -> dict[str, Any]:
  """Returns how long a step compiles, and the memory of its activations.

  That is what the compiled program's memory grows by from one batch to twice the batch;
  parameters, gradients and momentum do not depend on the batch.
  """
  activations, seconds = {}, []
  for name, remat in (("without_remat", False), ("with_remat", True)):
    sizes = []
    for batch_size in (_BATCH_SIZES[-1], 2 * _BATCH_SIZES[-1]):
      case = dataclasses.replace(_case(depth, batch_size), remat=remat)
      step, arguments = peer_jax.make_train(**dataclasses.asdict(case), shapes=True)
      lowered = step.lower(*arguments)
      begin = time.perf_counter()
      compiled = lowered.compile()
      seconds.append(time.perf_counter() - begin)
      # JAX's types allow that a backend has no analysis.
      memory: Any = compiled.memory_analysis()
      sizes.append(memory.temp_size_in_bytes)
    activations[name] = float(f"{(sizes[1] - sizes[0]) / 1e6:.3g}")
  return {
    "compile_seconds": float(f"{seconds[0]:.3g}"),
    "activation_megabytes": activations,
  }


def measure() -> dict[str, Any]:
  """Returns the JSON object."""
  comparison = []
  for batch_size in _BATCH_SIZES:
    peers = [side_by_side.SKIPINIT_JAX, side_by_side.TORCH_EAGER]
    if batch_size == _BATCH_SIZES[0]:
      # It compiles for minutes, as long for one size of batch as for another.
      peers.append(side_by_side.FLAX)
    case = _case(_DEPTH, batch_size)
    comparison.append(side_by_side.measure(case, peers, _ROUNDS.value))
  alone = []
  for depth in _DEPTHS:
    case = _case(depth, _BATCH_SIZES[0])
    measured = side_by_side.measure(case, [side_by_side.SKIPINIT_JAX], rounds=1)
    alone.append({**measured, **_compile(depth)})
  return {
    "machine": machine.description(),
    "comparison": comparison,
    "by_depth": alone,
  }


def main() -> int:
  """Prints tables to standard error, and one JSON object to standard output."""
  results = measure()
  console = rich.console.Console(stderr=True, width=100)
  for case in results["comparison"]:
    ours = case["peers"][side_by_side.SKIPINIT_JAX.name]
    table = rich.table.Table(
      *("peer", "step, s", "ours takes", "first step, s", "ours takes", "GB"),
      title=case["name"],
      title_justify="left",
    )
    for name, row in case["peers"].items():
      seconds, first = row["step_seconds"]["median"], row["seconds_to_first_step"]
      table.add_row(
        name,
        f"{seconds:g}",
        f"{ours['step_seconds']['median'] / seconds:.2f} of it",
        f"{first:g}",
        f"{ours['seconds_to_first_step'] / first:.2f} of it",
        f"{row['peak_gigabytes']:g}",
      )
    console.print(table)
  table = rich.table.Table(
    *("layers", "step, s", "first step, s", "compile, s"),
    *("MB of activations", "with remat"),
    title=f"skipinit_jax by depth (activations: batch {_BATCH_SIZES[-1]})",
    title_justify="left",
  )
  for case in results["by_depth"]:
    (row,) = case["peers"].values()
    table.add_row(
      f"{case['case']['depth']:,}",
      f"{row['step_seconds']['median']:g}",
      f"{row['seconds_to_first_step']:g}",
      f"{case['compile_seconds']:g}",
      *(f"{size:g}" for size in case["activation_megabytes"].values()),
    )
  console.print(table)
  print(json.dumps(results, indent=2))
  return 0


if __name__ == "__main__":
  program.run(main)
