"""SkipInit keeps no activations that the network without it does not."""

import dataclasses

from benchmarks import activations
from benchmarks.side_by_side import Case


def test_the_scalar_needs_no_memory():
  case = Case(28, 1, image_size=8, batch_size=16, method="skipinit")
  megabytes = {
    method: activations.compile_step(
      dataclasses.replace(case, method=method)
    ).activation_megabytes
    for method in ("skipinit", "unnormalized", "batch_norm")
  }
  assert megabytes["skipinit"] < 1.02 * megabytes["unnormalized"]
  assert megabytes["batch_norm"] > 1.5 * megabytes["unnormalized"]
