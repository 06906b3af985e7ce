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
from typing import Any

import numpy as np

NUM_CLASSES = 10
LEARNING_RATE = 1e-3
MOMENTUM = 0.9
L2 = 5e-4


@dataclasses.dataclass(frozen=True)
class Case:
  """What all peers train: a Wide-ResNet by momentum and L2, on one random batch.

  Attributes:
    depth: 6 n + 4 layers.
    width: factor on the features 16, 32 and 64 of the stages.
    image_size: height and width of the images, which have three channels.
    batch_size: images in a step.
    method: "skipinit", "batch_norm" or "unnormalized".
    remat: whether blocks are computed again in the backward pass.
  """

  depth: int
  width: int
  image_size: int
  batch_size: int
  method: str
  remat: bool = False

  @property
  def network(self) -> str:
    """The network in words."""
    return f"Wide-ResNet {self.depth}-{self.width}"

  @property
  def step_flops(self) -> float:
    """Operations of the convolutions and the classifier in one step.

    A multiply-add is two. Each product of the forward pass has two of its size in the
    backward pass, but for that of the images, which need no gradient.
    """
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
    products += NUM_CLASSES * features
    return 2.0 * self.batch_size * (3 * products + 2 * stem)

  def batch(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns random images [N, H, W, C] and labels [N]."""
    rng = np.random.default_rng(0)
    shape = (self.batch_size, self.image_size, self.image_size, 3)
    images = rng.normal(size=shape).astype(np.float32)
    return images, rng.integers(NUM_CLASSES, size=self.batch_size, dtype=np.int32)


def main(module: str, arguments: str) -> None:
  """Takes steps as standard input asks for them, and prints their seconds.

  Args:
    module: a module of this folder. Its `make_step` takes a case and options, and
      returns a function that takes one step and waits until it is done.
    arguments: JSON object of the case and the options.
  """
  # Libraries print too; standard output is for answers alone.
  answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

  def answer(value: Any) -> None:
    print(json.dumps(value), file=answers, flush=True)

  make_step = importlib.import_module(f"benchmarks.{module}").make_step
  options = json.loads(arguments)
  fields = {each.name: options.pop(each.name) for each in dataclasses.fields(Case)}
  step = make_step(Case(**fields), **options)
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
  answer(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


if __name__ == "__main__":
  main(*sys.argv[1:])
