"""Methods: what keeps a residual network trainable, as data.

A `Method` says how the residual blocks of a network are normalized, scaled and
initialized. Every model takes one. A new method is made from a known one:

    method = dataclasses.replace(methods.get("skipinit"), name="mine", alpha=0.1)

and `methods.register(method)` lets programs and studies find it by its name.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import jax
import numpy as np
from flax import linen as nn

from skipinit_jax.errors import UsageError, unknown_name
from skipinit_jax.fields import check_types
from skipinit_jax.files import as_type, check_name, check_title
from skipinit_jax.layers import (
  Conv,
  GhostBatchNorm,
  LayerScale,
  SkipInit,
  VarianceScaling,
  WeightStandardizedConv,
  WeightStandardizedDense,
  fixup,
  he_normal,
  he_normal_fan_out,
  identity,
  scaled_relu,
)

__all__ = [
  "NAMES",
  "ActivatedBlockFields",
  "Activation",
  "BlockFields",
  "Method",
  "ModuleFactory",
  "batch_normalizer",
  "get",
  "inverse_sqrt_depth",
  "layer_scale_by_depth",
  "linear",
  "register",
  "with_ghost_batches",
]

Activation = Callable[[jax.Array], jax.Array]
"""A function of features that keeps their shape."""

ModuleFactory = Callable[..., Any]
"""Returns a Flax module, such as a module class or a `functools.partial` of one."""

Initializer = jax.nn.initializers.Initializer
DType = jax.typing.DTypeLike


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


batch_normalizer: functools.partial[GhostBatchNorm] = functools.partial(
  GhostBatchNorm, momentum=0.9, epsilon=1e-5
)
"""Batch normalization over the global batch, as the methods here use it."""


class BlockFields(TypedDict):
  """The fields of `models.ResidualBlock` that a method decides."""

  normalizer: ModuleFactory | None
  last_normalizer: ModuleFactory | None
  branch_scale: ModuleFactory | None
  sum_scale: float
  use_bias: bool
  dtype: DType
  param_dtype: DType


class ActivatedBlockFields(BlockFields):
  """The fields of `models.ActivatedBlock` that a method decides."""

  activation: Activation
  kernel_init: Initializer
  last_kernel_init: Initializer
  scalar_biases: bool


@dataclasses.dataclass(frozen=True)
class Method:
  """What keeps a residual network trainable: all that its networks need to know of it.

  Attributes:
    name: the name in tables and flags.
    title: a short title for figures and tables.
    normalizer: factory of the module before each activation (after each
      convolution in version-1 networks); None: no normalization. It is given
      `use_running_average`, `dtype` and `param_dtype`, each if it accepts it and a
      `functools.partial` does not set it already.
    output_normalizer: likewise, of one module before the classifier; None: `normalizer`
      where the network has not normalized its output yet.
    zero_last_scale: whether the last normalizer of each branch has a scale that starts
      at zero, so that the branch does too (Goyal et al., 2017). It is the one behind
      the last layer, which blocks of version 1 have in any case. Before an activation
      it would not learn: ReLU has no gradient at zero.
    alpha: the initial value of the scale at the end of each branch, or a function of
      the number of residual blocks; None: no scale.
    learnable_alpha: whether alpha is a parameter.
    branch_factor: a constant factor on each branch, beside alpha.
    branch_scale: factory of the module at the end of each branch that multiplies it by
      alpha at initialization: `SkipInit`, one scalar. It is given `initial_value`, and
      `learnable` and `param_dtype`, each if it accepts it; and `factor`, if
      `branch_factor` is not one. In its place, a module of one's own may learn another
      scale; call its parameter `alpha` or `scale`.
    sum_scale: a constant factor on the sum of shortcut and branch.
    divide_by_expected_std: whether each branch takes its input divided by the
      standard deviation that is expected there: see `expected_variances`.
    conv: factory of convolutions, with the fields of `flax.linen.Conv`.
    dense: factory of dense layers but the classifier, with those of `flax.linen.Dense`.
    activation: the activation function.
    kernel_init: initializer of the stem and of projections.
    branch_init: maps the network's residual blocks and the layers of a branch, at least
      2, to the initializer of the branch's layers; None: `kernel_init`.
    last_init: initializer of the branch's last layer; None: as the layers before it.
    classifier_init: initializer of the classifier; None: the network's own.
    scalar_biases: whether Fixup's scalar biases stand before each convolution and
      each activation and at the end of each branch.
    use_bias: whether convolutions (but the stem) and dense layers have biases.
    stem_bias: whether the stem has one.
    dropout_rate: share of the features dropped before the classifier.
    drop_path: the probability with which training leaves out the last block's branch,
      example by example; it grows linearly with depth (stochastic depth, Huang et al.,
      ECCV 2016).
    resnet_version: the version of ResNet that its authors define it for, which a ResNet
      then has unless told otherwise; None: any, and by default 2.
    kernel_rate_factor: factor on the learning rate of kernels: see
      `training.parameter_roles`.
    scale_rate_factor: likewise of scales, such as alpha.
    bias_rate_factor: likewise of biases.
  """

  name: str
  title: str
  normalizer: ModuleFactory | None = None
  output_normalizer: ModuleFactory | None = None
  zero_last_scale: bool = False
  alpha: float | Callable[[int], float] | None = None
  learnable_alpha: bool = True
  branch_factor: float = 1.0
  branch_scale: ModuleFactory = SkipInit
  sum_scale: float = 1.0
  divide_by_expected_std: bool = False
  conv: ModuleFactory = Conv
  dense: ModuleFactory = nn.Dense
  activation: Activation = nn.relu
  kernel_init: Initializer = he_normal
  branch_init: Callable[[int, int], Initializer] | None = None
  last_init: Initializer | None = None
  classifier_init: Initializer | None = None
  scalar_biases: bool = False
  use_bias: bool = False
  stem_bias: bool = False
  dropout_rate: float = 0.0
  drop_path: float = 0.0
  resnet_version: int | None = None
  kernel_rate_factor: float = 1.0
  scale_rate_factor: float = 1.0
  bias_rate_factor: float = 1.0

  def __post_init__(self) -> None:
    check_types(self)
    for name in ("normalizer", "output_normalizer", "branch_scale"):
      check_factory(name, getattr(self, name))
    for name in ("dropout_rate", "drop_path"):
      if not 0 <= getattr(self, name) < 1:
        raise UsageError(f"{name} is {getattr(self, name)}: it must be in [0, 1).")
    for name in ("sum_scale", "branch_factor"):
      _check_number(name, getattr(self, name))
    if self.zero_last_scale and self.normalizer is None:
      raise UsageError(
        f"zero_last_scale is True, but method {self.name!r} has no normalizer."
      )
    if self.alpha is not None and not callable(self.alpha):
      _check_number("alpha", self.alpha)
    for role, factor in self.rate_factors.items():
      _check_number(f"{role}_rate_factor", factor)
      if factor < 0:
        raise UsageError(f"{role}_rate_factor is {factor}: it must not be negative.")

  @property
  def has_batch_norm(self) -> bool:
    """Whether it normalizes by `batch_normalizer`, in blocks or at the output."""
    return batch_normalizer in (self.normalizer, self.output_normalizer)

  @property
  def rate_factors(self) -> dict[str, float]:
    """The factors on the learning rate by the roles of parameters."""
    return {
      "kernel": self.kernel_rate_factor,
      "scale": self.scale_rate_factor,
      "bias": self.bias_rate_factor,
    }

  def initial_alpha(self, num_blocks: int) -> float | None:
    """Returns alpha at initialization in a network of `num_blocks` blocks."""
    if not callable(self.alpha):
      return self.alpha
    alpha = self.alpha(num_blocks)
    _check_number(f"alpha of {num_blocks} blocks", alpha)
    return alpha

  def initial_factor(self, num_blocks: int) -> float:
    """Returns the factor on each branch at initialization."""
    if self.zero_last_scale:
      return 0.0
    alpha = self.initial_alpha(num_blocks)
    return self.branch_factor * (1.0 if alpha is None else alpha)

  def block_fields(
    self, *, num_blocks: int, train: bool, dtype: DType, param_dtype: DType
  ) -> BlockFields:
    """Returns what every residual block is given.

    Args:
      num_blocks: residual blocks of the whole network.
      train: whether normalizers use the statistics of the batch.

    Raises:
      UsageError: alpha is to be constant or to have a factor, and `branch_scale` has no
        field for it; or a scale is to start at zero, and `normalizer` has none.
    """
    normalizer = bind_normalizer(
      self.normalizer, train=train, dtype=dtype, param_dtype=param_dtype
    )
    return {
      "normalizer": normalizer,
      "last_normalizer": self._bind_last_normalizer(normalizer),
      "branch_scale": self._bind_branch_scale(num_blocks, param_dtype),
      "sum_scale": self.sum_scale,
      "use_bias": self.use_bias,
      "dtype": dtype,
      "param_dtype": param_dtype,
    }

  def activated_block_fields(
    self,
    *,
    num_blocks: int,
    branch_layers: int,
    train: bool,
    dtype: DType,
    param_dtype: DType,
  ) -> ActivatedBlockFields:
    """Returns what a residual block of convolutions or dense layers is given.

    Args:
      num_blocks: residual blocks of the whole network.
      branch_layers: layers of one residual branch.
      train: whether normalizers use the statistics of the batch.

    Raises:
      UsageError: as `block_fields`.
    """
    kernel_init = self.kernel_init
    if self.branch_init is not None and branch_layers > 1:
      kernel_init = self.branch_init(num_blocks, branch_layers)
    return {
      **self.block_fields(
        num_blocks=num_blocks, train=train, dtype=dtype, param_dtype=param_dtype
      ),
      "activation": self.activation,
      "kernel_init": kernel_init,
      "last_kernel_init": self.last_init or kernel_init,
      "scalar_biases": self.scalar_biases,
    }

  def _bind_last_normalizer(
    self, normalizer: ModuleFactory | None
  ) -> ModuleFactory | None:
    if normalizer is None or not self.zero_last_scale:
      return None
    factory = bind(normalizer, {"scale_init": nn.initializers.zeros})
    if "scale_init" not in factory.keywords:
      raise UsageError(
        f"zero_last_scale is True, but the normalizer of method {self.name!r} has no "
        "field `scale_init`: give it one."
      )
    return factory

  def _bind_branch_scale(
    self, num_blocks: int, param_dtype: DType
  ) -> ModuleFactory | None:
    alpha = self.initial_alpha(num_blocks)
    factor = {} if self.branch_factor == 1 else {"factor": self.branch_factor}
    if alpha is None:
      if not factor:
        return None
      return functools.partial(SkipInit, self.branch_factor, learnable=False)
    factory = bind(
      functools.partial(self.branch_scale, initial_value=alpha),
      {"learnable": self.learnable_alpha, "param_dtype": param_dtype, **factor},
    )
    for given, field in (
      ("learnable_alpha is False", "" if self.learnable_alpha else "learnable"),
      (f"branch_factor is {self.branch_factor}", "factor" if factor else ""),
    ):
      if field and field not in factory.keywords:
        raise UsageError(
          f"{given}, but the branch_scale of method {self.name!r} has no field "
          f"`{field}`: give it one."
        )
    return factory

  def require_default(self, *fields: str, network: str) -> None:
    """Raises a UsageError for a method with fields that a network does not use.

    Args:
      fields: names of the fields that must have their default values.
      network: the network, in words.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(self)}
    for name in fields:
      if getattr(self, name) != defaults[name]:
        raise UsageError(
          f"Method {self.name!r} is not defined for {network}, which has no place for "
          f"its {name}: choose another method or network."
        )

  def expected_stds(self, stage_blocks: Sequence[int]) -> list[np.ndarray] | list[None]:
    """Returns what the blocks' inputs are divided by, in one array for each stage.

    Args:
      stage_blocks: the blocks of each stage. The first block of a stage is a
        transition; in the network's first block that makes no difference.

    Returns:
      The expected standard deviations of each stage, [blocks]; None for each stage if
      the method divides by none.
    """
    if not self.divide_by_expected_std:
      return [None] * len(stage_blocks)
    transitions = [block == 0 for blocks in stage_blocks for block in range(blocks)]
    stds = np.sqrt(self.expected_variances(transitions))
    return np.split(stds, np.cumsum(stage_blocks)[:-1])

  def expected_variances(self, transitions: Sequence[bool]) -> tuple[float, ...]:
    """Returns beta^2, the variance that theory expects at each block's input.

    Brock, De & Smith (ICLR 2021), section 3: in x' = x + alpha f(x / beta), the branch
    f keeps the variance one of its input, so each block adds alpha^2. In a transition
    the shortcut takes x / beta too, which resets the variance to 1 + alpha^2. Here
    alpha is what is constant: a learnable scalar beside it counts as one, whatever it
    starts at.

    Args:
      transitions: of each block of the network, whether its shortcut projects.
    """
    alpha = None if self.learnable_alpha else self.initial_alpha(len(transitions))
    growth = (self.branch_factor * (1.0 if alpha is None else alpha)) ** 2
    variances = [1.0]
    for transition in transitions:
      skip = 1.0 if transition else variances[-1]
      variances.append(self.sum_scale**2 * (skip + growth))
    return tuple(variances[:-1])


