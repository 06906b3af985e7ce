"""Weights of residual networks from and to PyTorch's layout.

    model, variables = from_torchvision(safetensors.numpy.load_file(path))
    logits = model.apply(variables, images, train=False)

The layout is that of torchvision's `resnet50`, `resnet101` and `resnet152`: its
names, kernels OIHW and dense weights [outputs, inputs]. PyTorch is not needed.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from skipinit_jax import methods
from skipinit_jax.errors import UsageError
from skipinit_jax.models.depth import scan_variables, unroll_variables
from skipinit_jax.models.resnet import STAGE_BLOCKS, ResNet

__all__ = [
  "from_torchvision",
  "to_torchvision",
]

_Path = tuple[str, ...]
_Shape = tuple[int, ...]

# By our names: torchvision's, outside of blocks and inside.
_OUTSIDE = {"stem": "conv1", "stem_norm": "bn1", "head": "fc"}
_INSIDE = {
  "conv1": "conv1",
  "norm2": "bn1",
  "conv2": "conv2",
  "norm3": "bn2",
  "conv3": "conv3",
  "norm4": "bn3",
  "projection": "downsample.0",
  "projection_norm": "downsample.1",
}
_LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}
# Steps of training, which each normalizer of PyTorch counts and rarely uses.
_COUNTER = "num_batches_tracked"
# By the number of a kernel's axes: ours in the order of PyTorch's.
_AXES = {4: (3, 2, 0, 1), 2: (1, 0)}


def from_torchvision(state_dict: Mapping[str, Any]) -> tuple[ResNet, dict[str, Any]]:
  """Returns the network that a PyTorch checkpoint is of, and its variables.

  Args:
    state_dict: arrays by torchvision's names: NumPy's, or PyTorch's on the CPU. Depth
      and number of classes are read from it.

  Returns:
    The model, of version 1 with batch normalization and symmetric padding, and
    variables for it as NumPy arrays of unchanged dtype. In evaluation it computes the
    logits of the PyTorch network; its images are NHWC. A model for another purpose is
    `model.clone(remat=True)` and the like.

  Raises:
    UsageError: the arrays are not those of a bottleneck ResNet: a name is missing or
      unknown, or a shape does not fit.
  """
  counts = tuple(
    len({key.split(".")[1] for key in state_dict if re.match(rf"layer{s}\.\d+\.", key)})
    for s in (1, 2, 3, 4)
  )
  depths = {blocks: depth for depth, blocks in STAGE_BLOCKS.items()}
  if counts not in depths:
    known = ", ".join(f"{blocks} (ResNet-{depth})" for blocks, depth in depths.items())
    raise UsageError(
      f"The PyTorch weights have {counts} blocks in layer1 to layer4: convertible are "
      f"{known}."
    )
  model = _network(depths[counts], max(1, _size(state_dict, "fc.bias", 0)))
  shapes = _shapes(model.depth, model.num_classes, _size(state_dict, "conv1.weight", 1))
  _require_fit(
    f"The PyTorch weights do not fit a ResNet-{model.depth}",
    {_name(path): _permuted(path, shape) for path, shape in shapes.items()},
    {
      name: np.shape(value)
      for name, value in state_dict.items()
      if name.rpartition(".")[2] != _COUNTER
    },
  )
  flat = {}
  for path, shape in shapes.items():
    array = np.asarray(state_dict[_name(path)])
    if path[-1] == "kernel":
      array = array.transpose(np.argsort(_AXES[len(shape)]))
    # A copy, because PyTorch changes statistics in place.
    flat[path] = np.array(array, order="C")
  variables = scan_variables(traverse_util.unflatten_dict(flat))
  return model, jax.tree.map(np.asarray, variables)


def to_torchvision(model: ResNet, variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a network's weights as a PyTorch checkpoint.

  Args:
    model: a ResNet of version 1 with batch normalization (ghost batches included) and
      symmetric padding: what torchvision's networks compute. Its normalizers' epsilon
      is PyTorch's default, 1e-5, unless the method was changed.
    variables: its variables, of scanned or unrolled blocks.

  Returns:
    NumPy arrays by torchvision's names: `safetensors.numpy.save_file(result, path)`
    writes what `safetensors.torch.load_file` gives `network.load_state_dict`.

  Raises:
    UsageError: the model computes something else, or the variables are not its own.
  """
  computes = {
    "version": (model.version, 1),
    "symmetric_padding": (model.symmetric_padding, True),
    "method.sum_scale": (model.method.sum_scale, 1.0),
    "method.alpha": (model.method.alpha, None),
  }
  for field, (value, needed) in computes.items():
    if value != needed:
      raise UsageError(
        f"{field} is {value}, but torchvision's networks have {needed}: other "
        "networks cannot be converted."
      )
  flat = traverse_util.flatten_dict(unroll_variables(variables))
  channels = np.shape(flat.get(("params", "stem", "kernel")))
  shapes = _shapes(
    model.depth, model.num_classes, channels[2] if len(channels) == 4 else 3
  )
  _require_fit(
    f"The variables do not fit a ResNet-{model.depth} with batch normalization",
    {"/".join(path): shape for path, shape in shapes.items()},
    {"/".join(path): np.shape(value) for path, value in flat.items()},
  )
  state_dict = {}
  for path in shapes:
    array = np.asarray(flat[path])
    if path[-1] == "kernel":
      array = array.transpose(_AXES[array.ndim])
    # A copy: safetensors writes the memory as it lies, and JAX's may not be written to,
    # of which PyTorch warns.
    state_dict[_name(path)] = np.array(array, order="C")
    if path[-1] == "var":
      layer = _name(path).rpartition(".")[0]
      state_dict[f"{layer}.{_COUNTER}"] = np.zeros((), np.int64)
  return state_dict


