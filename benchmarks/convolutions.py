"""Compares single convolutions here and in PyTorch: where a step's time goes.

The convolutions of Wide-ResNets 16-4 and 28-2 on images of 32x32, each forward and for
both gradients, in operations a second. The libraries take turns.

Example:
  python -m benchmarks.convolutions
"""

import functools
import timeit
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from absl import flags

from benchmarks import benchmark
from skipinit_jax.layers import conv_general_dilated
from skipinit_jax.training.compilation import compiler_options

_ROUNDS = flags.DEFINE_integer("rounds", 10, "Turns of each library.", lower_bound=1)

_BATCH_SIZE = 128
_TITLE = f"GFLOP/s here / in PyTorch, batch {_BATCH_SIZE}"

Passes = dict[str, Callable[[], Any]]
"""The forward pass and both gradients by name, as functions that compute them."""


class Convolution(NamedTuple):
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
    name = f"3x3, {self.inputs} to {self.features} features of {self.size}x{self.size}"
    return name + (f", strides {self.strides}" if self.strides > 1 else "")

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


def jax_passes(layer: Convolution) -> Passes:
  """Returns the passes of this package's convolution."""
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

  return {
    "forward": compiled(lambda images, kernel, _: convolve(images, kernel)),
    "gradient by the input": compiled(
      lambda images, kernel, g: jax.vjp(convolve, images, kernel)[1](g)[0]
    ),
    "gradient by the kernel": compiled(
      lambda images, kernel, g: jax.vjp(convolve, images, kernel)[1](g)[1]
    ),
  }


def torch_passes(layer: Convolution) -> Passes:
  """Returns the passes of PyTorch's convolution, in channels-last."""

  def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(memory_format=torch.channels_last)

  images = normal(_BATCH_SIZE, layer.inputs, layer.size, layer.size)
  kernel = normal(layer.features, layer.inputs, 3, 3)
  cotangent = normal(_BATCH_SIZE, layer.features, layer.out_size, layer.out_size)

  def gradient(mask: list[bool]) -> Callable[[], Any]:
    return lambda: torch.ops.aten.convolution_backward(
      *(cotangent, images, kernel, None, [layer.strides] * 2, [1, 1]),
      *([1, 1], False, [0, 0], 1, mask),
    )

  return {
    "forward": lambda: torch.nn.functional.conv2d(
      images, kernel, stride=layer.strides, padding=1
    ),
    "gradient by the input": gradient([True, False, False]),
    "gradient by the kernel": gradient([False, True, False]),
  }


def speed(flops: float, compute: Callable[[], Any]) -> float:
  """Returns billions of operations a second."""
  return flops / timeit.timeit(compute, number=1) / 1e9


def measure() -> dict[str, Any]:
  """Returns the JSON object."""
  rows = []
  for layer in _CONVOLUTIONS:
    row: dict[str, Any] = {_TITLE: layer.name}
    here, there = jax_passes(layer), torch_passes(layer)
    for name in here:
      ways = {
        library: functools.partial(speed, layer.flops, passes[name])
        for library, passes in (("here", here), ("PyTorch", there))
      }
      # The first turn compiles.
      turns = benchmark.take_turns(ways, 1 + _ROUNDS.value)
      row[name] = [benchmark.summary(each[1:])["median"] for each in turns.values()]
    rows.append(row)
  return {"tables": {"convolutions": rows}}


if __name__ == "__main__":
  benchmark.run(measure)
