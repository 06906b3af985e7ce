"""Weights of residual networks from and to PyTorch's layouts.

    model, variables = from_timm(safetensors.numpy.load_file(path))
    logits = model.apply(variables, images, train=False)

The layouts are torchvision's of `resnet18` to `resnet152`, which timm shares, and those
of timm's `resnetv2_50` and `nf_resnet50` and the like: their names, kernels OIHW and
dense weights [outputs, inputs]. PyTorch is not needed.
"""

import dataclasses
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

from skipinit_jax import layers, methods, models
from skipinit_jax.errors import UsageError, misfit
from skipinit_jax.methods import Method, bind_normalizer
from skipinit_jax.models.depth import scan_variables, unroll_variables
from skipinit_jax.models.resnet import BASIC_DEPTHS, STAGE_BLOCKS, ResNet

__all__ = [
  "from_timm",
  "from_torchvision",
  "require_timm",
  "require_torchvision",
  "to_timm",
  "to_torchvision",
]

_Path = tuple[str, ...]
_Shape = tuple[int, ...]
_Arrays = dict[_Path, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class _Layout:
  """How a library calls the weights of a kind of ResNet.

  Attributes:
    title: whose networks they are.
    what: what they have, in words.
    method: theirs, or the one whose plain fields they share.
    version: of the ResNet.
    block: the name of a block, by its stage from 1 on and its place there.
    outside: names by ours, outside of blocks.
    inside: likewise, inside of them.
    scale: the name of a layer's scale.
    classifier_axes: what follows the axes of a dense layer in the classifier's weight.
    free: fields of a method that may differ, because they are folded into the weights.
    average_projection: as the ResNet's.
  """

  title: str
  what: str
  method: Method
  version: int
  block: Callable[[int, object], str]
  outside: dict[str, str]
  inside: dict[str, str]
  scale: str = "weight"
  classifier_axes: _Shape = ()
  free: tuple[str, ...] = ()
  average_projection: bool = False


_CONVOLUTIONS = {f"conv{index}": f"conv{index}" for index in (1, 2, 3)}
_TORCHVISION = _Layout(
  title="torchvision",
  what="batch normalization",
  method=methods.get("batch_norm"),
  version=1,
  block=lambda stage, block: f"layer{stage}.{block}",
  outside={"stem": "conv1", "stem_norm": "bn1", "head/classifier": "fc"},
  inside={
    **_CONVOLUTIONS,
    "norm2": "bn1",
    "norm3": "bn2",
    "norm4": "bn3",
    "projection": "downsample.0",
    "projection_norm": "downsample.1",
  },
)
_V2 = _Layout(
  title="timm",
  what="batch normalization",
  method=methods.get("batch_norm"),
  version=2,
  block=lambda stage, block: f"stages.{stage - 1}.blocks.{block}",
  outside={"stem": "stem.conv", "head/norm": "norm", "head/classifier": "head.fc"},
  inside={
    **_CONVOLUTIONS,
    **{f"norm{index}": f"norm{index}" for index in (1, 2, 3)},
    "projection": "downsample.conv",
  },
  classifier_axes=(1, 1),
)
_UNNORMALIZED = dataclasses.replace(
  _V2,
  what="no normalization",
  method=methods.get("unnormalized"),
  free=("alpha", "learnable_alpha", "branch_factor", "use_bias"),
)
_NF = _Layout(
  title="timm",
  what="standardized layers",
  method=methods.get("nf_resnet"),
  version=2,
  block=lambda stage, block: f"stages.{stage - 1}.{block}",
  outside={"stem": "stem.conv", "head/classifier": "head.fc"},
  inside={
    **_CONVOLUTIONS,
    "projection": "downsample.conv",
    "branch_scale": "skipinit_gain",
  },
  scale="gain",
  # Without it, their networks are those of timm's default.
  free=("alpha",),
  average_projection=True,
)

_LEAVES = {
  "kernel": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
  "alpha": "",
}
# Steps of training, which each normalizer of PyTorch counts and rarely uses.
_COUNTER = "num_batches_tracked"
# Names without weights; the second is that of PyTorch's averages of models.
_COUNTERS = (_COUNTER, "n_averaged")
# What DistributedDataParallel, torch.compile and FSDP put into names.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")
# What the names of weights begin with.
_FIRST_PARTS = {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"}
_FIRST_PARTS |= {"stem", "stages", "norm", "head"}
# Fields of a method by which its networks compute what others do.
_SAME_FIELDS = (
  "sum_scale",
  "alpha",
  "branch_factor",
  "output_normalizer",
  "divide_by_expected_std",
  "scalar_biases",
  "use_bias",
  "stem_bias",
)
# As torchvision's.
_NUM_CLASSES = 1000
_EPSILON = 1e-5
# timm's gain of ReLU, which its standardized layers have, its epsilon of the variance
# of weights, and ours of their norm.
_TIMM_GAIN, _TIMM_EPSILON, _NORM_EPSILON = 1.7139588594436646, 1e-5, 1e-4
# By the number of a kernel's axes: ours in the order of PyTorch's.
_AXES = {4: (3, 2, 0, 1), 2: (1, 0)}


def from_torchvision(
  state_dict: Mapping[str, Any], num_classes: int | None = None
) -> tuple[models.ResNet, dict[str, Any]]:
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
  return _from(_TORCHVISION, _unwrap(state_dict), num_classes)


def from_timm(
  state_dict: Mapping[str, Any], num_classes: int | None = None
) -> tuple[models.ResNet, dict[str, Any]]:
  """Returns the network that a checkpoint of timm is of, and its variables.

  Args:
    state_dict: as in `from_torchvision`, by the names of timm's `resnet50`,
      `resnetv2_50` or `nf_resnet50`, or those of other depths.
    num_classes: likewise.

  Returns:
    The model and its variables, likewise. A `nf_resnet50` becomes one of the method
    "nf_resnet", without the learnable scalar unless the weights have it.

  Raises:
    UsageError: likewise.
  """
  weights = _unwrap(state_dict)
  blocks = [name for name in weights if name.startswith("stages.")]
  layout = _NF if blocks else _TORCHVISION
  if any(".blocks." in name for name in blocks):
    layout = _V2
  return _from(layout, weights, num_classes)


def _from(
  layout: _Layout, weights: dict[str, np.ndarray], num_classes: int | None
) -> tuple[models.ResNet, dict[str, Any]]:
  counts = tuple(
    len({match[1] for name in weights if (match := re.match(pattern, name))})
    for pattern in (rf"{re.escape(layout.block(s, ''))}(\d+)\." for s in (1, 2, 3, 4))
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
    first, last = (
      layout.block(stage, "").partition(".b")[0].strip(".") for stage in (1, 4)
    )
    blocks = (
      f" (they have {counts} blocks in {first} to {last}; convertible are {known})"
    )
  classifier = f"{layout.outside['head/classifier']}."
  head = [name for name in weights if name.startswith(classifier)]
  num_kept = max((_size(weights, name, 0) for name in head), default=0)
  if not num_classes:
    num_classes = num_kept or _NUM_CLASSES
  has_new_head = num_kept != num_classes
  if has_new_head:
    weights = {name: weights[name] for name in weights if name not in head}
  method = layout.method
  if layout is _NF and not any(name.endswith("skipinit_gain") for name in weights):
    method = dataclasses.replace(method, alpha=None)
  model = ResNet(
    depth,
    num_classes,
    method,
    version=layout.version,
    symmetric_padding=True,
    average_projection=layout.average_projection,
  )
  stem = f"{layout.outside['stem']}.weight"
  shapes = _shapes(model, _size(weights, stem, 1) or 3)
  names = {path: _name(layout, path) for path in shapes}
  theirs = {path: _their_shape(layout, path, shapes[path]) for path in shapes}
  if has_new_head:
    dtype = next(iter(weights.values())).dtype if weights else np.float32
    weights |= {
      names[path]: np.zeros(theirs[path], dtype)
      for path in shapes
      if path[1:3] == ("head", "classifier")
    }
  if problems := misfit(
    {names[path]: theirs[path] for path in shapes},
    {name: weight.shape for name, weight in weights.items()},
  ):
    raise UsageError(
      f"The PyTorch weights do not fit a ResNet-{depth}{blocks}: {problems}."
    )
  flat = {}
  for path, shape in shapes.items():
    array = weights[names[path]]
    if path[-1] == "kernel":
      array = array.reshape(array.shape[: len(shape)])
      array = array.transpose(np.argsort(_AXES[len(shape)]))
    # A copy, because PyTorch changes statistics in place.
    flat[path] = np.array(array.reshape(shape), order="C")
  if layout is _NF:
    flat = _with_gains(flat, ours=True)
  return model, scan_variables(traverse_util.unflatten_dict(flat))


def to_torchvision(
  model: models.ResNet, variables: Mapping[str, Any]
) -> dict[str, Any]:
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
  return _to(_TORCHVISION, model, variables)


def to_timm(model: models.ResNet, variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a network's weights as a checkpoint of timm.

  Without normalization, as with SkipInit, alpha is folded into the last layer of each
  branch, and the network is a ResNetV2 whose normalizers are ReLU alone:

      timm.models.resnetv2.ResNetV2(
        layers=[3, 4, 6, 3],
        conv_layer=timm.layers.create_conv2d,
        norm_layer=lambda features, **_: torch.nn.ReLU(),
      )

  with `functools.partial(timm.layers.create_conv2d, bias=True)` if it has biases. What
  is of the method "nf_resnet" is `nf_resnet50(skipinit=True)`; without alpha it is
  `nf_resnet50`.

  Args:
    model: a ResNet that computes what timm's networks do in evaluation: see
      `require_timm`.
    variables: its variables, of scanned or unrolled blocks.

  Returns:
    NumPy arrays by timm's names, as in `to_torchvision`.

  Raises:
    UsageError: the model computes something else, or the variables are not its own.
  """
  return _to(require_timm(model), model, variables)


def _to(layout: _Layout, model: ResNet, variables: Mapping[str, Any]) -> dict[str, Any]:
  there = traverse_util.flatten_dict(unroll_variables(variables))
  channels = np.shape(there.get(("params", "stem", "kernel")))
  shapes = _shapes(model, channels[2] if len(channels) == 4 else 3)
  if problems := misfit(
    {"/".join(path): shape for path, shape in shapes.items()},
    {"/".join(path): np.shape(value) for path, value in there.items()},
  ):
    raise UsageError(
      f"The variables do not fit a ResNet-{model.depth} with {layout.what}: {problems}."
    )
  flat = {path: np.asarray(there[path]) for path in shapes}
  if layout is _UNNORMALIZED:
    flat = _without_alpha(model, flat)
  if layout is _NF:
    flat = _with_gains(flat, ours=False)
  state_dict = {}
  for path, array in flat.items():
    name, shape = _name(layout, path), _their_shape(layout, path, array.shape)
    if path[-1] == "kernel":
      array = array.transpose(_AXES[array.ndim])
    # A copy: safetensors writes the memory as it lies, and JAX's may not be written to,
    # of which PyTorch warns.
    state_dict[name] = np.array(array, order="C").reshape(shape)
    if path[-1] == "var":
      state_dict[f"{name.rpartition('.')[0]}.{_COUNTER}"] = np.zeros((), np.int64)
  return state_dict


def _without_alpha(model: ResNet, flat: _Arrays) -> _Arrays:
  """Folds the factors of branches into their last layers, as PyTorch has none.

  Where other layers have biases, the stem of PyTorch has one too.
  """
  method, num_blocks = methods.get(model.method), sum(STAGE_BLOCKS[model.depth])
  last = "conv2" if model.depth in BASIC_DEPTHS else "conv3"
  initial = method.initial_alpha(num_blocks)
  folded = {}
  for path, array in flat.items():
    *block, layer, _ = path
    if layer == "branch_scale":
      continue
    if layer == last:
      learned = [(*block, "branch_scale", name) for name in ("alpha", "scale")]
      factor: Any = next((flat[each] for each in learned if each in flat), initial)
      factor = 1.0 if factor is None else np.asarray(factor, np.float64)
      array = (array * factor * method.branch_factor).astype(array.dtype)
    folded[path] = array
  if method.use_bias and not method.stem_bias:
    kernel = flat["params", "stem", "kernel"]
    folded["params", "stem", "bias"] = np.zeros(kernel.shape[-1:], kernel.dtype)
  return folded


def _with_gains(flat: _Arrays, *, ours: bool) -> _Arrays:
  """Returns a network of standardized layers, for this package or for timm.

  timm's layers have the gain of ReLU, the stem too, where here the activations have it;
  and both keep small kernels from being divided by zero in ways of their own.
  """
  changed = dict(flat)
  for path, array in flat.items():
    factor: Any = 1.0
    if path[-1] == "scale":
      kernel = flat[*path[:-1], "kernel"].astype(np.float64)
      fan_in, variance = kernel[..., 0].size, kernel.var((0, 1, 2))
      factor = np.sqrt(np.maximum(fan_in * variance, _NORM_EPSILON) / fan_in)
      factor *= _TIMM_GAIN / np.sqrt(variance + _TIMM_EPSILON)
      if path[1] != "stem":
        factor /= layers.RELU_GAIN
    elif path[1:] == ("head", "classifier", "kernel"):
      factor = 1 / layers.RELU_GAIN
    changed[path] = (array * (factor if ours else 1 / factor)).astype(array.dtype)
  return changed


def require_torchvision(model: Any) -> None:
  """Checks that a network computes in evaluation what torchvision's ResNets compute.

  They have version 1, symmetric padding, ReLU, plain convolutions without biases, and
  after each a batch normalization (ghost batches included) with epsilon 1e-5.

  Raises:
    UsageError: it computes something else; the message names the field.
  """
  _require(_TORCHVISION, model)


def require_timm(model: Any) -> Any:
  """Checks that a network computes in evaluation what one of timm's computes.

  It has symmetric padding, and is one of torchvision's; or of version 2, with batch
  normalization, or with neither normalization nor scalar biases, where branches have
  any alpha; or of version 2 and the method "nf_resnet", with or without alpha, and
  `average_projection`.

  Returns:
    How timm calls its weights.

  Raises:
    UsageError: it computes something else; the message names the field.
  """
  layout = _TORCHVISION
  if isinstance(model, ResNet) and model.version == 2:
    method = methods.get(model.method)
    layout = _V2 if method.normalizer else _UNNORMALIZED
    if method.divide_by_expected_std:
      layout = _NF
  _require(layout, model)
  return layout


def _require(layout: _Layout, model: Any) -> None:
  if type(model) is not ResNet:
    raise UsageError(
      f"The model is a {type(model).__name__}: {layout.title}'s layout is of ResNets."
    )
  method, plain = methods.get(model.method), layout.method
  checks: list[tuple[str, Any, Any, bool]] = [
    (field, ours, theirs, ours == theirs)
    for field, ours, theirs in (
      ("version", model.version, layout.version),
      ("symmetric_padding", model.symmetric_padding, True),
      ("average_projection", model.average_projection, layout.average_projection),
      *(
        (f"method.{name}", getattr(method, name), getattr(plain, name))
        for name in _SAME_FIELDS
        if name not in layout.free
      ),
    )
  ]
  # LayerScale's factors can be folded into weights, but have no place of their own.
  known = [layers.SkipInit, *([layers.LayerScale] if layout is _UNNORMALIZED else [])]
  same = not layout.free or method.branch_scale in known
  checks.append(("method.branch_scale", method.branch_scale, "SkipInit", same))
  if layout is _NF and not method.learnable_alpha:
    same = method.alpha in (None, 1)
    checks.append(("the constant method.alpha", method.alpha, "1", same))
  norm, plain_norm = (
    bind_normalizer(
      each.normalizer, train=False, dtype=jnp.float32, param_dtype=jnp.float32
    )
    for each in (method, plain)
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
  weights = {"kernel": kernel, "scale": jnp.arange(1.0, 5.0)}

  def convolve(method: Method) -> Any:
    conv = method.conv(4, (3, 3), 2, padding=[(1, 1), (1, 1)], use_bias=False)
    return conv.apply({"params": weights}, x)

  def normalize(norm: Any) -> Any:
    statistics = {"mean": mean, "var": var}
    params = {"scale": scale, "bias": bias}
    return norm and norm().apply({"params": params, "batch_stats": statistics}, x)

  checks += [
    (f"method.{name}", getattr(method, name), title, _computes_same(compute, *pair))
    for name, title, compute, pair in (
      ("activation", "ReLU", lambda m: m.activation(x), (method, plain)),
      ("conv", "another convolution", convolve, (method, plain)),
      ("normalizer", "batch normalization", normalize, (norm, plain_norm)),
    )
  ]
  for field, ours, theirs, same in checks:
    if not same:
      raise UsageError(
        f"{field} is {ours}, but {layout.title}'s networks have {theirs}: other "
        "networks cannot be converted."
      )


def _computes_same(compute: Callable[[Any], Any], ours: Any, theirs: Any) -> bool:
  """Tells whether a computation succeeds with the same result for both."""
  try:
    made, needed = compute(ours), compute(theirs)
    if made is None or needed is None:
      return made is needed
    return np.allclose(made, needed, rtol=1e-4, atol=1e-4)
  except (FlaxError, AttributeError, TypeError, ValueError):
    return False


def _unwrap(checkpoint: Any) -> dict[str, np.ndarray]:
  """Returns the weights of a checkpoint without counters."""
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


@functools.cache
def _shapes(model: ResNet, channels: int) -> dict[_Path, _Shape]:
  """Returns the shapes of the unrolled variables by their paths."""

  def init() -> dict[str, Any]:
    images = jnp.zeros((1, 32, 32, channels))
    return unroll_variables(model.init(jax.random.key(0), images, train=False))

  flat = traverse_util.flatten_dict(jax.eval_shape(init))
  return {path: leaf.shape for path, leaf in flat.items()}


def _name(layout: _Layout, path: _Path) -> str:
  """Returns the layout's name of an unrolled variable."""
  _, first, *modules, leaf = path
  stage = re.fullmatch(r"stage(\d)_(first|rest)", first)
  if stage is None:
    parts = [layout.outside["/".join([first, *modules])]]
  else:
    block = 0 if stage[2] == "first" else 1 + int(modules[0].removeprefix("block"))
    parts = [layout.block(int(stage[1]), block), layout.inside[modules[-1]]]
  last = layout.scale if leaf == "scale" else _LEAVES[leaf]
  return ".".join(filter(None, [*parts, last]))


def _their_shape(layout: _Layout, path: _Path, shape: _Shape) -> _Shape:
  """Returns the shape that a variable has in PyTorch."""
  if path[-1] == "scale" and layout is _NF:
    return (*shape, 1, 1, 1)
  if path[-1] != "kernel":
    return shape
  more = layout.classifier_axes if len(shape) == 2 else ()
  return tuple(shape[axis] for axis in _AXES[len(shape)]) + more


def _size(weights: Mapping[str, np.ndarray], name: str, axis: int) -> int:
  """Returns the size of a weight's axis, 0 where there is none."""
  shape = weights[name].shape if name in weights else ()
  return shape[axis] if axis < len(shape) else 0
