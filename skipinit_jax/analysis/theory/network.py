"""Residual networks as theory sees them: blocks made of operations on kernels."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Collection, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from skipinit_jax.analysis.signal import block_names
from skipinit_jax.analysis.theory.kernel import (
  BatchNorm,
  ExampleNorm,
  Layer,
  Operation,
  ReLU,
)
from skipinit_jax.errors import UsageError, unknown_name
from skipinit_jax.layers import RELU_GAIN, GhostBatchNorm
from skipinit_jax.methods import Method
from skipinit_jax.models import (
  AttentionBlock,
  DepthStack,
  PostActivationBottleneckBlock,
  ResidualBlock,
  ResidualMLP,
  ResNet,
  WideResNet,
)

Activation = Literal["relu", "linear"]


@dataclasses.dataclass(frozen=True)
class Block:
  """A residual block: a (shortcut(t) + alpha branch(t)), with t = trunk(x).

  Attributes:
    branch: the branch's operations, in order.
    alpha: factor on the branch.
    sum_scale: a, factor on the sum.
    trunk: what shortcut and branch share: in a transition, the normalization and the
      activation of the input.
    shortcut: a transition's projection; nothing is the identity.
    name: the name in the signal.
  """

  branch: tuple[Operation, ...]
  alpha: float = 1.0
  sum_scale: float = 1.0
  trunk: tuple[Operation, ...] = ()
  shortcut: tuple[Operation, ...] = ()
  name: str = ""


@dataclasses.dataclass(frozen=True)
class Network:
  """Residual blocks, after a linear stem.

  Attributes:
    blocks: in order.
    stem: the layer before the first block; None: the signal starts at the first block.
    grid: height and width of what the stem, or else the first block, takes.
  """

  blocks: tuple[Block, ...]
  stem: Layer | None = None
  grid: tuple[int, int] = (1, 1)


def normalization(method: Method) -> BatchNorm | ExampleNorm | None:
  """Returns the normalization of a method's residual blocks.

  Raises:
    UsageError: the theory does not know the method's normalizer.
  """
  factory = method.normalizer
  if factory is None or method.output_normalizer_only:
    return None
  module: Any = factory
  keywords: dict[str, Any] = {}
  if isinstance(factory, functools.partial):
    module, keywords = factory.func, factory.keywords
  if module is nn.BatchNorm or module is GhostBatchNorm:
    epsilon = keywords.get("epsilon", module.epsilon)
    return BatchNorm(epsilon=epsilon, batch_size=keywords.get("ghost_batch_size"))
  if module in (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm):
    return ExampleNorm(keywords.get("epsilon", module.epsilon))
  raise UsageError(
    f"The theory does not know the normalizer {module!r} of method {method.name!r}: it "
    "knows BatchNorm, GhostBatchNorm, LayerNorm, RMSNorm and GroupNorm."
  )


def block(
  method: Method,
  num_blocks: int,
  layers: Sequence[Layer],
  *,
  projection: Layer | None = None,
  activation: Activation = "relu",
  expected_variance: float = 1.0,
  name: str = "",
) -> Block:
  """Returns a pre-activation block, wired as those of `models.blocks`.

  Before each of the branch's layers stand normalization and activation. Where there
  is a projection, it takes the activated input, as the branch's first layer does.

  Args:
    method: the method; it sets normalization, alpha, the factor on the sum and, for
      Fixup and weight standardization, the variance of the weights. Scalar and other
      biases start at zero, and dropout and `output_normalizer_only` act behind the last
      block: neither changes the blocks.
    num_blocks: blocks of the whole network, for the methods that depend on it.
    layers: the branch's layers, with the variance that He initialization (or the
      network's own) gives them.
    projection: the shortcut's layer; None: the shortcut is the identity.
    activation: "relu" or "linear".
    expected_variance: what the method expects of the block's input, if it divides by
      its square root: see `Method.expected_variances`.
    name: the block's name.
  """
  if activation not in ("relu", "linear"):
    raise unknown_name("activation", activation, ("relu", "linear"))
  norm = normalization(method)
  activate: tuple[Operation, ...] = () if norm is None else (norm,)
  if activation == "relu" and isinstance(norm, BatchNorm):
    activate = (dataclasses.replace(norm, relu=True),)
  elif activation == "relu":
    activate = (*activate, ReLU())
  if method.initialization == "fixup":
    layers = _fixup(layers, num_blocks)
    if projection is not None:
      projection = _by_fan_out(projection, 2.0)
  if method.weight_standardization:
    layers = [_standardized(layer, activation) for layer in layers]
    if projection is not None:
      projection = _standardized(projection, activation)
  if method.divide_by_expected_std:
    # The activation is homogeneous: what stands before it may stand behind it.
    layers = [_divided(layers[0], expected_variance), *layers[1:]]
    if projection is not None:
      projection = _divided(projection, expected_variance)
  operations = list(itertools.chain.from_iterable((*activate, y) for y in layers))
  alpha = method.initial_alpha(num_blocks)
  return Block(
    branch=tuple(operations if projection is None else operations[len(activate) :]),
    alpha=1.0 if alpha is None else alpha,
    sum_scale=method.sum_scale,
    trunk=() if projection is None else activate,
    shortcut=() if projection is None else (projection,),
    name=name,
  )


def _standardized(layer: Layer, activation: Activation) -> Layer:
  """The layer with scaled weight standardization and the gain of its input."""
  if activation == "linear":
    return dataclasses.replace(layer, weight_variance=1.0)
  return dataclasses.replace(
    layer, weight_variance=RELU_GAIN**2, unseen_share=1 / math.pi
  )


def _divided(layer: Layer, variance: float) -> Layer:
  return dataclasses.replace(layer, weight_variance=layer.weight_variance / variance)


def _by_fan_out(layer: Layer, variance: float) -> Layer:
  return dataclasses.replace(layer, weight_variance=variance / layer.widening)


def _fixup(layers: Sequence[Layer], num_blocks: int) -> list[Layer]:
  """Fixup's variances: `layers.fixup` before the last layer, which is zero."""
  *first, last = layers
  return [
    _by_fan_out(layer, 2.0 * num_blocks ** (-1 / len(first))) for layer in first
  ] + [dataclasses.replace(last, weight_variance=0.0)]