def _check_number(name: str, value: Any) -> None:
  # An array of JAX cannot be hashed, as the fields of a module have to be.
  try:
    finite = math.isfinite(as_type(float, value))
  except ValueError:
    finite = False
  if not finite:
    raise UsageError(f"{name} is {value!r}: it must be a finite number, and no array.")


def check_factory(name: str, value: Any) -> None:
  """Raises a UsageError for what is no factory of modules, or None."""
  if isinstance(value, nn.Module):
    kind = type(value).__name__
    raise UsageError(
      f"{name} is a {kind} that is made already: give its class, {kind}, or for other "
      f"fields functools.partial({kind}, ...)."
    )
  if value is not None and not callable(value):
    constant = f"functools.partial(layers.SkipInit, {value!r})"
    example = constant if name == "branch_scale" else "flax.linen.LayerNorm"
    raise UsageError(
      f"{name} is {value!r}: it must be a class or function that makes a module, such "
      f"as {example}."
    )


def require_linen(name: str, value: Any) -> None:
  """Raises a UsageError for a factory that a block of Flax Linen cannot use."""
  check_factory(name, value)
  kind = getattr(value, "func", value)
  if not isinstance(kind, type):
    kind = type(kind)
  # flax.nnx itself need not be loaded.
  if any(base.__module__.startswith("flax.nnx") for base in kind.__mro__):
    ours = kind.__module__.startswith("skipinit_jax.")
    twin = f"{'skipinit_jax.layers' if ours else 'flax.linen'}.{kind.__name__}"
    raise UsageError(
      f"{name} is nnx.{kind.__name__}, of Flax NNX, and the block is of Flax Linen: "
      f"give {twin if ours or hasattr(nn, kind.__name__) else 'a Linen module'}."
    )


