"""Compares single convolutions here and in PyTorch: where a step's time goes.

The convolutions of Wide-ResNets 16-4 and 28-2 on images of 32x32, each forward and for
both gradients, in operations a second. The libraries take turns, each in a process of
its own that measures all of them.

Example:
  python -m benchmarks.convolutions
"""

import collections
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import flags

from benchmarks import machine, tables
from experiments import program

_LIBRARIES = ("skipinit_jax", "PyTorch")
_ROUNDS = flags.DEFINE_integer("rounds", 2, "Turns of each library.", lower_bound=1)
_LIBRARY = flags.DEFINE_enum(
  "library", None, _LIBRARIES, "Only measures this one; the program calls itself so."
)

_BATCH_SIZE = 128
_REPEATS = 5
_PASSES = ("forward", "gradient by the input", "gradient by the kernel")


@dataclasses.dataclass(frozen=True)
class Convolution:
  """One layer with a window of 3x3 and a pixel of padding.

  Attributes:
    size: height and width of its input.
    inputs: features of its input.
    features: features of its output.
    strides: in both directions.
  """

  size: int
  inputs: int
  features: int
  strides: int = 1

  @property
  def name(self) -> str:
    """What it is, in words."""
    size, strides = f"{self.size}x{self.size}", f", strides {self.strides}"
    name = f"3x3, {self.inputs} to {self.features} features of {size}"
    return name + (strides if self.strides > 1 else "")

  @property
  def out_size(self) -> int:
    """Height and width of its output."""
    return self.size // self.strides

  @property
  def flops(self) -> float:
    """Operations of each pass, on a batch; a multiply-add is two."""
    return 2.0 * _BATCH_SIZE * self.out_size**2 * self.features * 9 * self.inputs


_CONVOLUTIONS = (
  Convolution(32, 32, 32),
  Convolution(32, 64, 64),
  Convolution(16, 128, 128),
  Convolution(8, 256, 256),
  Convolution(32, 64, 128, strides=2),
)


def _jax_passes(layer: Convolution) -> Mapping[str, Callable[[], Any]]:
  import jax

  from skipinit_jax.layers import conv_general_dilated
  from skipinit_jax.training.compilation import compiler_options

  rng = np.random.default_rng(0)
  images, kernel, cotangent = (
    jax.device_put(rng.normal(size=shape).astype(np.float32))
    for shape in (
      (_BATCH_SIZE, layer.size, layer.size, layer.inputs),
      (3, 3, layer.inputs, layer.features),
      (_BATCH_SIZE, layer.out_size, layer.out_size, layer.features),
    )
  )

  def convolve(images: jax.Array, kernel: jax.Array) -> jax.Array:
    strides, dimensions = (layer.strides, layer.strides), ("NHWC", "HWIO", "NHWC")
    return conv_general_dilated(
      images, kernel, strides, [(1, 1), (1, 1)], dimension_numbers=dimensions
    )

  def compiled(function: Callable[..., jax.Array]) -> Callable[[], Any]:
    call = jax.jit(function, compiler_options=compiler_options())
    return lambda: call(images, kernel, cotangent).block_until_ready()

  functions = (
    lambda images, kernel, _: convolve(images, kernel),
    lambda images, kernel, g: jax.vjp(convolve, images, kernel)[1](g)[0],
    lambda images, kernel, g: jax.vjp(convolve, images, kernel)[1](g)[1],
  )
  return dict(zip(_PASSES, map(compiled, functions), strict=True))


def _torch_passes(layer: Convolution) -> Mapping[str, Callable[[], Any]]:
  import torch

  def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(memory_format=torch.channels_last)

  images = normal(_BATCH_SIZE, layer.inputs, layer.size, layer.size)
  kernel = normal(layer.features, layer.inputs, 3, 3)
  cotangent = normal(_BATCH_SIZE, layer.features, layer.out_size, layer.out_size)

  def forward() -> torch.Tensor:
    return torch.nn.functional.conv2d(images, kernel, stride=layer.strides, padding=1)

  def gradient(mask: list[bool]) -> Callable[[], Any]:
    return lambda: torch.ops.aten.convolution_backward(
      *(cotangent, images, kernel, None, [layer.strides] * 2, [1, 1]),
      *([1, 1], False, [0, 0], 1, mask),
    )

  gradients = gradient([True, False, False]), gradient([False, True, False])
  return dict(zip(_PASSES, (forward, *gradients), strict=True))


def _measure_library(library: str) -> list[dict[str, float]]:
  """Returns the seconds of each pass of each convolution."""
  make = {"skipinit_jax": _jax_passes, "PyTorch": _torch_passes}[library]
  results = []
  for layer in _CONVOLUTIONS:
    seconds = {}
    for name, compute in make(layer).items():
      compute()
      times = []
      for _ in range(_REPEATS):
        begin = time.perf_counter()
        compute()
        times.append(time.perf_counter() - begin)
      seconds[name] = statistics.median(times)
    results.append(seconds)
  return results


def measure() -> dict[str, Any]:
  """Returns the JSON object."""
  seconds: dict[tuple[int, str, str], list[float]] = collections.defaultdict(list)
  for _ in range(_ROUNDS.value):
    for library in _LIBRARIES:
      done = subprocess.run(
        [sys.executable, "-m", "benchmarks.convolutions", f"--library={library}"],
        stdout=subprocess.PIPE,
        check=True,
      )
      for index, passes in enumerate(json.loads(done.stdout)):
        for name, value in passes.items():
          seconds[index, name, library].append(value)
  return {
    "machine": machine.description(),
    "batch_size": _BATCH_SIZE,
    "convolutions": [
      {
        "name": layer.name,
        "gflops_per_second": {
          name: {
            library: machine.summary(
              [layer.flops / each / 1e9 for each in seconds[index, name, library]]
            )
            for library in _LIBRARIES
          }
          for name in _PASSES
        },
      }
      for index, layer in enumerate(_CONVOLUTIONS)
    ],
  }


def main() -> None:
  """Prints tables to standard error, and one JSON object to standard output."""
  if _LIBRARY.value is not None:
    print(json.dumps(_measure_library(_LIBRARY.value)))
    return
  tables.show("convolutions", measure())


if __name__ == "__main__":
  program.run(main)
