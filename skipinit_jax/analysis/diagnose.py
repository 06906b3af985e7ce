"""A verdict on a network in plain words: will its depth keep it from training?

    print(analysis.diagnose(model, variables, images))

It looks at the signal at initialization and at nothing else, so it speaks of depth, not
of learning rates or data. Limits are calibrated against short trainings by
`experiments/diagnosis_check.py`.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from flax import linen as nn

from skipinit_jax.analysis import measure
from skipinit_jax.analysis.signal import Signal, to_numpy

# Each limit is about the geometric middle between the largest value that trains and the
# smallest that does not, among the tuned cells of `experiments/diagnosis_check.py` and
# batch-normalized networks of depth 1000, which are known to train.

FORWARD_LIMIT = 5e3
"""Factor on the signal's second moment, over all blocks, up to which networks train.

1000 trains (batch norm at depth 1000), 29,000 does not: a random classifier on such
features has a loss in the hundreds. A signal that shrinks is held to the inverse.
"""

GRADIENT_LIMIT = 300.0
"""Factor on the gradient's second moment, at the median block, up to which they train.

140 trains and 770 does not. The median, because batch norm's gradient grows as a power
of the depth, mostly in the first blocks, and does no harm (in a Wide-ResNet of 1000
layers by 3e6 at the first and 140 at the median block), while exponential growth is in
all of them.
"""

DISTANCE_LIMIT = 0.035
"""One minus the cosine similarity of two inputs, down to which networks train.