def bind_normalizer(
  factory: ModuleFactory | None, *, train: bool, dtype: DType, param_dtype: DType
) -> ModuleFactory | None:
  """Binds what a factory of normalizers accepts of the arguments.

  Args:
    factory: see `Method.normalizer`; None returns None.
    train: whether to use the statistics of the batch.
  """
  if factory is None:
    return None
  # LayerNorm and GroupNorm have no running average, a user's own may have no dtype.
  return bind(
    factory,
    {"use_running_average": not train, "dtype": dtype, "param_dtype": param_dtype},
  )


def bind(
  factory: ModuleFactory, available: Mapping[str, Any]
) -> functools.partial[Any]:
  """Binds what a factory accepts and a `functools.partial` does not set already."""
  parameters = _parameters(factory)
  accepts_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
  bound = getattr(factory, "keywords", {})
  keywords = {
    name: value
    for name, value in available.items()
    if (name in parameters or accepts_any) and name not in bound
  }
  return functools.partial(factory, **keywords)


def _parameters(factory: ModuleFactory) -> Mapping[str, inspect.Parameter]:
  function: Any = factory
  args: tuple[Any, ...] = ()
  if isinstance(factory, functools.partial):
    function, args = factory.func, factory.args
  if isinstance(function, type):
    # The signature of a class of NNX is that of its metaclass.
    function, args = inspect.getattr_static(function, "__init__"), (None, *args)
  return inspect.signature(functools.partial(function, *args)).parameters


