"""What a peer of `benchmarks.side_by_side` trains, and how it answers."""

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any


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
  def name(self) -> str:
    """The case in words."""
    return (
      f"Wide-ResNet {self.depth}-{self.width}, {self.image_size}x{self.image_size}, "
      f"batch {self.batch_size}, {self.method}"
    )

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
    products += 10 * features
    return 2.0 * self.batch_size * (3 * products + 2 * stem)


def serve(make_step: Callable[..., Callable[[], Any]]) -> None:
  """Takes steps as standard input asks for them, and prints their seconds.

  Args:
    make_step: called with the case and the peer's options; returns a function that
      takes one step and waits until it is done.
  """
  # Libraries print too; standard output is for answers alone.
  answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

  def answer(value: Any) -> None:
    print(json.dumps(value), file=answers, flush=True)

  options = json.loads(sys.argv[1])
  case = Case(
    **{each.name: options.pop(each.name) for each in dataclasses.fields(Case)}
  )
  step = make_step(case, **options)
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