def uniform(
  method: Method,
  num_blocks: int,
  *,
  layers_per_block: int = 1,
  activation: Activation = "relu",
  transitions: Collection[int] = (),
) -> Network:
  """Returns a network of equal blocks, without positions and without a stem.

  It is a fully connected network of constant width, or a convolutional one whose
  borders are neglected. Weights have variance 2 / fan-in behind ReLU (He et al., ICCV
  2015) and 1 / fan-in in a linear network: both keep a layer's second moment.

  Args:
    method: the method.
    num_blocks: d, the number of blocks.
    layers_per_block: layers of one branch.
    activation: "relu" or "linear".
    transitions: which blocks, counted from 1, have a projection of the activated input
      as their shortcut.

  Raises:
    UsageError: a number is below 1, or a transition is not a block.
  """
  for number, value in (
    ("num_blocks", num_blocks),
    ("layers_per_block", layers_per_block),
  ):
    if value < 1:
      raise UsageError(f"{number} is {value}: it must be at least 1.")
  for transition in transitions:
    if not 1 <= transition <= num_blocks:
      raise UsageError(
        f"transitions holds {transition}, but the blocks are 1 to {num_blocks}."
      )
  layer = Layer(2.0 if activation == "relu" else 1.0)
  projects = [index in transitions for index in range(1, num_blocks + 1)]
  variances = method.expected_variances(projects)
  return Network(
    tuple(
      block(
        method,
        num_blocks,
        [layer] * layers_per_block,
        projection=layer if projects[index] else None,
        activation=activation,
        expected_variance=variances[index],
        name=str(index + 1),
      )
      for index in range(num_blocks)
    )
  )


