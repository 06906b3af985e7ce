"""Weights of residual networks from and to PyTorch's layout.

    model, variables = from_torchvision(safetensors.numpy.load_file(path))
    logits = model.apply(variables, images, train=False)

The layout is that of torchvision's `resnet18` to `resnet152`: its
names, kernels OIHW and dense weights [outputs, inputs]. PyTorch is not needed.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.errors import FlaxError

from skipinit_jax import methods
from skipinit_jax.errors import UsageError, misfit
from skipinit_jax.methods import bind_normalizer
from skipinit_jax.models.depth import scan_variables, unroll_variables
from skipinit_jax.models.resnet import BASIC_DEPTHS, STAGE_BLOCKS, ResNet

__all__ = [
  "from_torchvision",
  "require_torchvision",
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
# Names without weights; the second is that of PyTorch's averages of models.
_COUNTERS = (_COUNTER, "n_averaged")
# What DistributedDataParallel, torch.compile and FSDP put into names.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")
# What torchvision's names begin with.
_FIRST_PARTS = {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"}
# Fields of a method by which its networks compute what those of "batch_norm" do.
_SAME_FIELDS = (
  "sum_scale",
  "alpha",
  "output_normalizer",
  "divide_by_expected_std",
  "scalar_biases",
  "use_bias",
)
# As torchvision's.
_NUM_CLASSES = 1000
_EPSILON = 1e-5
# By the number of a kernel's axes: ours in the order of PyTorch's.
_AXES = {4: (3, 2, 0, 1), 2: (1, 0)}


def from_torchvision(
  state_dict: Mapping[str, Any], num_classes: int | None = None
) -> tuple[ResNet, dict[str, Any]]:
  """Returns the network that a PyTorch checkpoint is of, and its variables.

  Args:
    state_dict: arrays by torchvision's names, NumPy's or PyTorch's; the depth is read
      from it. What wraps it is taken off: `{"state_dict": ...}`, `{"model": ...}` and
      the like, of which the first with weights counts; the prefixes that
      DistributedDataParallel (`module.`) and torch.compile (`_orig_mod.`) add; and
      prefixes that all names share.
    num_classes: logits of the network; None: as many as the weights have, or 1000, as
      torchvision, where they lack a classifier. A classifier that the weights lack, or
      have for another number of classes, is zero, as at initialization.

  Returns:
    The model, of version 1 with batch normalization and symmetric padding, and
    variables for it as NumPy arrays of unchanged dtype. In evaluation it computes the
    logits of the PyTorch network; its images are NHWC. A model for another purpose is
    `model.clone(remat=True)` and the like.

  Raises:
    UsageError: the arrays are not those of a ResNet: a name is missing or unknown, or a
      shape does not fit.
  """
  weights = _unwrap(state_dict)
  counts = tuple(
    len({key.split(".")[1] for key in weights if re.match(rf"layer{s}\.\d+\.", key)})
    for s in (1, 2, 3, 4)
  )
  # Blocks of the basic kind have no third convolution.
  basic = any(".conv2." in key for key in weights) and not any(
    ".conv3." in key for key in weights
  )
  depths = [depth for depth in STAGE_BLOCKS if (depth in BASIC_DEPTHS) == basic]
  depth = min(depths, key=lambda depth: math.dist(STAGE_BLOCKS[depth], counts))
  blocks = ""
  if counts != STAGE_BLOCKS[depth]:
    known = ", ".join(f"{STAGE_BLOCKS[d]} (ResNet-{d})" for d in depths)
    blocks = (
      f" (they have {counts} blocks in layer1 to layer4; convertible are {known})"
    )
  head = [name for name in weights if name.startswith("fc.")]
  num_kept = max((_size(weights, name, 0) for name in head), default=0)
  if not num_classes:
    num_classes = num_kept or _NUM_CLASSES
  has_new_head = num_kept != num_classes
  if has_new_head:
    weights = {name: weights[name] for name in weights if name not in head}
  model = _network(depth, num_classes)
  shapes = _shapes(depth, num_classes, _size(weights, "conv1.weight", 1) or 3)
  if has_new_head:
    dtype = next(iter(weights.values())).dtype if weights else np.float32
    weights |= {
      _name(path): np.zeros(_permuted(path, shape), dtype)
      for path, shape in shapes.items()
      if path[1] == "head"
    }
  _require_fit(
    f"The PyTorch weights do not fit a ResNet-{depth}{blocks}",
    {_name(path): _permuted(path, shape) for path, shape in shapes.items()},
    {name: weight.shape for name, weight in weights.items()},
  )
  flat = {}
  for path, shape in shapes.items():
    array = weights[_name(path)]
    if path[-1] == "kernel":
      array = array.transpose(np.argsort(_AXES[len(shape)]))
    # A copy, because PyTorch changes statistics in place.
    flat[path] = np.array(array, order="C")
  return model, scan_variables(traverse_util.unflatten_dict(flat))


def to_torchvision(model: ResNet, variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a network's weights as a PyTorch checkpoint.

  Args:
    model: a ResNet that computes what torchvision's networks do in evaluation: see
      `require_torchvision`.
    variables: its variables, of scanned or unrolled blocks.

  Returns:
    NumPy arrays by torchvision's names: `safetensors.numpy.save_file(result, path)`
    writes what `safetensors.torch.load_file` gives `network.load_state_dict`.

  Raises:
    UsageError: the model computes something else, or the variables are not its own.
  """
  require_torchvision(model)
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


