"""A verdict on a network in plain words: will its depth keep it from training?

    print(analysis.diagnose(model, variables, images))

It looks at the signal at initialization and at nothing else, so it speaks of depth, not
of learning rates or data.

What counts is derived in `diagnose_signal`. Limits are calibrated against short
trainings by `experiments/diagnosis_check.py`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, overload

import jax
import numpy as np
from flax import linen as nn
from flax import nnx

from skipinit_jax.analysis import measure
from skipinit_jax.analysis.signal import Signal, in_training, to_numpy

# Each limit is about the geometric middle between the last value that trains and the
# first that does not, among the tuned cells of `experiments/diagnosis_check.py` and
# batch-normalized networks of depth 1000, which are known to train. The
# limits about positions also have the post-norm Transformers of its other parts, but
# not those of the last.

FORWARD_LIMIT = 1.5e3
"""Factor on the second moment of what the head sees, from the first block's output to
the last's, up to which networks train.

With SGD, 300 trains and 5,200 does not: a random classifier on such features has a loss
of some fifty and more. A signal that shrinks is held to the inverse.
"""

ADAM_LIMIT = 3e8
"""The same with Adam: 1e8 trains (a Wide-ResNet) and 9e8 does not.

Fully connected networks are slow before: 5e3 trains, 9e6 not in two epochs.
"""

GRADIENT_LIMIT = 300.0
"""Factor on the sensitivity, the gradient's second moment times the signal's, at the
median block, up to which they train.

10 trains and 11,000 does not; networks without normalization, whose attention passes on
1000 times as much, do not either. It is the median because batch norm's gradient grows
as a power of the depth, mostly in the first blocks, and does no harm, while exponential
growth is in all of them.
"""

DISTANCE_LIMIT = 0.01
"""One minus the cosine similarity of two inputs, down to which networks train.

It is the part of their second moment that tells inputs apart: 0.017 trains, 0.006 does
not.
"""

POSITION_LIMIT = 1.2e-3
"""One minus the cosine similarity of two positions of one input, likewise.

