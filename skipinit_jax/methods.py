"""Methods: what keeps a residual network trainable, as data.

A `Method` says how the residual blocks of a network are normalized, scaled and
initialized. Every model takes one. A new method is made from a known one:

    method = dataclasses.replace(methods.get("skipinit"), name="mine", alpha=0.1)

and `methods.register(method)` lets programs and studies find it by its name.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from flax import linen as nn

from skipinit_jax.errors import UsageError, unknown_name
from skipinit_jax.layers import GhostBatchNorm, LayerScale, SkipInit

__all__ = [
  "NAMES",
  "Method",
  "ModuleFactory",
  "batch_normalizer",
  "get",
  "inverse_sqrt_depth",
  "layer_scale_by_depth",
  "register",
  "with_ghost_batches",
]

ModuleFactory = Callable[..., Any]
"""Returns a Flax module, such as a module class or a `functools.partial` of one."""


def inverse_sqrt_depth(num_blocks: int) -> float:
  """Returns 1 / sqrt(d), for a network of d residual blocks."""
  return 1.0 / math.sqrt(num_blocks)


def layer_scale_by_depth(num_blocks: int) -> float:
  """Returns LayerScale's initial value: small, and smaller in deep networks.

  Touvron et al. (ICCV 2021), section 2: 0.1 up to a depth of 18, 1e-5 up to 24 and 1e-6
  beyond. They count layers of a Transformer, each of which is two residual blocks.

  Args:
    num_blocks: residual blocks of the network.
  """
  num_layers = num_blocks / 2
  return 0.1 if num_layers <= 18 else 1e-5 if num_layers <= 24 else 1e-6


batch_normalizer: functools.partial[nn.BatchNorm] = functools.partial(
  nn.BatchNorm, momentum=0.9, epsilon=1e-5
)
"""Batch normalization over the global batch, as the methods here use it."""


@dataclasses.dataclass(frozen=True)
class Method:
  """What keeps a residual network trainable.

  Attributes:
    name: the name in tables and flags.
    title: a short title for figures and tables.
    normalizer: factory of the module before each activation (after each
      convolution in version-1 networks); None: no normalization. It is given
      `use_running_average`, `dtype` and `param_dtype`, each if it accepts it and a
      `functools.partial` does not set it already.
    output_normalizer_only: whether the normalizer stands only once, before the
      classifier, and in no residual block.
    alpha: the initial value of the scale at the end of each branch, or a function of
      the number of residual blocks; None: no scale.
    learnable_alpha: whether alpha is a parameter.
    branch_scale: factory of the module at the end of each branch that multiplies it by
      alpha at initialization: `SkipInit`, one scalar. It is given `initial_value`, and
      `learnable` and `param_dtype`, each if it accepts it. In its place, a module of
      one's own may learn another scale; call its parameter `alpha` or `scale`.
    sum_scale: a constant factor on the sum of shortcut and branch.
    divide_by_expected_std: whether each branch takes its input divided by the
      standard deviation that is expected there: see `expected_variances`.
    weight_standardization: whether convolutions and dense layers but the classifier
      have scaled weight standardization, and activations its gain: see
      `layers.WeightStandardizedConv`.
    initialization: "he": He initialization by fan-in; "fixup": Fixup's.
    scalar_biases: whether Fixup's scalar biases stand before each convolution and
      each activation and at the end of each branch.
    use_bias: whether convolutions (but the stem) and dense layers have biases.
    dropout_rate: share of the features dropped before the classifier.
  """

  name: str
  title: str
  normalizer: ModuleFactory | None = None
  output_normalizer_only: bool = False
  alpha: float | Callable[[int], float] | None = None
  learnable_alpha: bool = True
  branch_scale: ModuleFactory = SkipInit
  sum_scale: float = 1.0
  divide_by_expected_std: bool = False
  weight_standardization: bool = False
  initialization: Literal["he", "fixup"] = "he"
  scalar_biases: bool = False
  use_bias: bool = False
  dropout_rate: float = 0.0

  def __post_init__(self) -> None:
    if not 0 <= self.dropout_rate < 1:
      raise UsageError(f"dropout_rate is {self.dropout_rate}: it must be in [0, 1).")
    if self.initialization not in ("he", "fixup"):
      raise unknown_name("initialization", self.initialization, ("he", "fixup"))
    if not math.isfinite(self.sum_scale):
      raise UsageError(f"sum_scale is {self.sum_scale}: it must be finite.")
    alpha = self.alpha
    if alpha is not None and not callable(alpha) and not math.isfinite(alpha):
      raise UsageError(f"alpha is {alpha}: it must be finite.")
    if self.output_normalizer_only and self.normalizer is None:
      raise UsageError("output_normalizer_only is set, but normalizer is None.")

  def initial_alpha(self, num_blocks: int) -> float | None:
    """Returns alpha at initialization in a network of `num_blocks` blocks."""
    return self.alpha(num_blocks) if callable(self.alpha) else self.alpha

  def expected_variances(self, transitions: Sequence[bool]) -> tuple[float, ...]:
    """Returns beta^2, the variance that theory expects at each block's input.

    Brock, De & Smith (ICLR 2021), section 3: in x' = x + alpha f(x / beta), the branch
    f keeps the variance one of its input, so each block adds alpha^2. In a transition
    the shortcut takes x / beta too, which resets the variance to 1 + alpha^2.

    Args:
      transitions: of each block of the network, whether its shortcut projects.
    """
    alpha = self.initial_alpha(len(transitions))
    growth = 1.0 if alpha is None else alpha**2
    variances = [1.0]
    for transition in transitions:
      skip = 1.0 if transition else variances[-1]
      variances.append(self.sum_scale**2 * (skip + growth))
    return tuple(variances[:-1])


# 0.2 is the paper's rate on ImageNet; another experiment of it uses 0.6.
_DROPOUT_RATE = 0.2

_skipinit = Method("skipinit", "SkipInit, α = 0", alpha=0.0)
_fixup = Method("fixup", "Fixup", alpha=1.0, initialization="fixup", scalar_biases=True)
_batch_norm = Method("batch_norm", "Batch norm", normalizer=batch_normalizer)

_METHODS: dict[str, Method] = {
  method.name: method
  for method in (
    _batch_norm,
    _skipinit,
    Method(
      "skipinit_inverse_sqrt_depth", "SkipInit, α = 1/√d", alpha=inverse_sqrt_depth
    ),
    Method("skipinit_one", "SkipInit, α = 1", alpha=1.0),
    Method("divide_by_sqrt2", "Divide by √2", sum_scale=1 / math.sqrt(2)),
    Method("unnormalized", "Unnormalized"),
    dataclasses.replace(
      _skipinit, name="skipinit_biases", title="SkipInit + biases", use_bias=True
    ),
    dataclasses.replace(
      _skipinit,
      name="regularized_skipinit",
      title="Regularized SkipInit",
      use_bias=True,
      dropout_rate=_DROPOUT_RATE,
    ),
    _fixup,
    dataclasses.replace(
      _fixup,
      name="fixup_dropout",
      title="Fixup + dropout",
      dropout_rate=_DROPOUT_RATE,
    ),
    dataclasses.replace(
      _batch_norm,
      name="batch_norm_divide_by_sqrt2",
      title="Batch norm, divide by √2",
      sum_scale=1 / math.sqrt(2),
    ),
    dataclasses.replace(
      _batch_norm,
      name="output_batch_norm",
      title="Batch norm at the output only",
      output_normalizer_only=True,
    ),
    Method("layer_norm", "Layer norm", normalizer=nn.LayerNorm),
    # Alpha = 0.2, biases and the scale of each output feature are those of the
    # authors' networks. They also clip gradients (Brock et al., ICML 2021), which is
    # a choice of training: adaptive_clip, 0.01 in their paper.
    Method(
      "nf_resnet",
      "NF-ResNet",
      alpha=0.2,
      learnable_alpha=False,
      divide_by_expected_std=True,
      weight_standardization=True,
      use_bias=True,
    ),
    # Bachlechner et al. (UAI 2021) found independently of De & Smith what is the same
    # network with the blocks of this package.
    dataclasses.replace(_skipinit, name="rezero", title="ReZero"),
    # In its paper beside normalization, here in place of it.
    Method(
      "layer_scale",
      "LayerScale",
      alpha=layer_scale_by_depth,
      branch_scale=LayerScale,
    ),
  )
}

NAMES: tuple[str, ...] = tuple(_METHODS)
"""The names of all methods, in the order of their table."""


def get(name: str) -> Method:
  """Returns the method of a name.

  Args:
    name: one of `NAMES`.

  Returns:
    The method.

  Raises:
    UsageError: no method has this name; the message lists those that exist.
  """
  if name not in _METHODS:
    raise unknown_name("method", name, NAMES)
  return _METHODS[name]


def register(method: Method) -> None:
  """Adds a method to the table, so that programs and studies find it by its name.

  A study's worker processes import the module that was started, so register there, at
  its top level:

      methods.register(my_method)
      if __name__ == "__main__":
        program.run(depth_study.main)

  Args:
    method: a method with a name of its own.

  Raises:
    UsageError: another method has its name or its title.
  """
  global NAMES
  for known in _METHODS.values():
    for field in ("name", "title"):
      if getattr(known, field) == getattr(method, field):
        raise UsageError(
          f"{field} is {getattr(method, field)!r}, which is that of another method: "
          "results could not tell them apart."
        )
  _METHODS[method.name] = method
  NAMES = tuple(_METHODS)


def with_ghost_batches(method: Method, ghost_batch_size: int) -> Method:
  """Returns a batch-normalized method that normalizes over ghost batches.

  Args:
    method: a method whose normalizer is `batch_normalizer`.
    ghost_batch_size: examples of a ghost batch; see `layers.GhostBatchNorm`.

  Raises:
    UsageError: the method has another normalizer or none.
  """
  # Momentum and epsilon are those of the global batch's normalizer.
  settings = batch_normalizer.keywords
  if method.normalizer is not batch_normalizer:
    raise UsageError(
      f"ghost_batch_size is {ghost_batch_size}, but method {method.name!r} has no "
      "batch normalization."
    )
  normalizer = functools.partial(
    GhostBatchNorm, ghost_batch_size=ghost_batch_size, **settings
  )
  return dataclasses.replace(method, normalizer=normalizer)
