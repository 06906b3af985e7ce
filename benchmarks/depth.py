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

from benchmarks import benchmark, peer_jax, side_by_side
from benchmarks.peer import Case
from benchmarks.side_by_side import Peer

_ROUNDS = flags.DEFINE_integer("rounds", 4, "Turns of each peer.", lower_bound=1)
_COMPILED_INIT = flags.DEFINE_boolean(
  "compiled_init",
  False,
  "Whether unrolled Flax also comes with an initialization that is compiled, as its "
  "examples have it. That takes eight minutes.",
)
_FLAX = flags.DEFINE_boolean("flax", True, "Whether unrolled Flax trains at all.")
_DEPTH = flags.DEFINE_integer("depth", 1000, "Layers of the networks that compete.")
_DEPTHS = flags.DEFINE_multi_integer(
  "depths", [100, 1000, 10_000], "Layers of this package's own networks."
)

_BATCH_SIZES = (16, 64)
_FLAX_EAGER_INIT = Peer(
  f"{side_by_side.FLAX.name}, init not compiled", "peer_flax", {"compile_init": False}
)


def _case(depth: int, batch_size: int) -> Case:
  return Case(depth, 1, image_size=8, batch_size=batch_size, method="skipinit")


def _compare(batch_size: int) -> list[dict[str, Any]]:
  """Returns a row for each peer that trains many layers."""
  peers = [side_by_side.SKIPINIT_JAX, side_by_side.TORCH_EAGER]
  if _FLAX.value and batch_size == _BATCH_SIZES[0]:
    # It compiles as long for one size of batch as for another.
    peers.append(_FLAX_EAGER_INIT)
    if _COMPILED_INIT.value:
      peers.append(side_by_side.FLAX)
  measured = side_by_side.measure(_case(_DEPTH.value, batch_size), peers, _ROUNDS.value)
  ours = measured[peers[0].name]
  return [
    {
      "peer": f"batch {batch_size}, {name}",
      "seconds a step": each.step_seconds,
      "speedup": round(each.step_seconds["median"] / ours.step_seconds["median"], 2),
      "seconds to first step": each.seconds_to_first_step,
      "speedup to there": round(
        each.seconds_to_first_step / ours.seconds_to_first_step, 2
      ),
      "peak GB": each.peak_gigabytes,
    }
    for name, each in measured.items()
  ]


def _measure_alone(depth: int) -> dict[str, Any]:
  """Returns the row of one depth of this package."""
  case = _case(depth, _BATCH_SIZES[0])
  (alone,) = side_by_side.measure(case, [side_by_side.SKIPINIT_JAX], rounds=1).values()
  case = _case(depth, _BATCH_SIZES[-1])
  seconds, megabytes = peer_jax.compile_step(case)
  _, with_remat = peer_jax.compile_step(dataclasses.replace(case, remat=True))
  return {
    "layers": depth,
    "seconds to compile a step": benchmark.digits(seconds),
    "to first step": alone.seconds_to_first_step,
    "a step": alone.step_seconds["median"],
    "MB of activations": benchmark.digits(megabytes),
    "MB with remat": benchmark.digits(with_remat),
  }


def measure() -> dict[str, Any]:
  """Returns the JSON object."""
  # Compile times are those of programs that were never compiled before.
  jax.config.update("jax_enable_compilation_cache", False)
  peers = [row for batch_size in _BATCH_SIZES for row in _compare(batch_size)]
  alone = [_measure_alone(depth) for depth in _DEPTHS.value]
  return {"tables": {"depth": peers, "by_depth": alone}}


if __name__ == "__main__":
  benchmark.run(measure)
