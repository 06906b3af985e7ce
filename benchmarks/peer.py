"""A process that takes train steps for `benchmarks.side_by_side`.

`python -m benchmarks.peer MODULE CASE` calls the module's `make_step` with the case,
which is a JSON object of its fields and of the module's own options.
"""

import dataclasses
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

LEARNING_RATE = 1e-3
MOMENTUM = 0.9
L2 = 5e-4


class Step(NamedTuple):
  """A train step of JAX and what it takes.

  Attributes:
    apply: returns the next state from state, images and labels, as one jitted function.
    shapes: the shapes of these three, to compile for.
    init: returns the first state.
  """

  apply: Any
  shapes: tuple[Any, ...]
  init: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Case:
  """What all peers train: a network by momentum and L2, on one random batch.

  Attributes:
    depth: 6 n + 4 layers of a Wide-ResNet, 50 of a ResNet.
    width: factor on the features 16, 32 and 64 of a Wide-ResNet's stages; 0: the
      network is a ResNet of bottleneck blocks, for 1000 classes.
    image_size: height and width of the images, which have three channels.
    batch_size: images in a step.
    method: the name of a method; peers other than this package know "skipinit",
      "batch_norm" and "unnormalized", and what their own docstrings name.
    remat: whether blocks are computed again in the backward pass.
    version: of a ResNet: 1 (post-activation) or 2 (pre-activation).
    dtype: of the computation; parameters are float32.
    scan: whether this package scans over equal blocks.
  """

  depth: int
  width: int
  image_size: int
  batch_size: int
  method: str
  remat: bool = False
  version: int = 1
  dtype: str = "float32"
  scan: bool = True

  @property
  def network(self) -> str:
    """The network in words."""
    wide = f"Wide-ResNet {self.depth}-{self.width}"
    return wide if self.width else f"ResNet-{self.depth}"

  @property
  def num_classes(self) -> int:
    """The number of logits."""
    return 10 if self.width else 1000

  @property
  def batch_shape(self) -> tuple[int, int, int, int]:
    """The shape of the images, [N, H, W, C]."""
    return (self.batch_size, self.image_size, self.image_size, 3)

  @property
  def step_flops(self) -> float:
    """Operations of the convolutions and the classifier in one step.

    A multiply-add is two. Each product of the forward pass has two of its size in the
    backward pass, but for that of the images, which need no gradient.
    """
    stem, products = self._wide_products() if self.width else self._products()
    return 2.0 * self.batch_size * (3 * products + 2 * stem)

  def _wide_products(self) -> tuple[int, int]:
    """Multiply-adds of the stem, and of all else, for an image."""
    size, features = self.image_size, 16
    stem = size**2 * 9 * 3 * features
    products = 0
    for stage, strides in enumerate((1, 2, 2)):
      wider = 2 ** (4 + stage) * self.width
      size //= strides
      blocks = (self.depth - 4) // 6
      products += size**2 * features * wider * (9 + int(wider != features))
      products += (2 * blocks - 1) * size**2 * 9 * wider**2
      features = wider
    return stem, products + self.num_classes * features

  def _products(self) -> tuple[int, int]:
    """The same of a ResNet-50, whose strides are in the 3x3 convolutions."""
    assert self.depth == 50
    size, inputs = self.image_size // 2, 64
    stem = size**2 * 49 * 3 * inputs
    size //= 2
    products = 0
    for features, blocks in zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True):
      for index in range(blocks):
        outputs = 4 * features
        products += size**2 * inputs * features
        size //= 2 if features > 64 and index == 0 else 1
        products += size**2 * features * (9 * features + outputs)
        products += size**2 * inputs * outputs * (index == 0)
        inputs = outputs
    return stem, products + self.num_classes * inputs

  def batch(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns random images [N, H, W, C] and labels [N]."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=self.batch_shape).astype(np.float32)
    return images, rng.integers(self.num_classes, size=self.batch_size, dtype=np.int32)


def main(module: str, arguments: str) -> None:
  """Takes steps as standard input asks for them, and prints their seconds.

  Args:
    module: a module of this folder. Its `make_step` takes a case and options, and
      returns a function that takes one step and waits until it is done. Its
      `device_peak_bytes` returns the most memory of a GPU that it had, or None.
    arguments: JSON object of the case and the options.
  """
  # Libraries print too; standard output is for answers alone.
  answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

  def answer(value: Any) -> None:
    print(json.dumps(value), file=answers, flush=True)

  peer = importlib.import_module(f"benchmarks.{module}")
  options = json.loads(arguments)
  fields = {each.name: options.pop(each.name) for each in dataclasses.fields(Case)}
  step = peer.make_step(Case(**fields), **options)
  step()
  answer("first step")
  for line in sys.stdin:
    seconds = []
    for _ in range(int(line)):
      begin = time.perf_counter()
      step()
      seconds.append(time.perf_counter() - begin)
    answer(seconds)
  unit = 1 if sys.platform == "darwin" else 1024
  on_host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  answer(peer.device_peak_bytes() or on_host)


if __name__ == "__main__":
  main(*sys.argv[1:])