It is the part of their second moment that tells inputs apart: 0.15 trains, 0.008 does
not.
"""

# Skip path and branch are uncorrelated at initialization: their sum's second moment is
# the sum of theirs, and any other factor comes after it. Narrow networks deviate.
_SUM_TOLERANCE = 0.2


@dataclasses.dataclass(frozen=True)
class Fault:
  """One way in which the signal is lost.

  Attributes:
    kind: what happens to the signal or, backward, to its gradient.
    direction: of the pass.
    block: the block, counted from 1, from which on a limit is exceeded. Backward, the
      pass meets it first, and all blocks before it are affected too. 0: the network's
      inputs exceed it already.
    name: this block's name; empty for 0.
    harmless_depth: how many blocks the network may have without this fault.
    value: second moment at the end of the pass over that at its beginning, or the
      cosine similarity of two inputs behind the last block.
  """

  kind: Literal["explodes", "vanishes", "loses its inputs"]
  direction: Literal["forward", "backward"]
  block: int
  name: str
  harmless_depth: int
  value: float

  def __str__(self) -> str:
    where = f"block {self.block} ({self.name})"
    harmless = f"Up to {self.harmless_depth} blocks would be harmless."
    if self.kind == "loses its inputs" and self.block == 0:
      return (
        "The inputs are nearly equal before the first block: two of them have a cosine "
        f"similarity of {_cosine(self.value)} behind the last one."
      )
    if self.kind == "loses its inputs":
      return (
        f"The signal loses its inputs from {where} on: two of them have a cosine "
        f"similarity of {_cosine(self.value)} behind the last one. {harmless}"
      )
    times = "an infinite factor" if np.isinf(self.value) else f"{self.value:.2g}"
    if self.direction == "forward":
      return (
        f"The signal {self.kind} forward from {where} on: through all blocks, its "
        f"second moment changes by {times}. {harmless}"
      )
    return (
      f"The gradient {self.kind} backward from {where} on: through all blocks, its "
      f"second moment changes by {times}. {harmless}"
    )


@dataclasses.dataclass(frozen=True)
class Diagnosis:
  """Whether the depth of a network keeps it from training, and what to change.

  Attributes:
    num_blocks: d, the residual blocks.
    forward_growth: second moment behind the last block over that before the first.
    gradient_growth: the gradient's second moment before the first block over that
      behind the last; NaN if the forward pass overflows.
    cosine: cosine similarity of two inputs behind the last block; NaN likewise.
    faults: what is wrong; empty for a network that should train.
    alpha: where that helps, the initial factor on each branch, as it is now, with
      which the blocks' second moment grows by at most e; 1 / sqrt(d) with He
      initialization. Any smaller factor, 0 too, is as good.
    advice: what to change, in sentences.
  """

  num_blocks: int
  forward_growth: float
  gradient_growth: float
  cosine: float
  faults: tuple[Fault, ...]
  alpha: float | None
  advice: tuple[str, ...]

  @property
  def healthy(self) -> bool:
    """Whether no fault was found."""
    return not self.faults

  @property
  def text(self) -> str:
    """The verdict in plain words."""
    if self.healthy:
      return (
        f"The signal passes all {self.num_blocks} blocks: its second moment changes by "
        f"a factor of {self.forward_growth:.2g} forward and its gradient's by "
        f"{self.gradient_growth:.2g} backward, and two inputs stay apart (cosine "
        f"similarity {_cosine(self.cosine)})."
      )
    return " ".join([*map(str, self.faults), *self.advice])

  def __str__(self) -> str:
    return self.text


def diagnose(
  model: nn.Module,
  variables: Mapping[str, Any],
  batch: jax.Array,
  *,
  blocks: measure.Blocks | None = None,
  loss: Callable[[Any], jax.Array] | None = None,
  key: jax.Array | None = None,
  **arguments: Any,
) -> Diagnosis:
  """Diagnoses a network: does the signal survive its depth, forward and backward?

  It is one forward and one backward pass. What stands behind the last block is not
  seen: a normalizer there makes a growing signal harmless.

  Args:
    model: any Flax Linen network of residual blocks.
    variables: its variables, at initialization.
    batch: at least two different examples, [N, ...].
    blocks: the residual blocks; None: those of this package. See `measure.Blocks`.
    loss: see `measure.signal`.
    key: see `measure.signal`.
    **arguments: the model's other arguments. A model's argument `train` is True unless
      given.

  Returns:
    The diagnosis.

  Raises:
    UsageError: as `measure.signal`.
  """
  if "train" in inspect.signature(type(model).__call__).parameters:
    arguments.setdefault("train", True)
  return diagnose_signal(
    measure.signal(
      model,
      variables,
      batch,
      blocks=blocks or measure.Blocks(),
      loss=loss,
      key=key,
      **arguments,
    )
  )


def diagnose_signal(signal: Signal) -> Diagnosis:
  """Diagnoses a network by its signal, measured or predicted.

  Args:
    signal: of d blocks, without leading axes.
  """
  signal = to_numpy(signal)
  with np.errstate(all="ignore"):
    forward = _overflowed(signal.second_moment / signal.second_moment[0])
    gradient = signal.gradient_second_moment
    # Behind an overflow there is nothing to differentiate, and no direction.
    if np.isinf(forward).any():
      gradient = np.full_like(gradient, np.nan)
    backward = gradient / gradient[-1]
  found = [
    _forward_fault(signal, forward),
    _backward_fault(signal, gradient),
    _distance_fault(signal),
  ]
  faults = tuple(fault for fault in found if fault is not None)
  alpha, advice = _advice(signal, faults)
  return Diagnosis(
    num_blocks=len(signal.names),
    forward_growth=float(forward[-1]),
    gradient_growth=float(backward[0]),
    cosine=float(signal.cosine[-1]),
    faults=faults,
    alpha=alpha,
    advice=advice,
  )


def _overflowed(values: np.ndarray) -> np.ndarray:
  return np.where(np.isfinite(values), values, np.inf)


def _within(values: Any, limit: float) -> Any:
  return (values <= limit) & (values >= 1 / limit)


def _forward_fault(signal: Signal, growth: np.ndarray) -> Fault | None:
  within = _within(growth, FORWARD_LIMIT)
  if within[-1]:
    return None
  harmless = int(np.flatnonzero(within)[-1])
  kind: Literal["explodes", "vanishes"] = "explodes" if growth[-1] > 1 else "vanishes"
  name = signal.names[harmless]
  return Fault(kind, "forward", harmless + 1, name, harmless, float(growth[-1]))


def _backward_fault(signal: Signal, gradient: np.ndarray) -> Fault | None:
  with np.errstate(all="ignore"):
    growth = gradient / gradient[-1]
  if np.isnan(growth).any() or _within(np.median(growth), GRADIENT_LIMIT):
    return None
  num_blocks = len(signal.names)
  # Up to its last block, a network that ends earlier multiplies the gradient by what
  # this one does there. Where that is no number, count from the other end.
  known = np.isfinite(gradient).all() and gradient.all()
  harmless = 0
  for depth in range(1, num_blocks):
    part = gradient[: depth + 1] if known else gradient[num_blocks - depth :]
    if not _within(np.median(part) / part[-1], GRADIENT_LIMIT):
      break
    harmless = depth
  block = int(np.flatnonzero(~_within(growth, GRADIENT_LIMIT))[-1]) + 1
  kind: Literal["explodes", "vanishes"] = "explodes" if growth[0] > 1 else "vanishes"
  name = signal.names[block - 1]
  return Fault(kind, "backward", block, name, harmless, float(growth[0]))


def _distance_fault(signal: Signal) -> Fault | None:
  # Whatever is not finite is no fault of this kind.
  apart = ~(1 - signal.cosine < DISTANCE_LIMIT)
  if apart[-1]:
    return None
  harmless = int(np.flatnonzero(apart)[-1]) if apart.any() else -1
  return Fault(
    kind="loses its inputs",
    direction="forward",
    block=harmless + 1,
    name=signal.names[harmless] if harmless >= 0 else "",
    harmless_depth=max(harmless, 0),
    value=float(signal.cosine[-1]),
  )


def _advice(
  signal: Signal, faults: tuple[Fault, ...]
) -> tuple[float | None, tuple[str, ...]]:
  """Returns alpha and sentences on what to change."""
  if not faults:
    return None, ()
  advice = []
  if any(fault.block == 0 for fault in faults):
    advice.append("Center the inputs over the examples.")
    if len(faults) == 1:
      return None, tuple(advice)
  with np.errstate(all="ignore"):
    total = signal.skip_second_moment + signal.branch_second_moment
    sum_factor = _median(signal.second_moment[1:] / total)
    normalized = np.isfinite(signal.moving_variance).any()
    # A normalized branch keeps its size when the stream's changes; others follow it.
    skip = signal.second_moment[0] if normalized else signal.skip_second_moment
    ratios = signal.branch_second_moment / skip
    ratios = ratios[np.isfinite(ratios)]
    alpha = float(1 / np.sqrt(len(signal.names) * ratios.mean()))
  scaled_sum = abs(np.log(sum_factor)) > _SUM_TOLERANCE
  if scaled_sum:
    advice.append(
      "Leave the sum of skip path and branch as it is: what follows it multiplies its "
      f"second moment by {sum_factor:.2g} in each block."
    )
  if scaled_sum and normalized:
    return None, tuple(advice)
  if not np.isfinite(alpha):
    advice.append("Scale or normalize the branches, so that each block adds little.")
    return None, tuple(advice)
  advice.append(
    f"Start each branch at {alpha:.2g} times its present size, or at 0, by a learnable "
    "scalar at its end (SkipInit)."
  )
  return alpha, tuple(advice)


def _median(values: np.ndarray) -> float:
  finite = values[np.isfinite(values)]
  return float(np.median(finite)) if finite.size else float("nan")


def _cosine(value: float) -> str:
  # 0.9996 is not 1.00.
  return f"{value:.2f}" if value < 0.95 else f"1 - {max(1 - value, 0):.1g}"
