"""Typed default configurations of the equivalences."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from skipinit_jax.analysis import equivalence
from skipinit_jax.errors import UsageError, unknown_name

EXPERIMENTS: tuple[str, ...] = ("reparameterization", "weight_decay")
MODELS: tuple[str, ...] = ("residual_mlp", "wide_resnet")


@dataclasses.dataclass
class EquivalenceConfig:
  """A network on digits, and how it is trained.

  Attributes:
    experiment: reparameterization (of SkipInit) or weight_decay (of batch norm).
    model: residual_mlp or wide_resnet.
    depth: blocks of a residual_mlp, layers of a wide_resnet.
    width: features of a residual_mlp, factor on those of a wide_resnet.
    batch_size: training images of a step.
    steps: steps of each run.
    learning_rate: constant rate of the original run.
    momentum: heavy-ball momentum.
    l2: coefficient of the L2 penalty l2/2 |w|^2, added to the gradient.
    constants: what parameters are multiplied by, for reparameterization only.
    seed: seed of the initialization and of the order of the images.
  """

  experiment: str = "reparameterization"
  model: str = "residual_mlp"
  depth: int = 16
  width: int = 64
  batch_size: int = 64
  steps: int = 200
  learning_rate: float = 2**-4
  momentum: float = 0.9
  l2: float = 5e-4
  constants: tuple[float, ...] = (0.25, 4.0, 3.0, 10.0)
  seed: int = 0

  def validate(self) -> None:
    """Raises a UsageError for values that nothing else would check."""
    for name, known in {"experiment": EXPERIMENTS, "model": MODELS}.items():
      if getattr(self, name) not in known:
        raise unknown_name(name, getattr(self, name), known)
    if self.steps < 2:
      raise UsageError(f"steps is {self.steps}: it must be at least 2.")
    if not 2**-30 <= self.learning_rate <= 2**30:
      raise UsageError(
        f"learning_rate is {self.learning_rate}: it must be in [2^-30, 2^30]."
      )
    if not 0 <= self.momentum < 1:
      raise UsageError(f"momentum is {self.momentum}: it must be in [0, 1).")
    if not 0 <= self.l2 < math.inf:
      raise UsageError(f"l2 is {self.l2}: it must be finite and not negative.")
    if not 0 <= self.seed < 2**32:
      raise UsageError(f"seed is {self.seed}: it must be in [0, 2^32).")
    if self.experiment == "reparameterization":
      self._validate_constants()
    else:
      self._validate_weight_decay()

  def _validate_constants(self) -> None:
    if not self.constants:
      raise UsageError("constants is empty: name at least one.")
    constants: tuple[Any, ...] = self.constants
    for c in constants:
      is_number = isinstance(c, int | float)
      if not is_number or c == 1 or not 2**-16 <= c <= 2**16:
        raise UsageError(
          f"constants has {c!r}: each must be a number in [2^-16, 2^16] other than 1."
        )
    if len(set(self.constants)) < len(self.constants):
      raise UsageError(f"constants has one twice: {self.constants}.")

  def _validate_weight_decay(self) -> None:
    for name in ("l2", "momentum"):
      if getattr(self, name) == 0:
        raise UsageError(f"{name} is 0: weight_decay is about its effect.")
    if self.batch_size < 3:
      raise UsageError(
        f"batch_size is {self.batch_size}: of two images, batch norm makes 1 and -1 "
        "whatever they are, so it must be at least 3."
      )
    equivalence.decay_root(self.learning_rate, self.momentum, self.l2)


def reparameterization() -> EquivalenceConfig:
  """A loss of divided parameters, at rates times the squared divisor."""
  return EquivalenceConfig()


def weight_decay() -> EquivalenceConfig:
  """Batch norm with weight decay, and without at a rate that grows out of float32."""
  return EquivalenceConfig(
    experiment="weight_decay", steps=1200, learning_rate=2**-3, l2=0.02
  )


CONFIGS: dict[str, Callable[[], EquivalenceConfig]] = {
  "reparameterization": reparameterization,
  "weight_decay": weight_decay,
}
