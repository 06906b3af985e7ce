"""Compares images a second of this package, PyTorch and plain Flax, on one machine.

Wide-ResNets 16-4 and 28-2 on images of 32x32, with SkipInit and with batch norm, by
`benchmarks.side_by_side`. How near a step is to what the machine can do is its share of
the speed of a large matrix product, counting the operations that a step must do.

Example:
  python -m benchmarks.throughput
"""

import timeit
from typing import Any

import numpy as np
import torch
from absl import flags

from benchmarks import benchmark, side_by_side
from benchmarks.peer import Case

_ROUNDS = flags.DEFINE_integer("rounds", 2, "Turns of each peer.", lower_bound=1)
_ALL_PEERS = flags.DEFINE_boolean(
  "all_peers",
  False,
  "Whether torch.compile, plain Flax and this package under a plain jax.jit train with "
  "batch norm as well.",
)

_CASES = [
  Case(depth, width, image_size=32, batch_size=128, method=method)
  for depth, width in ((16, 4), (28, 2))
  for method in ("skipinit", "batch_norm")
]
_PEERS = [side_by_side.SKIPINIT_JAX, side_by_side.TORCH_EAGER]
# These take long to compile, or to take a step.
_SLOW_PEERS = [
  side_by_side.TORCH_COMPILE,
  side_by_side.FLAX,
  side_by_side.PLAIN_JIT,
]
_MATRIX_SIZE = 2048
_MATRIX_ROUNDS = 9


def matrix_product_flops() -> float:
  """Measures the floating-point operations a second of a large matrix product.

  NumPy and PyTorch compute it on all cores in float32, and the best of several rounds
  of both counts, because NumPy's library is slow on some processors. That is what this
  machine can do at that moment.
  """
  rng = np.random.default_rng(0)
  matrix = rng.normal(size=(_MATRIX_SIZE, _MATRIX_SIZE)).astype(np.float32)
  factors: list[Any] = [matrix, torch.from_numpy(matrix)]
  seconds = [
    timeit.repeat(lambda each=each: each @ each, number=1, repeat=_MATRIX_ROUNDS)
    for each in factors
  ]
  return 2 * _MATRIX_SIZE**3 / min(map(min, seconds))


def measure() -> dict[str, Any]:
  """Returns the JSON object."""
  # The machine's speed changes: its best, before, between and after, is what it can do.
  products = [matrix_product_flops()]
  measured = []
  for case in _CASES:
    slow_too = _ALL_PEERS.value or case.method == "skipinit"
    peers = _PEERS + (_SLOW_PEERS if slow_too else [])
    measured.append((case, side_by_side.measure(case, peers, _ROUNDS.value)))
    products.append(matrix_product_flops())
  product = benchmark.digits(max(products) / 1e9)
  rows = []
  for case, of_peers in measured:
    ours = of_peers[_PEERS[0].name].step_seconds["median"]
    for name, each in of_peers.items():
      step = each.step_seconds["median"]
      rows.append(
        {
          "network and peer": f"{case.network}, {case.method}, {name}",
          "images/s": benchmark.digits(case.batch_size / step),
          "speedup": round(step / ours, 2),
          "seconds a step": each.step_seconds,
          "of matrix product": round(case.step_flops / step / 1e9 / product, 2),
          "seconds to first step": each.seconds_to_first_step,
          "peak GB": each.peak_gigabytes,
        }
      )
  return {"matrix_product_gflops_per_second": product, "tables": {"throughput": rows}}


if __name__ == "__main__":
  benchmark.run(measure)