With SGD, a Vision Transformer at 2e-3 trains, and one at 8e-4 does not. It is smaller
than that of two inputs because a head that takes the mean over positions still has the
input.
"""

ADAM_POSITION_LIMIT = 3.5e-6
"""The same with Adam: 6e-6 trains and 2e-6 does not."""

SPREAD_LIMIT = 0.27
"""Part of the gradient behind the first block that has to be at other positions than
the one with most of it: with SGD, a causal Transformer at 0.43 trains, and one at 0.17
does not.
"""

ADAM_SPREAD_LIMIT = 0.12
"""The same with Adam: 0.17 trains and 0.08 does not."""

# The logarithm of what follows a sum and leaves its second moment as it is.
_SUM_TOLERANCE = 0.2

# The elasticity of a head that sees the stream's size, with a margin on both sides: a
# sigmoid's is 0.3, a normalizer's the part that is added to the variance in it.
_SEES_SIZE = 0.1

Kind = Literal["explodes", "vanishes", "loses its inputs", "loses its positions"]
Direction = Literal["forward", "backward"]


@dataclasses.dataclass(frozen=True)
class Fault:
  """One way in which the signal is lost.

  Attributes:
    kind: what happens to the signal or, backward, to its gradient.
    direction: the pass in which it happens.
    block: the block, counted from 1, from which on a limit is exceeded. A backward pass
      meets it first and goes on to the blocks before it. 0: the network's inputs
      exceed the limit already.
    name: this block's name; empty for 0.
    harmless_depth: how many blocks the network may have without this fault.
    value: what was held to a limit: the factor on the second moment that the head sees,
      that on the sensitivity, the cosine similarity of two inputs, or of two positions
      of one, behind the last block, or the spread of the gradient behind the first.
  """

  kind: Kind
  direction: Direction
  block: int
  name: str
  harmless_depth: int
  value: float

  def __str__(self) -> str:
    name = "" if self.name == str(self.block) else f" ({self.name})"
    where = f"from block {self.block}{name} on"
    if (self.kind, self.direction) == ("loses its positions", "backward"):
      text = (
        f"The gradient {self.kind} backward {where}: behind the first block, all but "
        f"{self.value:.1g} of it is at one of them."
      )
    elif self.kind in ("loses its inputs", "loses its positions"):
      begins = f"The signal {self.kind} {where}"
      if self.block == 0:
        begins = "The inputs are nearly equal before the first block"
      two = "two of them" if self.kind == "loses its inputs" else "two of one input"
      text = (
        f"{begins}: {two} have a cosine similarity of {_cosine(self.value)} behind the "
        "last one."
      )
    else:
      forward = self.direction == "forward"
      subject, what = ("signal", "") if forward else ("gradient", " times the signal's")
      times = "an infinite factor" if np.isinf(self.value) else f"{self.value:.2g}"
      text = (
        f"The {subject} {self.kind} {self.direction} {where}: through all blocks, its "
        f"second moment{what} changes by {times}."
      )
    if self.block == 0:
      return text
    return f"{text} Up to {self.harmless_depth} blocks would be harmless."


@dataclasses.dataclass(frozen=True)
class Diagnosis:
  """Whether the depth of a network keeps it from training, and what to change.

  Attributes:
    num_blocks: d, the residual blocks.
    forward_growth: second moment behind the last block over that behind the first.
    head: the elasticity of what stands behind the last block: see `Signal.head`.
    gradient_growth: the gradient's second moment before the first block over that
      behind the last; NaN if the forward pass overflows.
    sensitivity_growth: the same of the gradient's second moment times the signal's.
    cosine: cosine similarity of two inputs behind the last block; NaN likewise.
    faults: what is wrong; empty for a network that should train.
    alpha: the initial factor on each present branch with which the second moment grows
      by at most e through all blocks: 1 / sqrt(d) with He initialization, less where
      branches are correlated with the skip path. Any smaller factor, 0 too, is as good.
      None where no factor helps or none is needed.
    advice: what to change, in sentences.
    signal: the signal that was judged, block by block, such as for a figure.
  """

  num_blocks: int
  forward_growth: float
  head: float
  gradient_growth: float
  sensitivity_growth: float
  cosine: float
  faults: tuple[Fault, ...]
  alpha: float | None
  advice: tuple[str, ...]
  signal: Signal = dataclasses.field(repr=False, compare=False)

  @property
  def healthy(self) -> bool:
    """Whether no fault was found."""
    return not self.faults

  @property
  def healthy_with_adam(self) -> bool:
    """Whether no fault was found that keeps Adam from training too.

    The limits are `ADAM_LIMIT`, for a signal that only grows or shrinks, and, for one
    that loses its positions, `ADAM_POSITION_LIMIT` and `ADAM_SPREAD_LIMIT`.
    """
    return all(map(_adam_trains, self.faults))

  @property
  def text(self) -> str:
    """The verdict in plain words."""
    if self.healthy:
      limited = _within(self.forward_growth, FORWARD_LIMIT)
      head = "" if limited else ", which the head does not see,"
      return (
        f"The signal passes all {self.num_blocks} blocks: its second moment changes by "
        f"a factor of {self.forward_growth:.2g} forward{head} and its gradient's by "
        f"{self.gradient_growth:.2g} backward, and two inputs stay apart (cosine "
        f"similarity {_cosine(self.cosine)})."
      )
    adam = ["Adam may train it as it is."] if self.healthy_with_adam else []
    return " ".join([*map(str, self.faults), *adam, *self.advice])

  def __str__(self) -> str:
    return self.text


def _adam_trains(fault: Fault) -> bool:
  """Tells whether Adam trains a network of this fault."""
  match fault.kind, fault.direction:
    case "explodes" | "vanishes", "forward":
      return bool(_within(fault.value, ADAM_LIMIT))
    case "loses its positions", "forward":
      return 1 - fault.value >= ADAM_POSITION_LIMIT
    case "loses its positions", "backward":
      return fault.value >= ADAM_SPREAD_LIMIT
  return False


@overload
def diagnose(
  model: nn.Module,
  variables: Mapping[str, Any],
  batch: Any,
  *,
  blocks: measure.Blocks | None = None,
  loss: Callable[[Any], jax.Array] | None = None,
  key: jax.Array | None = None,
  **arguments: Any,
) -> Diagnosis: ...
@overload
def diagnose(
  model: nnx.Module,
  batch: Any,
  /,
  *,
  blocks: measure.Blocks | None = None,
  loss: Callable[[Any], jax.Array] | None = None,
  key: jax.Array | None = None,
  **arguments: Any,
) -> Diagnosis: ...
def diagnose(  # type: ignore[misc]
  model: Any,
  variables: Any = None,
  batch: Any = None,
  *,
  blocks: measure.Blocks | None = None,
  loss: Callable[[Any], jax.Array] | None = None,
  key: jax.Array | None = None,
  **arguments: Any,
) -> Diagnosis:
  """Diagnoses a network: does the signal survive its depth, forward and backward?

  It is one forward and one backward pass. `diagnose_signal` derives what
  counts.

  Args:
    model: any network of residual blocks, of Flax Linen or NNX, which stays as it is.
    variables: those of a Linen network, at initialization; NNX has none here:
      `diagnose(model, batch)`.
    batch: at least two different examples, as `measure.signal` takes them.
    blocks: the residual blocks; None: those of this package. See `measure.Blocks`.
    loss: as `measure.signal` takes it.
    key: likewise.
    **arguments: the model's other arguments. A Linen model's argument `train` is True
      unless given; a network of NNX is seen in the mode that `train()` sets.

  Returns:
    The diagnosis.

  Raises:
    UsageError: as `measure.signal`.
  """
  blocks = blocks or measure.Blocks()
  model, arguments = in_training(model, arguments)
  signal = measure.signal(
    model, variables, batch, blocks=blocks, loss=loss, key=key, **arguments
  )
  return diagnose_signal(signal)


def diagnose_functions(
  blocks: Sequence[Callable[[Any], Any]],
  x: jax.Array,
  *,
  branches: Sequence[Callable[[Any], Any]] | None = None,
  head: Callable[[Any], Any] | None = None,
  loss: Callable[[Any], jax.Array] | None = None,
  names: Sequence[str] | None = None,
  key: jax.Array | None = None,
) -> Diagnosis:
  """Diagnoses a network of any framework, given as functions.

      diagnose_functions([jax.vmap(block) for block in net.blocks], stem(images))

  Args:
    blocks: the residual blocks, each a function of the stream [N, ..., channels].
    x: the first block's input, of at least two examples.
    branches: for each block what it adds to the skip path: see
      `measure.signal_of_functions`, also for the other arguments.
    head: what stands behind the last block. Without it, a signal that grows counts as
      one that a linear head sees.
    loss: as `measure.signal` takes it.
    names: the blocks' names.
    key: as `measure.signal` takes it.

  Returns:
    The diagnosis.

  Raises:
    UsageError: as `measure.signal_of_functions`.
  """
  signal = measure.signal_of_functions(
    blocks, x, branches=branches, head=head, loss=loss, names=names, key=key
  )
  return diagnose_signal(signal)


def diagnose_signal(signal: Signal) -> Diagnosis:
  """Diagnoses a network by its signal, which has no leading axes.

  Let x_l be the stream behind block l, g_l the loss's derivative by it, and f_l the
  branch that block l adds. The stream's size by itself means nothing: only the branches
  and the head, what stands behind the last block, see it, and what they make of it
  decides.

  - A normalizer at the beginning of each branch takes the size away: f_l(c x) = f_l(x).
    Then x_0's size is arbitrary, x_l = x_0 + f_1 + ... + f_l forgets it, and a small
    one, such as embeddings of deviation 0.02, makes the first branch's derivative
    large, and with it g_0, but nothing else. So growth is counted from x_1, where the
    first branch has given the stream its size. Where branches are homogeneous, f_l(c x)
    = c f_l(x), as with ReLU and without normalizer, that is one block of d later, and
    every later block still counts.
  - The head sees x_d's size unless it begins with a normalizer. The relative change of
    its output over that of x_d's size is its elasticity, `Signal.head`: 1 for a linear
    head, 0 behind a normalizer. Where it is not 0, the growth is held to
    `FORWARD_LIMIT`. It makes the loss and its gradients large, and SGD diverges at all
    ordinary rates. Adam's steps do not depend on the gradient's size: each makes the
    weights of all d layers smaller by a like part, so growth that is exponential in d
    is undone. But a step that all d layers take changes the output by a factor, and
    only a bounded one is stable. So undoing takes a number of steps like the growth's
    logarithm, in which every weight moves and none learns: up to `ADAM_LIMIT`.
  - Let a constant behind block l's sum change the stream's unit: x_l becomes c_l x_l.
    Homogeneous blocks and a normalized head compute the same function with the same
    weights, g_l becomes g_l / c_l, and no weight's gradient changes, since it is a
    product of a g and an x of one unit. Training is the same. What no unit changes is
    E[g_l^2] E[x_l^2], the loss's sensitivity to a relative change of the stream. It is
    constant where a branch passes on gradients as it passes on the signal, E|J^T g|^2 /
    E|g|^2 = E|f|^2 / E|x|^2. That holds of linear layers and ReLU with random weights,
    with any growth, any constant behind the sum, and any alpha. What is left, and held
    to `GRADIENT_LIMIT`, is that blocks pass on too much gradient for their signal, as
    with batch normalization and a sum that is divided, or too little, as attention does
    to tokens that have become alike.
  - Directions have no unit. Two inputs that have become alike, `DISTANCE_LIMIT`, stay
    so.
  - So do two positions of one input, such as tokens (Dong et al., 2021; Noci et al.,
    2022). Split a token into the mean over tokens, which has the part m of the second
    moment, and what it has of its own. At initialization attention weighs all tokens
    nearly alike, so it adds to each an image of the mean, of size m, and of its own
    next to nothing. Behind pre-normalization the skip path keeps what is its own, and m
    grows as 1 - 1 / l at most. A sum that is normalized or divided multiplies it by
    1 / (1 + m) in each block, which is exponential in d: all tokens become one. The
    gradient of what is their own is divided likewise, and E[g^2] E[x^2] does not show
    it, because what they have in common keeps its share of both: `POSITION_LIMIT`.
    Adam's steps do not depend on the gradient's size: `ADAM_POSITION_LIMIT`. Positions
    that are alike behind the first block already are the network's own choice, and no
    fault.
  - Where attention is causal, the first token sees itself alone, so it keeps what is
    its own, and all others become like it (Wu et al., 2024). The gradient of every
    output goes there, and the rest of the input is lost long before tokens are alike:
    `SPREAD_LIMIT`.
  """
  signal = to_numpy(signal)
  with np.errstate(all="ignore"):
    # The first branch gives the stream its size.
    forward = signal.second_moment / signal.second_moment[1]
    forward[0] = 1
    forward = np.where(np.isfinite(forward), forward, np.inf)
    head = 1.0 if signal.head is None else float(np.clip(signal.head, 0, 1))
    seen = forward
    if head < _SEES_SIZE and np.isfinite(forward).all():
      seen = np.ones_like(forward)
    backward, gradient = signal.relative_sensitivity, signal.relative_gradient
    # Behind an overflow there is nothing to differentiate, and no direction.
    if np.isinf(forward).any():
      backward = gradient = np.full_like(backward, np.nan)
    else:
      overflows = ~np.isfinite(signal.gradient_second_moment)
      backward = np.where(overflows, np.inf, backward)
    faults = tuple(_faults(signal, seen, backward))
    alpha, advice = _advice(signal, faults)
  return Diagnosis(
    num_blocks=len(signal.names),
    forward_growth=float(forward[-1]),
    head=head,
    gradient_growth=float(gradient[0]),
    sensitivity_growth=float(backward[0]),
    cosine=float(signal.cosine[-1]),
    faults=faults,
    alpha=alpha,
    advice=advice,
    signal=signal,
  )


def _within(values: Any, limit: float) -> Any:
  return (values <= limit) & (values >= 1 / limit)


def _last(condition: np.ndarray) -> int:
  """Returns the last place where a condition holds; -1: nowhere."""
  return int(np.flatnonzero(condition)[-1]) if condition.any() else -1


def _faults(
  signal: Signal, forward: np.ndarray, backward: np.ndarray
) -> Iterator[Fault]:
  """Yields what is wrong.

  Args:
    forward: the second moment that the head sees over that behind the first block,
      [d + 1].
    backward: the sensitivity over that behind the last, [d + 1].
  """

  def fault(
    kind: Kind, direction: Direction, block: int, harmless: int, value: float
  ) -> Fault:
    name = signal.names[block - 1] if block else ""
    return Fault(kind, direction, block, name, harmless, float(value))

  within = _within(forward, FORWARD_LIMIT)
  if not within[-1]:
    kind: Kind = "explodes" if forward[-1] > 1 else "vanishes"
    harmless = _last(within)
    yield fault(kind, "forward", harmless + 1, harmless, forward[-1])
  within = _within(backward, GRADIENT_LIMIT)
  median_within = _within(np.median(backward), GRADIENT_LIMIT)
  if not np.isnan(backward).any() and not median_within:
    kind = "explodes" if backward[0] > 1 else "vanishes"
    harmless = _harmless_backward(backward)
    yield fault(kind, "backward", _last(~within) + 1, harmless, backward[0])
  # A cosine that is not finite is no fault of this kind.
  apart = ~(1 - signal.cosine < DISTANCE_LIMIT)
  if not apart[-1]:
    block = _last(apart) + 1
    harmless = max(block - 1, 0)
    yield fault("loses its inputs", "forward", block, harmless, signal.cosine[-1])
  if signal.position_cosine is not None:
    # Behind a pooling there are no positions.
    known = np.flatnonzero(np.isfinite(signal.position_cosine))
    apart = 1 - signal.position_cosine[known] >= POSITION_LIMIT
    # Positions that are alike from the beginning are not lost.
    if apart.any() and not apart[-1]:
      harmless = int(known[_last(apart)]) + 1
      value = signal.position_cosine[known[-1]]
      yield fault("loses its positions", "forward", harmless + 1, harmless, value)
  if signal.gradient_spread is not None:
    known = np.flatnonzero(np.isfinite(signal.gradient_spread))
    spread = signal.gradient_spread[known]
    # A network may read one position alone: then the gradient is there in all blocks.
    if (spread >= SPREAD_LIMIT).any() and spread[0] < SPREAD_LIMIT:
      block = int(known[np.argmax(spread >= SPREAD_LIMIT)])
      harmless = len(signal.names) - block
      yield fault("loses its positions", "backward", block, harmless, spread[0])


def _harmless_backward(gradient: np.ndarray) -> int:
  """Returns how many blocks a network may have whose gradient changes like this."""
  num_blocks = len(gradient) - 1
  # Up to its last block, a network that ends earlier multiplies the gradient by what
  # this one does there. Where that is no number, count from the other end.
  known = np.isfinite(gradient).all() and gradient.all()
  for depth in range(1, num_blocks):
    part = gradient[: depth + 1] if known else gradient[num_blocks - depth :]
    if not _within(np.median(part) / part[-1], GRADIENT_LIMIT):
      return depth - 1
  return num_blocks - 1


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
  parts = signal.skip_second_moment + signal.branch_second_moment
  overlaps = (signal.sum_second_moment - parts) / signal.skip_second_moment / 2
  sum_factor = np.median(_finite(signal.second_moment[1:] / signal.sum_second_moment))
  # A branch that was not seen is the output less the input. What follows such a sum
  # shows as a part of the input that the branch takes away.
  sum_factor *= min(1 + np.median(_finite(overlaps)), 1) ** 2
  normalized = np.isfinite(signal.moving_variance).any()
  # A normalized branch keeps its size when the stream's changes; others follow it.
  skip = signal.second_moment[0] if normalized else signal.skip_second_moment
  ratio = _finite(signal.branch_second_moment / skip).mean()
  # Below zero it is chance, which smaller branches need not have.
  overlap = 0.0 if normalized else max(_finite(overlaps).mean(), 0)
  alpha = float((np.sqrt(overlap**2 + ratio / len(signal.names)) - overlap) / ratio)
  if abs(np.log(sum_factor)) > _SUM_TOLERANCE:
    advice.append(
      "Leave the sum of skip path and branch as it is: what follows it multiplies its "
      f"second moment by {sum_factor:.2g} in each block."
    )
    if normalized:
      return None, tuple(advice)
  if np.isfinite(alpha):
    advice.append(
      f"Start each branch at {alpha:.2g} times its present size, or at 0, by a "
      "learnable scalar at its end (SkipInit)."
    )
    return alpha, tuple(advice)
  advice.append("Scale or normalize the branches, so that each block adds little.")
  return None, tuple(advice)


def _finite(values: np.ndarray) -> np.ndarray:
  """Returns the values that are finite, or NaN if there are none."""
  finite = values[np.isfinite(values)]
  return finite if finite.size else np.array([np.nan])


def _cosine(value: float) -> str:
  # 0.9996 is not 1.00. float32 knows nothing of less than a millionth.
  if value < 0.95:
    return f"{value:.2f}"
  return f"1 - {1 - value:.1g}" if 1 - value > 1e-6 else "1"
