"""Residual networks as theory sees them: blocks made of operations on kernels."""

import dataclasses
import functools
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from skipinit_jax import methods, models
from skipinit_jax.analysis.signal import block_names
from skipinit_jax.analysis.theory import kernel
from skipinit_jax.errors import UsageError, require_positive
from skipinit_jax.layers import (
  RELU_GAIN,
  GhostBatchNorm,
  VarianceScaling,
  WeightStandardizedConv,
  WeightStandardizedDense,
  identity,
  scaled_relu,
)
from skipinit_jax.methods import Activation, Method

# The gain of each activation that is ReLU but for a factor.
_RELU_GAINS: dict[Activation | None, float] = {nn.relu: 1.0, scaled_relu: RELU_GAIN}


@dataclasses.dataclass(frozen=True)
class Block:
  """A residual block: a (shortcut(t) + alpha branch(t)), with t = trunk(x).

  Attributes:
    branch: the branch's operations, in order.
    alpha: factor on the branch.
    sum_scale: a, factor on the sum.
    trunk: what shortcut and branch share: in a transition, the normalization and the
      activation of the input.
    shortcut: a transition's projection; empty: the identity.
    name: its name in the signal.
  """

  branch: tuple[kernel.Operation, ...]
  alpha: float = 1.0
  sum_scale: float = 1.0
  trunk: tuple[kernel.Operation, ...] = ()
  shortcut: tuple[kernel.Operation, ...] = ()
  name: str = ""


@dataclasses.dataclass(frozen=True)
class Network:
  """Residual blocks, after a linear stem.

  Attributes:
    blocks: the blocks, first to last.
    stem: the layer before the first block; None: the signal starts at the first block.
    grid: height and width of the stem's input, or without a stem the first block's.
  """

  blocks: tuple[Block, ...]
  stem: kernel.Layer | None = None
  grid: tuple[int, int] = (1, 1)


def _layer(
  module: nn.Conv | nn.Dense, channels: int, activation: Activation | None
) -> kernel.Layer:
  """Returns the layer that a module is at initialization.

  Args:
    activation: what precedes it, whose gain counts to the weights; None: nothing does.
  """
  rectified = activation in _RELU_GAINS
  if not rectified and activation not in (None, identity):
    raise UsageError(
      f"The theory does not know the activation {activation!r}: it knows ReLU, "
      "layers.scaled_relu and layers.identity."
    )
  widening, init = module.features / channels, module.kernel_init
  standardized = isinstance(module, WeightStandardizedConv | WeightStandardizedDense)
  if standardized:
    variance = 1.0
  elif isinstance(init, VarianceScaling):
    variance = init.scale / (1.0 if init.fan == "fan_in" else widening)
  elif init is nn.initializers.zeros:
    variance = 0.0
  else:
    raise UsageError(
      f"The theory does not know the initializer {init!r}: it knows "
      "layers.VarianceScaling and zeros."
    )
  layer = kernel.Layer(
    weight_variance=variance * (_RELU_GAINS[activation] ** 2 if rectified else 1.0),
    widening=widening,
    standardized=standardized,
    mean_share=1 / math.pi if standardized and rectified else 0.0,
  )
  if not isinstance(module, nn.Conv):
    return layer
  # The models' windows are square.
  size, strides = module.kernel_size, module.strides
  return dataclasses.replace(
    layer,
    size=size if isinstance(size, int) else size[0],
    strides=strides if isinstance(strides, int) else strides[0] if strides else 1,
    symmetric=module.padding != "SAME",
  )


def _activate(method: Method, *, activates: bool) -> tuple[kernel.Operation, ...]:
  """Returns the normalization, and the activation if any, before or behind a layer."""
  relu = (kernel.ReLU(),) if activates else ()
  if method.normalizer is None:
    return relu
  module = getattr(method.normalizer, "func", method.normalizer)
  keywords = getattr(method.normalizer, "keywords", {})
  if module in (nn.BatchNorm, GhostBatchNorm):
    epsilon = keywords.get("epsilon", module.epsilon)
    return (kernel.BatchNorm(activates, epsilon, keywords.get("ghost_batch_size")),)
  if module in (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm):
    return (kernel.ExampleNorm(keywords.get("epsilon", module.epsilon)), *relu)
  raise UsageError(
    f"The theory does not know the normalizer {module!r} of method {method.name!r}: it "
    "knows BatchNorm, GhostBatchNorm, LayerNorm, RMSNorm and GroupNorm."
  )


class _Layers(NamedTuple):
  """A block's name, its branch's layers, and the layer of its shortcut if any."""

  name: str
  branch: Sequence[kernel.Layer]
  projection: kernel.Layer | None


def _blocks(method: Method, all_layers: Sequence[_Layers]) -> tuple[Block, ...]:
  """Returns a network's blocks: pre-activation, wired as those of `models.blocks`.

  Before each of the branch's layers stand normalization and activation, and behind the
  last one the normalizer whose scale starts at zero, if there is one. Where there is a
  projection, it takes the activated input, as the branch's first layer does. Scalar
  and other biases start at zero, and dropout and a normalizer of the output act behind
  the last block: neither changes the blocks.
  """
  activate = _activate(method, activates=method.activation in _RELU_GAINS)
  last = _activate(method, activates=False) if method.zero_last_scale else ()
  variances: Sequence[float] = [1.0] * len(all_layers)
  if method.divide_by_expected_std:
    variances = method.expected_variances(
      [each.projection is not None for each in all_layers]
    )
  blocks = []
  for (name, layers, projection), variance in zip(all_layers, variances, strict=True):
    first, *others = layers
    branch: list[kernel.Operation] = [_divided(first, variance)]
    for layer in others:
      branch += [*activate, layer]
    shared = projection is not None
    blocks.append(
      Block(
        branch=(*branch, *last) if shared else (*activate, *branch, *last),
        alpha=method.initial_factor(len(all_layers)),
        sum_scale=method.sum_scale,
        trunk=activate if shared else (),
        shortcut=() if projection is None else (_divided(projection, variance),),
        name=name,
      )
    )
  return tuple(blocks)


