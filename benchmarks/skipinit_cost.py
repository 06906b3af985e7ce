"""Measures what SkipInit's scalar costs, and what batch norm does, by batch size.

Deep Wide-ResNets on images of 8x8, with SkipInit, without normalization and scalar, and
with batch norm, here and in PyTorch, by `benchmarks.side_by_side`; and the memory of
the activations of this package's compiled steps.

Example:
  python -m benchmarks.skipinit_cost
"""

import dataclasses
from typing import Any

from absl import flags

from benchmarks import machine, peer_jax, side_by_side, tables
from benchmarks.peer import Case
from benchmarks.side_by_side import Peer
from experiments import program

_ROUNDS = flags.DEFINE_integer("rounds", 4, "Turns of each method.", lower_bound=1)

_CASE = Case(100, 1, image_size=8, batch_size=64, method="skipinit")
_BATCH_SIZES = (16, 256)
_METHODS = ("skipinit", "unnormalized", "batch_norm")
_LIBRARIES = (side_by_side.SKIPINIT_JAX, side_by_side.TORCH_EAGER)


def measure() -> dict[str, Any]:
  """Returns the JSON object."""
  by_batch_size = []
  for batch_size in _BATCH_SIZES:
    peers = [
      Peer(f"{peer.name}, {method}", peer.module, {**peer.options, "method": method})
      for peer in _LIBRARIES
      for method in _METHODS
    ]
    case = dataclasses.replace(_CASE, batch_size=batch_size)
    measured = side_by_side.measure(case, peers, _ROUNDS.value)
    step_seconds: dict[str, Any] = {}
    for peer in _LIBRARIES:
      step_seconds[peer.name] = {
        method: measured["peers"][f"{peer.name}, {method}"]["step_seconds"]
        for method in _METHODS
      }
    by_batch_size.append({"batch_size": batch_size, "step_seconds": step_seconds})
  return {
    "machine": machine.description(),
    "network": _CASE.name.rpartition(", batch")[0],
    "by_batch_size": by_batch_size,
    "activations": {
      "batch_size": _CASE.batch_size,
      "megabytes": {
        method: peer_jax.compile_step(
          dataclasses.replace(_CASE, method=method)
        ).activation_megabytes
        for method in _METHODS
      },
    },
  }


def main() -> None:
  """Prints tables to standard error, and one JSON object to standard output."""
  tables.show("skipinit_cost", measure())


if __name__ == "__main__":
  program.run(main)
