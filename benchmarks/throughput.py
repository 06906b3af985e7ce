"""Compares images a second of this package, PyTorch and plain Flax, on one machine.

Wide-ResNets 16-4 and 28-2 on images of 32x32, with SkipInit and with batch norm, by
`benchmarks.side_by_side`. How near a step is to what the machine can do is its share of
the speed of a large matrix product, counting the operations that a step must do.

Example:
  python -m benchmarks.throughput
"""

from typing import Any

from absl import flags

from benchmarks import machine, side_by_side, tables
from benchmarks.peer import Case
from benchmarks.side_by_side import Peer
from experiments import program

_ROUNDS = flags.DEFINE_integer("rounds", 2, "Turns of each peer.", lower_bound=1)

_CASES = [
  Case(depth, width, image_size=32, batch_size=128, method=method)
  for depth, width in ((16, 4), (28, 2))
  for method in ("skipinit", "batch_norm")
]
_PEERS = [side_by_side.SKIPINIT_JAX, side_by_side.TORCH_EAGER]
# These take long to compile, or to take a step.
_SLOW_PEERS = [side_by_side.TORCH_COMPILE, side_by_side.FLAX]
_ALL_PEERS = flags.DEFINE_boolean(
  "all_peers",
  False,
  "Whether torch.compile and plain Flax train with batch norm as well.",
)


def _peers(case: Case) -> list[Peer]:
  slow_too = _ALL_PEERS.value or case.method == "skipinit"
  return _PEERS + (_SLOW_PEERS if slow_too else [])


def measure() -> dict[str, Any]:
  """Returns the JSON object."""
  product = machine.matrix_product_flops()
  return {
    "machine": machine.description(),
    "matrix_product_gflops_per_second": float(f"{product / 1e9:.3g}"),
    "cases": [
      side_by_side.measure(case, _peers(case), _ROUNDS.value) for case in _CASES
    ],
  }


def main() -> None:
  """Prints tables to standard error, and one JSON object to standard output."""
  tables.show("throughput", measure())


if __name__ == "__main__":
  program.run(main)
