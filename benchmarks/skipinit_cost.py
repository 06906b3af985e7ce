"""Measures what SkipInit's scalar costs, and what batch norm does, by batch size.

Deep Wide-ResNets on images of 8x8, with SkipInit, without normalization and scalar, and
with batch norm, here and in PyTorch, by `benchmarks.side_by_side`; and the memory of
the activations of this package's compiled steps. Here the scalar is also measured
behind the last layer of its branch, where `layers.scaled` would have left it.

Example:
  python -m benchmarks.skipinit_cost
"""

import dataclasses
from typing import Any

from absl import flags

from benchmarks import benchmark, peer_jax, side_by_side
from benchmarks.peer import Case

_ROUNDS = flags.DEFINE_integer("rounds", 4, "Turns of each method.", lower_bound=1)

_CASE = Case(100, 1, image_size=8, batch_size=64, method="skipinit")
_BATCH_SIZES = (16, 256)
_METHODS = ("skipinit", "unnormalized", "batch_norm")
_BEHIND = "skipinit_behind"
_LIBRARIES = (side_by_side.SKIPINIT_JAX, side_by_side.TORCH_EAGER)


def _compare(batch_size: int) -> list[dict[str, Any]]:
  """Returns a row for each library, and one for the scalar behind the last layer."""
  ours, torch = _LIBRARIES
  peers = {
    (library.name, method): dataclasses.replace(
      library,
      name=f"{library.name}, {method}",
      options={**library.options, "method": method},
    )
    for library, names in ((ours, (*_METHODS, _BEHIND)), (torch, _METHODS))
    for method in names
  }
  case = dataclasses.replace(_CASE, batch_size=batch_size)
  measured = side_by_side.measure(case, list(peers.values()), _ROUNDS.value)
  rows = []
  for name, library, method in (
    (ours.name, ours, "skipinit"),
    (f"{ours.name}, scalar behind the layer", ours, _BEHIND),
    (torch.name, torch, "skipinit"),
  ):
    skipinit, unnormalized, batch_norm = (
      measured[peers[library.name, each].name].step_seconds
      for each in (method, *_METHODS[1:])
    )
    rows.append(
      {
        "library": f"batch {batch_size}, {name}",
        "seconds a step, SkipInit": skipinit,
        "unnormalized": unnormalized,
        "batch norm": batch_norm,
        "SkipInit / unnormalized": round(
          skipinit["median"] / unnormalized["median"], 2
        ),
        "batch norm / SkipInit": round(batch_norm["median"] / skipinit["median"], 2),
      }
    )
  return rows


def _activation_megabytes(method: str) -> float:
  _, megabytes = peer_jax.compile_step(dataclasses.replace(_CASE, method=method))
  return benchmark.digits(megabytes)


def measure() -> dict[str, Any]:
  """Returns the JSON object."""
  rows = [row for batch_size in _BATCH_SIZES for row in _compare(batch_size)]
  activations = {
    method: _activation_megabytes(method) for method in (*_METHODS, _BEHIND)
  }
  return {"tables": {"skipinit_cost": rows, "activations": [{"": "MB", **activations}]}}


if __name__ == "__main__":
  benchmark.run(measure)
