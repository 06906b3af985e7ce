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
  """One layer, with "SAME" padding.

  Attributes:
    size: height and width of its input.
    inputs: features of its input.
    features: of its output.
    window: height and width of its kernel.
    strides: in both directions.
  """

  size: int
  inputs: int
  features: int
  window: int = 3
  strides: int = 1

  @property
  def name(self) -> str:
    """What it is, in words."""
    strided = f", strides {self.strides}" if self.strides > 1 else ""
    return (
      f"{self.window}x{self.window}, {self.inputs} to {self.features} features of "
      f"{self.size}x{self.size}{strided}"
    )

  @property
  def flops(self) -> float:
    """Operations of each pass, on a batch; a multiply-add is two."""
    outputs = (self.size // self.strides) ** 2 * self.features
    return 2.0 * _BATCH_SIZE * outputs * self.window**2 * self.inputs


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

  def normal(*shape: int) -> jax.Array:
    return jax.device_put(rng.normal(size=shape).astype(np.float32))

  def convolve(images: jax.Array, kernel: jax.Array) -> jax.Array:
    return conv_general_dilated(
      images,
      kernel,
      (layer.strides, layer.strides),
      [(layer.window // 2, layer.window // 2)] * 2,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )

  def gradient(argument: int) -> Callable[..., jax.Array]:
    def compute(images: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> Any:
      return jax.vjp(convolve, images, kernel)[1](cotangent)[argument]

    return compute

  images = normal(_BATCH_SIZE, layer.size, layer.size, layer.inputs)
  kernel = normal(layer.window, layer.window, layer.inputs, layer.features)
  out_size = layer.size // layer.strides
  cotangent = normal(_BATCH_SIZE, out_size, out_size, layer.features)

  def compiled(function: Callable[..., jax.Array], *operands: jax.Array) -> Any:
    call = jax.jit(function, compiler_options=compiler_options())
    return lambda: call(*operands).block_until_ready()

  return dict(
    zip(
      _PASSES,
      (
        compiled(convolve, images, kernel),
        compiled(gradient(0), images, kernel, cotangent),
        compiled(gradient(1), images, kernel, cotangent),
      ),
      strict=True,
    )
  )


def _torch_passes(layer: Convolution) -> Mapping[str, Callable[[], Any]]:
  import torch

  def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(memory_format=torch.channels_last)

  padding = layer.window // 2
  images = normal(_BATCH_SIZE, layer.inputs, layer.size, layer.size)
  kernel = normal(layer.features, layer.inputs, layer.window, layer.window)
  out_size = layer.size // layer.strides
  cotangent = normal(_BATCH_SIZE, layer.features, out_size, out_size)

  def gradient(mask: list[bool]) -> Callable[[], Any]:
    return lambda: torch.ops.aten.convolution_backward(
      *(cotangent, images, kernel, None, [layer.strides] * 2, [padding] * 2),
      *([1, 1], False, [0, 0], 1, mask),
    )

  def forward() -> torch.Tensor:
    return torch.nn.functional.conv2d(
      images, kernel, stride=layer.strides, padding=padding
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