def _network(depth: int, num_classes: int) -> ResNet:
  """Returns the model that computes what torchvision's does."""
  batch_norm = methods.get("batch_norm")
  return ResNet(depth, num_classes, batch_norm, version=1, symmetric_padding=True)


@functools.cache
def _shapes(depth: int, num_classes: int, channels: int) -> dict[_Path, _Shape]:
  """Returns the shapes of the unrolled variables by their paths."""
  model = _network(depth, num_classes)

  def init() -> dict[str, Any]:
    images = jnp.zeros((1, 32, 32, channels))
    return unroll_variables(model.init(jax.random.key(0), images, train=False))

  flat = traverse_util.flatten_dict(jax.eval_shape(init))
  return {path: leaf.shape for path, leaf in flat.items()}


def _name(path: _Path) -> str:
  """Returns torchvision's name of an unrolled variable."""
  _, first, *layers, leaf = path
  stage = re.fullmatch(r"stage(\d)_(first|rest)", first)
  if stage is None:
    return f"{_OUTSIDE[first]}.{_LEAVES[leaf]}"
  block = 0 if stage[2] == "first" else 1 + int(layers[0].removeprefix("block"))
  return f"layer{stage[1]}.{block}.{_INSIDE[layers[-1]]}.{_LEAVES[leaf]}"


def _permuted(path: _Path, shape: _Shape) -> _Shape:
  """Returns the shape that a variable has in PyTorch."""
  return tuple(shape[a] for a in _AXES[len(shape)]) if path[-1] == "kernel" else shape


def _size(state_dict: Mapping[str, Any], name: str, axis: int) -> int:
  """Returns the size of an array's axis, 1 where there is none."""
  shape = np.shape(state_dict.get(name, ()))
  return shape[axis] if axis < len(shape) else 1


def _require_fit(
  sentence: str, expected: Mapping[str, _Shape], actual: Mapping[str, _Shape]
) -> None:
  """Raises a UsageError where names or shapes differ."""
  problems = [f"{name!r} is missing" for name in expected if name not in actual]
  problems += [f"{name!r} is unknown" for name in actual if name not in expected]
  problems += [
    f"{name!r} has shape {actual[name]}, not {shape}"
    for name, shape in expected.items()
    if name in actual and actual[name] != shape
  ]
  if problems:
    shown = ", ".join(problems[:3])
    more = f", and {len(problems) - 3} more such problems" if len(problems) > 3 else ""
    raise UsageError(f"{sentence}: {shown}{more}.")
