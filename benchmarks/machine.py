"""What benchmarks say about the machine they ran on."""

import contextlib
import importlib.metadata
import pathlib
import platform
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from skipinit_jax.cores import num_cores

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")
_MATRIX_SIZE = 2048
_MATRIX_ROUNDS = 9


def description() -> dict[str, Any]:
  """Returns the machine's cores and the versions of what was measured."""
  versions = {}
  for name in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  return {
    "cpu": cpu_name(),
    "cores": num_cores(),
    "system": f"{platform.system()} {platform.machine()}, Python "
    f"{platform.python_version()}",
    "versions": versions,
  }


def cpu_name() -> str:
  """Returns the name of the machine's processor."""
  with contextlib.suppress(FileNotFoundError):
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        return line.partition(":")[2].strip()
  return platform.processor() or platform.machine()


def matrix_product_flops() -> float:
  """Measures the floating-point operations a second of a large matrix product.

  NumPy's library computes it on all cores in float32, in the best of several rounds.
  That is what this machine can do: no step of a network is faster.
  """
  rng = np.random.default_rng(0)
  matrix = rng.normal(size=(_MATRIX_SIZE, _MATRIX_SIZE)).astype(np.float32)
  seconds = []
  for _ in range(_MATRIX_ROUNDS):
    begin = time.perf_counter()
    matrix @ matrix
    seconds.append(time.perf_counter() - begin)
  return 2 * _MATRIX_SIZE**3 / min(seconds)


def summary(values: Sequence[float]) -> dict[str, float]:
  """Returns median, smallest and largest value, to three digits."""
  numbers = {
    "median": statistics.median(values),
    "min": min(values),
    "max": max(values),
  }
  return {name: float(f"{number:.3g}") for name, number in numbers.items()}