def describe(
  model: ResidualMLP | WideResNet | ResNet, input_shape: Sequence[int]
) -> Network:
  """Returns the network that a model of this package is.

  The model is traced, not run. A stem that is one linear layer becomes the network's;
  a ResNet's max pool has no closed form, so its network starts behind it.

  Args:
    model: a model of pre-activation blocks.
    input_shape: shape of the model's inputs, [N, ...].

  Raises:
    UsageError: the model is a ResNet of version 1. The sum of its block is neither
      centered nor Gaussian in front of its activation, and has no recursion in second
      moments alone.
  """
  layers: dict[tuple[str, ...], Layer] = {}
  grids: dict[tuple[str, ...], tuple[int, int]] = {}
  repeats: dict[tuple[str, ...], int] = {}

  def record(
    run: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
  ) -> Any:
    module, path = context.module, context.module.path
    if context.method_name == "__call__":
      if isinstance(module, PostActivationBottleneckBlock):
        raise UsageError(
          "The theory covers pre-activation blocks: a ResNet of version 1 applies its "
          "activation behind the sum."
        )
      if isinstance(module, AttentionBlock):
        raise UsageError(
          "The theory covers convolutions and dense layers: a VisionTransformer also "
          "has attention."
        )
      if isinstance(module, DepthStack) and module.scan:
        repeats[path] = module.num_blocks
      elif isinstance(module, ResidualBlock):
        grids[path] = _grid(args[0].shape)
      elif isinstance(module, nn.Conv | nn.Dense):
        layers[path] = _layer(module, args[0].shape[-1])
        grids[path] = _grid(args[0].shape)
    return run(*args, **kwargs)

  with nn.intercept_methods(record):
    inputs = jax.ShapeDtypeStruct(tuple(input_shape), jnp.float32)
    jax.eval_shape(functools.partial(model.init, train=True), jax.random.key(0), inputs)
  inside: dict[tuple[str, ...], list[tuple[str, Layer]]] = {
    path: [] for path in grids if path not in layers
  }
  for path, layer in layers.items():
    if path[:-1] in inside:
      inside[path[:-1]].append((path[-1], layer))
  found: list[tuple[str, list[Layer], Layer | None]] = []
  for path, named in inside.items():
    branch = [layer for name, layer in named if name != "projection"]
    projections = [layer for name, layer in named if name == "projection"]
    projection = projections[0] if projections else None
    for name in block_names(path, repeats.get(path[:-1])):
      found.append((name, branch, projection))
  variances = model.method.expected_variances(
    [projection is not None for _, _, projection in found]
  )
  blocks = [
    block(
      model.method,
      len(found),
      branch,
      projection=projection,
      expected_variance=variance,
      name=name,
    )
    for (name, branch, projection), variance in zip(found, variances, strict=True)
  ]
  first_layer, first_block = next(iter(layers)), next(iter(inside))
  stem = layers[first_layer]
  if stem.output_grid(grids[first_layer]) != grids[first_block]:
    return Network(tuple(blocks), None, grids[first_block])
  if model.method.initialization == "fixup":
    stem = _by_fan_out(stem, 2.0)
  if model.method.weight_standardization:
    stem = _standardized(stem, "linear")
  return Network(tuple(blocks), stem, grids[first_layer])


def _grid(shape: Sequence[int]) -> tuple[int, int]:
  return (shape[1], shape[2]) if len(shape) == 4 else (1, 1)


def _layer(module: nn.Conv | nn.Dense, channels: int) -> Layer:
  widening = module.features / channels
  if isinstance(module, nn.Dense):
    return Layer(widening=widening)
  # The models' windows are square.
  size, strides = module.kernel_size, module.strides
  return Layer(
    widening=widening,
    size=size if isinstance(size, int) else size[0],
    strides=strides if isinstance(strides, int) else strides[0] if strides else 1,
  )
