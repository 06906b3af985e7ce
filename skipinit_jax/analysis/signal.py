"""The quantities that theory predicts and measurement estimates, block by block."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx, struct

from skipinit_jax.errors import UsageError

Values = Any
"""An array of numbers: of `numpy` from theory, of `jax` from one measured pass."""


@struct.dataclass
class Signal:
  """How a signal and its gradient pass through d residual blocks.

  The stream is what flows from block to block. Its entry 0 is the first block's
  input and its entry l the output of block l. Skip path and branch are what a block
  adds, so SkipInit's scalar is in the branch; a constant factor on their sum comes
  after. All of it may have leading axes, such as one over seeds.

  A second moment is the mean square over examples, positions and channels. A variance
  is taken over examples and positions in each channel, then averaged over channels:
  it is what batch normalization divides by. The two differ by the channels' squared
  means, which are not small behind ReLU.

  Attributes:
    names: the blocks' names, d of them.
    second_moment: of the stream, [..., d + 1].
    variance: of the stream, [..., d + 1].
    cosine: cosine similarity of two different examples in the stream, its mean over
      pairs, [..., d + 1].
    gradient_second_moment: mean square of the derivative of a scalar (a loss) with
      respect to the stream, [..., d + 1].
    skip_second_moment: [..., d].
    skip_variance: [..., d].
    branch_second_moment: [..., d].
    branch_variance: [..., d].
    sum_second_moment: of skip path plus branch, before a constant factor or anything
      else that follows the sum, [..., d]. It is not the sum of their second moments
      where they are correlated, as with a branch that ends in a ReLU.
    moving_variance: what the moving variance of the block's first batch
      normalization converges to, its mean over channels; NaN in a block without,
      [..., d].
    position_cosine: cosine similarity of two different positions of one example behind
      each block, its mean over pairs and examples, [..., d]; NaN where there is one
      position. None in theory.
    gradient_spread: the part of the gradient's second moment behind each block that is
      not at the one position that has most of it on average over examples, [..., d];
      NaN where there is one position. None in theory.
    alpha: the learnable scalar at the end of the branch, [..., d]; None in theory,
      and where a block has none.
    head: the elasticity of what stands behind the last block, [...]: the relative
      change of what tells examples apart in the network's output, over the relative
      change of the stream's size that causes it. 0 behind a normalizer, 1 of linear
      layers; 1 too where it is not known, as behind a classifier of zeros. None in
      theory.
  """

  names: tuple[str, ...] = struct.field(pytree_node=False)
  second_moment: Values
  variance: Values
  cosine: Values
  gradient_second_moment: Values
  skip_second_moment: Values
  skip_variance: Values
  branch_second_moment: Values
  branch_variance: Values
  sum_second_moment: Values
  moving_variance: Values
  position_cosine: Values | None = None
  gradient_spread: Values | None = None
  alpha: Values | None = None
  head: Values | None = None

  @property
  def branch_to_skip(self) -> Values:
    """Variance of the branch over that of the skip path, [..., d].

    Batch normalization makes it about 1 / l in block l (De & Smith, 2020, section 2).
    """
    return self.branch_variance / self.skip_variance

  @property
  def branch_share(self) -> Values:
    """The branch's part of the sum's second moment, [..., d], in [0, 1].

    It is what `theory.path_weights` takes.
    """
    total = self.skip_second_moment + self.branch_second_moment
    return self.branch_second_moment / total

  @property
  def gradient_rms(self) -> Values:
    """Root mean square of the derivative with respect to a block's output, [..., d].

    It is the gradient of the features, not that of the block's parameters.
    """
    return self.gradient_second_moment[..., 1:] ** 0.5

  @property
  def relative_gradient(self) -> Values:
    """Gradient's second moment over that at the last block's output, [..., d + 1]."""
    return self.gradient_second_moment / self.gradient_second_moment[..., -1:]

  @property
  def relative_sensitivity(self) -> Values:
    """How the loss feels relative changes of the stream, over the last, [..., d + 1].

    It is the gradient's second moment times the stream's: the mean square of the loss's
    change where each entry of the stream changes by a small random part of its size.
    """
    gradient = self.relative_gradient
    return gradient * (self.second_moment / self.second_moment[..., -1:])


def to_numpy(signal: Signal) -> Signal:
  """Returns the signal with arrays of `numpy`, float64."""
  return jax.tree.map(lambda values: np.asarray(values, np.float64), signal)


def block_names(path: Sequence[str], length: int | None) -> tuple[str, ...]:
  """Returns the names of the blocks at a module's path.

  Args:
    path: the module's path in the network.
    length: how many blocks are stacked there by a scan; None: one, not scanned.
  """
  name = "/".join(path)
  return (name,) if length is None else tuple(f"{name}/{i}" for i in range(length))


def in_training(model: Any, arguments: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
  """Returns a model and its arguments as they are where it is trained.

  For Linen, `train`, if the model has that argument, is True unless given. A network of
  NNX stays as it is: a copy has the mode.
  """
  if isinstance(model, nnx.Module):
    model = nnx.clone(model)
    model.train()
  elif "train" in inspect.signature(type(model).__call__).parameters:
    arguments = {"train": True, **arguments}
  return model, dict(arguments)


def require_two_examples(batch_size: int) -> None:
  """Raises a UsageError if the batch has no pair of examples."""
  if batch_size < 2:
    raise UsageError(
      f"The batch has {batch_size} example(s): a variance over the batch and the "
      "similarity of two inputs need at least 2."
    )
