"""Measures what SkipInit's scalar costs, and what batch norm does, by batch size.

Deep Wide-ResNets on images of 8x8, with SkipInit, without normalization and scalar, and
with batch norm, here and in PyTorch, by `benchmarks.side_by_side`; and the memory of
the activations of this package's compiled steps. Here the scalar is also measured
behind the last layer of its branch, where `layers.scaled` would have left it, and batch
norm with Flax's fast variance, in one pass, which is wrong where a mean is large.

Example:
  python -m benchmarks.skipinit_cost
"""

import dataclasses
import itertools
from typing import Any

from absl import flags

from benchmarks import benchmark, peer_jax, side_by_side
from benchmarks.peer import Case

_ROUNDS = flags.DEFINE_integer("rounds", 4, "Turns of each method.", lower_bound=1)

_CASE = Case(100, 1, image_size=8, batch_size=64, method="skipinit")
_BATCH_SIZES = (16, 256)
_METHODS = ("skipinit", "unnormalized", "batch_norm")
_BEHIND, _FAST_VARIANCE = peer_jax.BEHIND.name, peer_jax.FAST_VARIANCE.name


def _compare(batch_size: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """Compares the methods at one batch size.

  Returns:
    A row for each library and one for the scalar behind the last layer; and one of
    batch norm's variance.
  """
  ours, torch = side_by_side.SKIPINIT_JAX, side_by_side.TORCH_EAGER
  peers = [
    dataclasses.replace(
      library,
      name=f"{library.name}, {method}",
      options={**library.options, "method": method},
    )
    for library, names in (
      (ours, (*_METHODS, _BEHIND, _FAST_VARIANCE)),
      (torch, _METHODS),
    )
    for method in names
  ]
  case = dataclasses.replace(_CASE, batch_size=batch_size)
  measured = side_by_side.measure(case, peers, _ROUNDS.value)
  rows = []
  for name, library, method in (
    (ours.name, ours, "skipinit"),
    (f"{ours.name}, scalar behind the layer", ours, _BEHIND),
    (torch.name, torch, "skipinit"),
  ):
    skipinit, unnormalized, batch_norm = (
      measured[f"{library.name}, {each}"].step_seconds
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
  two_passes, one_pass = (
    measured[f"{ours.name}, {method}"].step_seconds
    for method in ("batch_norm", _FAST_VARIANCE)
  )
  return rows, {
    "batch": batch_size,
    "seconds a step, two passes": two_passes,
    "one pass": one_pass,
    "two passes / one pass": round(two_passes["median"] / one_pass["median"], 2),
  }


def _activation_megabytes(method: str) -> float:
  _, megabytes = peer_jax.compile_step(dataclasses.replace(_CASE, method=method))
  return benchmark.digits(megabytes)


def measure() -> dict[str, Any]:
  """Returns the JSON object."""
  rows, variance = zip(*map(_compare, _BATCH_SIZES), strict=True)
  activations = {
    method: _activation_megabytes(method) for method in (*_METHODS, _BEHIND)
  }
  return {
    "tables": {
      "skipinit_cost": [*itertools.chain(*rows)],
      "variance": variance,
      "activations": [{"": "MB", **activations}],
    }
  }


if __name__ == "__main__":
  benchmark.run(measure)
