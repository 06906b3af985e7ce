"""Compares networks of 1000 layers here, in PyTorch and in unrolled Flax.

Wide-ResNets of width 1 on images of 8x8 with SkipInit, by `benchmarks.side_by_side`.
Then this package alone trains 100, 1000 and 10,000 layers.

Example:
  python -m benchmarks.depth
"""

import dataclasses
from typing import Any

import jax
from absl import flags

from benchmarks import machine, peer_jax, side_by_side, tables
from benchmarks.peer import Case
from benchmarks.side_by_side import Peer
from experiments import program

_ROUNDS = flags.DEFINE_integer("rounds", 4, "Turns of each peer.", lower_bound=1)
_COMPILED_INIT = flags.DEFINE_boolean(
  "compiled_init",
  False,
  "Whether unrolled Flax also comes with an initialization that is compiled, as its "
  "examples have it. That takes eight minutes.",
)

_DEPTH = 1000
_DEPTHS = (100, 1000, 10_000)
_BATCH_SIZES = (16, 64)


def _case(depth: int, batch_size: int) -> Case:
  return Case(depth, 1, image_size=8, batch_size=batch_size, method="skipinit")


def _compile(depth: int) -> dict[str, Any]:
  """Returns how long a step compiles, and the memory of its activations."""
  case = _case(depth, _BATCH_SIZES[-1])
  plain = peer_jax.compile_step(case)
  with_remat = peer_jax.compile_step(dataclasses.replace(case, remat=True))
  return {
    "compile_seconds": float(f"{plain.seconds:.3g}"),
    "activation_megabytes": {
      "without_remat": plain.activation_megabytes,
      "with_remat": with_remat.activation_megabytes,
    },
  }


def measure() -> dict[str, Any]:
  """Returns the JSON object."""
  comparison = []
  for batch_size in _BATCH_SIZES:
    peers = [side_by_side.SKIPINIT_JAX, side_by_side.TORCH_EAGER]
    if batch_size == _BATCH_SIZES[0]:
      # It compiles as long for one size of batch as for another.
      flax = side_by_side.FLAX
      name = f"{flax.name}, init not compiled"
      peers.append(Peer(name, flax.module, {"compile_init": False}))
      if _COMPILED_INIT.value:
        peers.append(flax)
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


def main() -> None:
  """Prints tables to standard error, and one JSON object to standard output."""
  # Compile times are those of programs that were never compiled before.
  jax.config.update("jax_enable_compilation_cache", False)
  tables.show("depth", measure())


if __name__ == "__main__":
  program.run(main)