def require_torchvision(model: Any) -> None:
  """Checks that a network computes in evaluation what torchvision's ResNets compute.

  They have version 1, symmetric padding, ReLU, plain convolutions without biases, and
  after each a batch normalization (ghost batches included) with epsilon 1e-5.

  Raises:
    UsageError: it computes something else; the message names the field.
  """
  if type(model) is not ResNet:
    raise UsageError(
      f"The model is a {type(model).__name__}: torchvision's layout is of ResNets."
    )
  method, plain = methods.get(model.method), methods.get("batch_norm")
  checks: list[tuple[str, Any, Any, bool]] = [
    (field, ours, theirs, ours == theirs)
    for field, ours, theirs in (
      ("version", model.version, 1),
      ("symmetric_padding", model.symmetric_padding, True),
      *(
        (f"method.{name}", getattr(method, name), getattr(plain, name))
        for name in _SAME_FIELDS
      ),
    )
  ]
  norm = bind_normalizer(
    method.normalizer, train=False, dtype=jnp.float32, param_dtype=jnp.float32
  )
  epsilon = getattr(norm() if norm else None, "epsilon", _EPSILON)
  checks.append(
    ("epsilon of method.normalizer", epsilon, _EPSILON, epsilon == _EPSILON)
  )
  # What functions and factories make can only be compared by what it computes.
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 5, 6, 3)), jnp.float32)
  kernel = jnp.asarray(rng.normal(size=(3, 3, 3, 4)), jnp.float32)
  mean, var, scale, bias = rng.uniform(0.5, 2, (4, 3)).astype(np.float32)
  padding = [(1, 1), (1, 1)]
  normalized = (x - mean) / np.sqrt(var + _EPSILON) * scale + bias
  convolved = jax.lax.conv_general_dilated(
    x, kernel, (2, 2), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )

  def convolve() -> Any:
    conv = method.conv(4, (3, 3), 2, padding=padding, use_bias=False)
    return conv.apply({"params": {"kernel": kernel}}, x)

  def normalize() -> Any:
    statistics = {"mean": mean, "var": var}
    params = {"scale": scale, "bias": bias}
    return norm and norm().apply({"params": params, "batch_stats": statistics}, x)

  checks += [
    (f"method.{name}", getattr(method, name), title, _computes(compute, needed))
    for name, title, compute, needed in (
      ("activation", "ReLU", lambda: method.activation(x), np.maximum(x, 0)),
      ("conv", "the plain convolution", convolve, convolved),
      ("normalizer", "batch normalization", normalize, normalized),
    )
  ]
  for field, ours, theirs, same in checks:
    if not same:
      raise UsageError(
        f"{field} is {ours}, but torchvision's networks have {theirs}: other networks "
        "cannot be converted."
      )


def _computes(compute: Callable[[], Any], needed: Any) -> bool:
  """Tells whether a computation succeeds with this result."""
  try:
    return np.allclose(compute(), needed, rtol=1e-4, atol=1e-4)
  except (FlaxError, AttributeError, TypeError, ValueError):
    return False


def _unwrap(checkpoint: Any) -> dict[str, np.ndarray]:
  """Returns the weights of a checkpoint by torchvision's names, without counters."""
  checkpoint = _find_weights(checkpoint) or checkpoint
  if not isinstance(checkpoint, Mapping):
    raise UsageError(
      f"The PyTorch weights are a {type(checkpoint).__name__}: they must be a dict of "
      "arrays by name."
    )
  names = {
    key: [part for part in str(key).split(".") if part not in _WRAPPERS]
    for key in checkpoint
    if str(key).rpartition(".")[2] not in _COUNTERS
  }
  first = {parts[0] if parts[1:] else "" for parts in names.values()}
  while len(first) == 1 and not first & {*_FIRST_PARTS, ""}:
    names = {key: parts[1:] for key, parts in names.items()}
    first = {parts[0] if parts[1:] else "" for parts in names.values()}
  weights: dict[str, np.ndarray] = {}
  for key, parts in names.items():
    name = ".".join(parts)
    if name in weights:
      raise UsageError(f"The PyTorch weights have two arrays {name!r}.")
    try:
      weights[name] = _to_numpy(checkpoint[key])
    except (RuntimeError, TypeError, ValueError) as error:
      raise UsageError(
        f"{name!r} of the PyTorch weights is no dense array of numbers "
        f"({type(error).__name__})."
      ) from None
  return weights


def _find_weights(checkpoint: Any) -> Mapping[Any, Any] | None:
  """Returns the first dict in nested ones that has weights of convolutions."""
  if callable(getattr(checkpoint, "state_dict", None)):
    checkpoint = checkpoint.state_dict()
  if not isinstance(checkpoint, Mapping):
    return None
  if any(str(key).endswith("conv1.weight") for key in checkpoint):
    return checkpoint
  return next(filter(None, map(_find_weights, checkpoint.values())), None)


def _to_numpy(array: Any) -> np.ndarray:
  """Returns an array of NumPy, JAX or PyTorch as NumPy's, of the same dtype."""
  array = array.detach().cpu() if hasattr(array, "detach") else array
  try:
    return np.asarray(array)
  except TypeError:
    # PyTorch does not hand out bfloat16, which NumPy knows by JAX alone.
    dtype = jnp.dtype(str(array.dtype).removeprefix("torch."))
    return np.asarray(array.float()).astype(dtype)


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


def _size(weights: Mapping[str, np.ndarray], name: str, axis: int) -> int:
  """Returns the size of a weight's axis, 0 where there is none."""
  shape = weights[name].shape if name in weights else ()
  return shape[axis] if axis < len(shape) else 0


def _require_fit(
  sentence: str, expected: Mapping[str, _Shape], actual: Mapping[str, _Shape]
) -> None:
  """Raises a UsageError where names or shapes differ."""
  if problems := misfit(expected, actual):
    raise UsageError(f"{sentence}: {problems}.")