# 0.2 is the paper's rate on ImageNet; another experiment of it uses 0.6.
_DROPOUT_RATE = 0.2

_skipinit = Method("skipinit", "SkipInit, α = 0", alpha=0.0)
_fixup = Method(
  "fixup",
  "Fixup",
  alpha=1.0,
  kernel_init=he_normal_fan_out,
  branch_init=fixup,
  last_init=nn.initializers.zeros,
  classifier_init=nn.initializers.zeros,
  scalar_biases=True,
  resnet_version=1,
  # As in its authors' code.
  scale_rate_factor=0.1,
  bias_rate_factor=0.1,
)
_batch_norm = Method("batch_norm", "Batch norm", normalizer=batch_normalizer)

_METHODS: dict[str, Method] = {
  method.name: method
  for method in (
    _batch_norm,
    # Flax's example, torchvision and timm begin so by default or by a flag.
    dataclasses.replace(
      _batch_norm,
      name="batch_norm_zero_scale",
      title="Batch norm, scale 0",
      zero_last_scale=True,
    ),
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
    Method(
      "output_batch_norm",
      "Batch norm at the output only",
      output_normalizer=batch_normalizer,
    ),
    Method(
      "layer_norm",
      "Layer norm",
      normalizer=functools.partial(nn.LayerNorm, use_fast_variance=False),
    ),
    # All as in the authors' networks but the activation's gain, which theory gives.
    # Without alpha it is timm's. They also clip gradients (Brock et al., ICML 2021),
    # which is a choice of training: adaptive_clip, 0.01 in their paper.
    Method(
      "nf_resnet",
      "NF-ResNet",
      alpha=0.0,
      branch_factor=0.2,
      divide_by_expected_std=True,
      conv=WeightStandardizedConv,
      dense=WeightStandardizedDense,
      activation=scaled_relu,
      kernel_init=VarianceScaling(1.0),
      classifier_init=nn.initializers.normal(0.01),
      use_bias=True,
      stem_bias=True,
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


def get(name: str | Method) -> Method:
  """Returns the method of a name; a method is returned as it is.

  Raises:
    UsageError: no method has this name; the message lists those that exist.
  """
  if isinstance(name, Method):
    return name
  if not isinstance(name, str) or name not in _METHODS:
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
    UsageError: another method has its name or its title, a folder or a figure cannot
      have them, or a field is of another type.
  """
  global NAMES
  check_name("method", method.name)
  check_title("title of a method", method.title)
  for part in dataclasses.fields(method):
    value = getattr(method, part.name)
    is_number = part.name in ("alpha", "resnet_version")
    is_function = not is_number and (part.default is None or callable(part.default))
    if is_function and not callable(value) and value is not part.default:
      raise UsageError(
        f"{part.name} of method {method.name!r} is {value!r}: it must be a function."
      )
  method.initial_alpha(64)
  for known in _METHODS.values():
    for field in ("name", "title"):
      if getattr(known, field) == getattr(method, field):
        raise UsageError(
          f"{field} is {getattr(method, field)!r}, which is that of another method: "
          "results could not tell them apart."
        )
  _METHODS[method.name] = method
  NAMES = tuple(_METHODS)


def with_ghost_batches(method: Method | str, ghost_batch_size: int) -> Method:
  """Returns a batch-normalized method that normalizes over ghost batches.

  Args:
    method: a method that normalizes by `batch_normalizer`, or its name.
    ghost_batch_size: examples of a ghost batch; see `layers.GhostBatchNorm`.

  Raises:
    UsageError: the method has another normalizer or none.
  """
  method = get(method)
  if not method.has_batch_norm:
    raise UsageError(
      f"ghost_batch_size is {ghost_batch_size}, but method {method.name!r} has no "
      "batch normalization."
    )
  ghost = functools.partial(batch_normalizer, ghost_batch_size=ghost_batch_size)
  changes: dict[str, Any] = {
    name: ghost
    for name in ("normalizer", "output_normalizer")
    if getattr(method, name) is batch_normalizer
  }
  return dataclasses.replace(method, **changes)


def linear(method: Method | str) -> Method:
  """Returns a method of linear networks: without activation.

  Weights have variance 1 / fan-in, which then keeps a layer's second moment; last
  layers that start at zero still do.
  """
  return dataclasses.replace(
    get(method), activation=identity, kernel_init=VarianceScaling(1.0), branch_init=None
  )