def _divided(layer: kernel.Layer, variance: float) -> kernel.Layer:
  # The activation is homogeneous: a division before it may stand behind it.
  return dataclasses.replace(layer, weight_variance=layer.weight_variance / variance)


def uniform(
  method: Method | str,
  num_blocks: int,
  *,
  layers_per_block: int = 1,
  transitions: Collection[int] = (),
) -> Network:
  """Returns a network of equal blocks, without positions and without a stem.

  It is a fully connected network of constant width, or a convolutional one whose
  borders are neglected.

  Args:
    method: a method or its name; see `methods.linear` for networks without activation.
    transitions: the blocks, counted from 1, whose shortcut is a projection of the
      activated input.

  Raises:
    UsageError: a number is below 1, or a transition is not a block.
  """
  require_positive(num_blocks=num_blocks, layers_per_block=layers_per_block)
  for transition in transitions:
    if not 1 <= transition <= num_blocks:
      raise UsageError(
        f"transitions holds {transition}, but the blocks are 1 to {num_blocks}."
      )
  method = methods.get(method)
  fields = method.activated_block_fields(
    num_blocks=num_blocks,
    branch_layers=layers_per_block,
    train=True,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
  )
  inits = [fields["kernel_init"]] * (layers_per_block - 1) + [
    fields["last_kernel_init"]
  ]
  *layers, projection = (
    _layer(method.dense(1, kernel_init=init), 1, method.activation)
    for init in (*inits, method.kernel_init)
  )
  return Network(
    _blocks(
      method,
      [
        _Layers(str(block), layers, projection if block in transitions else None)
        for block in range(1, num_blocks + 1)
      ],
    )
  )


def describe(
  model: models.ResidualMLP | models.WideResNet | models.ResNet,
  input_shape: Sequence[int],
) -> Network:
  """Returns the network that a model of this package is.

  The model is traced, not run. A stem that is one linear layer becomes the network's;
  a ResNet's max pool has no closed form, so its network starts behind it.

  Args:
    input_shape: shape of the model's inputs, [N, ...].

  Raises:
    UsageError: the model is a ResNet whose projections take means of pixels, or one of
      version 1. The sum of the latter's block is neither centered nor Gaussian in front
      of its activation, and has no recursion in second moments alone.
  """
  modules: dict[tuple[str, ...], tuple[nn.Conv | nn.Dense, int]] = {}
  activations: dict[tuple[str, ...], Activation] = {}
  grids: dict[tuple[str, ...], tuple[int, int]] = {}
  repeats: dict[tuple[str, ...], int] = {}

  def record(
    run: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
  ) -> Any:
    module, path = context.module, context.module.path
    if context.method_name == "__call__":
      if isinstance(
        module,
        models.PostActivationBasicBlock | models.PostActivationBottleneckBlock,
      ):
        raise UsageError(
          "The theory covers pre-activation blocks: a ResNet of version 1 applies its "
          "activation behind the sum."
        )
      if getattr(module, "average_projection", False):
        raise UsageError(
          "The theory covers projections with strides: average_projection takes means "
          "of pixels instead."
        )
      if isinstance(module, models.AttentionBlock):
        raise UsageError(
          "The theory covers convolutions and dense layers: a VisionTransformer also "
          "has attention."
        )
      if isinstance(module, models.DepthStack) and module.scan:
        repeats[path] = module.num_blocks
      elif isinstance(module, models.ActivatedBlock):
        activations[path] = module.activation
        grids[path] = _grid(args[0].shape)
      elif isinstance(module, nn.Conv | nn.Dense):
        modules[path] = module, args[0].shape[-1]
        grids[path] = _grid(args[0].shape)
    return run(*args, **kwargs)

  with nn.intercept_methods(record):
    inputs = jax.ShapeDtypeStruct(tuple(input_shape), jnp.float32)
    jax.eval_shape(functools.partial(model.init, train=True), jax.random.key(0), inputs)
  found = []
  for block, activation in activations.items():
    layers = {
      path[-1]: _layer(*module, activation)
      for path, module in modules.items()
      if path[:-1] == block
    }
    projection = layers.pop("projection", None)
    for name in block_names(block, repeats.get(block[:-1])):
      found.append(_Layers(name, list(layers.values()), projection))
  blocks = _blocks(methods.get(model.method), found)
  first_layer, first_block = next(iter(modules)), next(iter(activations))
  stem = _layer(*modules[first_layer], None)
  if stem.output_grid(grids[first_layer]) != grids[first_block]:
    return Network(blocks, None, grids[first_block])
  return Network(blocks, stem, grids[first_layer])


def _grid(shape: Sequence[int]) -> tuple[int, int]:
  return (shape[1], shape[2]) if len(shape) == 4 else (1, 1)
