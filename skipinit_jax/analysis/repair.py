"""A network's variables, rescaled so that its depth does not keep it from training.

    repaired = analysis.repair(model, variables, images)
    print(repaired)
    variables = repaired.variables

The model's code stays. The last layer of a branch is multiplied by a factor g, kernel
and bias, so that a block computes s + g b for x + f(x) = s + b.

Why this bounds both passes. Let q = E[s^2]. A block multiplies the stream's second
moment by

    E[(s + g b)^2] / q = 1 + 2 g E[s b] / q + g^2 E[b^2] / q.

At initialization the branch's last layer is independent of the skip path and has mean
zero, so E[s b] = 0 up to chance. With g^2 = (c / d) q / E[b^2] each of d blocks
multiplies by 1 + c / d, and all of them by (1 + c / d)^d <= e^c, where c = 1. With He
initialization E[b^2] = q and g = 1 / sqrt(d), the value of SkipInit's scalar that De &
Smith (2020) found to train.

Backward, a block maps the gradient v of its output to (S + g J)^T v, with S and J the
derivatives of s and b. For white noise v the same holds with |S^T v|^2 and |J^T v|^2 in
place of q and E[b^2]. For a branch of degree one in its input, such as ReLU layers
without biases, f(x) = J x by Euler, and both ratios are equal; behind a normalizer,
attention or biases they are not. So both are measured, and g takes the smaller one.

Blocks take turns from the input on: each is measured on the stream that the repaired
blocks before it make. It is one forward pass in which a block is called three times:
with two small g, from which s and b follow, and with its own g for what comes next. It
asks nothing of how the block adds:

- A factor behind the branch, or several branches in one block, are in b. The factor is
  common to all last layers of the block.
- A projection of the skip path, and anything else that is left at g = 0, such as biases
  behind the last layer, is in s. Growth is counted against s, so that what projections
  do to the signal stays.
- Behind a normalizer of the sum (post-norm), s and b are what the normalizer lets pass.
  Forward nothing grows anyway; backward the ratio is what counts.
- A normalizer, SkipInit or LayerScale at the end of the branch is itself the last
  layer. Standardized weights have no scale, but their layer may have a parameter
  `scale`, which is then what is multiplied.
- A branch that starts at zero, or is small enough, keeps its factor of one.

Branches that do correlate with the skip path, such as those that end in a ReLU, make
the term 2 g E[s b] / q as large as the third one, or larger. Then c is lowered until
the product of all blocks is at most e, and at least a twentieth, in both directions.

What is not repaired: a factor on the sum, a block without skip path, and whatever
stands before or behind the blocks.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx, traverse_util

from skipinit_jax.analysis import blocks as blocks_lib
from skipinit_jax.analysis import measure, probes, repair_nnx
from skipinit_jax.analysis.blocks import Blocks, Call, Path
from skipinit_jax.analysis.branches import Layers, Observe, Scaler
from skipinit_jax.analysis.diagnose import Diagnosis, diagnose_signal
from skipinit_jax.analysis.signal import Signal, block_names, in_training
from skipinit_jax.compilation import compiler_options
from skipinit_jax.errors import UsageError, unknown_name

Target = Literal["measured", "inverse_sqrt_depth", "zero"]
"""What `repair` scales branches to."""

_FACTOR = "_factor"
_MOST_PASSES = 20
# A decline to a twentieth is harmless. Post-activation makes one of a few blocks each.
_LEAST_LOG = -3.0
_LEAST_MOMENT = 1e-30
# What chance, such as dropout's, may change in the logarithm of a second moment.
_CHANCE = 0.25


@dataclasses.dataclass(frozen=True)
class Change:
  """What was changed in a block.

  Attributes:
    name: the block's name.
    layers: the paths of its branches' last layers in it.
    factor: what their parameters were multiplied by.
  """

  name: str
  layers: tuple[str, ...]
  factor: float

  def __str__(self) -> str:
    return f"{self.name}: {' and '.join(self.layers)} times {self.factor:.3g}"


@dataclasses.dataclass(frozen=True)
class Repair:
  """A network's variables with which its verdict is healthy, and what was changed.

  Attributes:
    variables: the variables. Only parameters of last layers differ from the given ones.
    changes: by block, from the input on; empty if the network was healthy.
    before: the diagnosis of the network as it was.
    after: its diagnosis with these variables.
  """

  variables: Any
  changes: tuple[Change, ...]
  before: Diagnosis
  after: Diagnosis

  @property
  def text(self) -> str:
    """What was wrong, what was changed, block by block, and the verdict on that."""
    if not self.changes:
      return f"Nothing was changed. {self.after}"
    lines = map(str, self.changes)
    return "\n".join([" ".join(map(str, self.before.faults)), *lines, str(self.after)])

  def __str__(self) -> str:
    return self.text


@overload
def repair(
  model: nn.Module,
  variables: Mapping[str, Any],
  batch: Any,
  *,
  blocks: Blocks | None = None,
  last_layers: str | Sequence[str] | None = None,
  to: Target = "measured",
  more_batches: Sequence[Any] = (),
  key: jax.Array | None = None,
  **arguments: Any,
) -> Repair: ...
@overload
def repair(
  model: nnx.Module,
  batch: Any,
  /,
  *,
  blocks: Blocks | None = None,
  last_layers: str | Sequence[str] | None = None,
  to: Target = "measured",
  more_batches: Sequence[Any] = (),
  key: jax.Array | None = None,
  **arguments: Any,
) -> Repair: ...
def repair(  # type: ignore[misc]
  model: Any,
  variables: Any = None,
  batch: Any = None,
  *,
  blocks: Blocks | None = None,
  last_layers: str | Sequence[str] | None = None,
  to: Target = "measured",
  more_batches: Sequence[Any] = (),
  key: jax.Array | None = None,
  **arguments: Any,
) -> Repair:
  """Scales the last layer of each branch so that the signal passes all blocks.

  The stream's second moment then changes by at most a factor of e over the depth,
  forward and backward. See the module for the derivation. A healthy network stays as it
  is.

  A branch's last layer is the module with parameters from whose output the block's is
  made by sums and elementwise functions alone, but not one through which the skip path
  runs, as through a normalizer of the sum.

  Args:
    model: any network of residual blocks, of Flax Linen or NNX, which stays as it is.
    variables: those of a Linen network, at initialization; NNX has none here:
      `repair(model, batch)`.
    batch: at least two different examples, as `measure.signal` takes them.
    blocks: the residual blocks; None: those of this package. See `measure.Blocks`.
    last_layers: the last layers of each block's branches, as patterns of their paths in
      the block, such as `conv2` or `*/out`; None: they are found.
    to: what branches are scaled to: "measured" shares of the stream, 1 / sqrt(d) times
      their present size ("inverse_sqrt_depth"), or "zero".
    more_batches: a block's factor is the smallest over the batches.
    key: for the noise and the model's own random numbers; None: `jax.random.key(0)`.
    **arguments: the model's other arguments. A Linen model's argument `train` is True
      unless given; a network of NNX is seen in the mode that `train()` sets.

  Returns:
    The repaired variables, for NNX a state to give to `nnx.update`, and what was
    changed.

  Raises:
    UsageError: as `measure.signal`; a value of the batch or of the variables is not
      finite; a block has no skip path, or its last layer is not found or has no scale;
      or something else than the branches keeps the network from being healthy.
  """
  if to not in get_args(Target):
    raise unknown_name("target `to`", to, get_args(Target))
  is_nnx = isinstance(model, nnx.Module)
  model, arguments = in_training(model, arguments)
  graphdef: Any = None
  if is_nnx:
    batch = measure.inputs_of_nnx(variables, batch)
    graphdef, variables = nnx.split(model)
  batches = (batch, *more_batches)
  for each in batches:
    probes.require_examples(each)
  for name, tree in {"batch": batches, "variables": variables}.items():
    _require_finite(name, tree)
  blocks = blocks or Blocks()
  key = jax.random.key(0) if key is None else key

  @functools.partial(jax.jit, compiler_options=compiler_options())
  def signal(variables: Any) -> Signal:
    network: Any = nnx.merge(graphdef, variables) if is_nnx else model
    own: Any = None if is_nnx else variables
    return measure.signal(network, own, batch, blocks=blocks, key=key, **arguments)

  before = diagnose_signal(signal(variables))
  if before.healthy:
    return Repair(variables, (), before, before)

  model_key, noise_key = jax.random.split(key)
  scaler = Scaler(blocks, last_layers, noise_key)
  passes = []
  for each in batches:
    calls, depth, scaled = (
      repair_nnx.scaling(model, each, scaler, arguments)
      if is_nnx
      else _scaling(model, variables, each, scaler, model_key, arguments)
    )
    passes.append(_lower(scaled, calls, depth, scaler))
  factors = _factors(passes, to)
  repaired: Any
  if is_nnx:
    flat = dict(nnx.to_flat_state(variables))
    by_name = {tuple(map(str, path)): path for path in flat}
    params = {place: flat[path][...] for place, path in by_name.items()}
    params, factors = _scale(params, factors, scaler.layers)
    for place, leaf in params.items():
      flat[by_name[place]] = flat[by_name[place]].replace(leaf)
    repaired = nnx.from_flat_state(flat)
  else:
    params = traverse_util.flatten_dict(dict(variables["params"]))
    scaled_params, factors = _scale(params, factors, scaler.layers)
    params = traverse_util.unflatten_dict({**params, **scaled_params})
    repaired = {**variables, "params": params}
  measured = signal(repaired)
  after = diagnose_signal(measured)
  if to != "inverse_sqrt_depth":
    _require_scaled(passes[0], scaler.layers, measured)
  if not after.healthy:
    raise UsageError(
      f"Scaling the branches' last layers is not enough: with them scaled, {after}"
    )
  changes = {
    name: Change(name, tuple(map("/".join, scaler.layers[path])), factor)
    for path, values in factors.items()
    for name, factor in _by_block(path, values)
  }
  # A block that is called several times is changed once.
  names = dict.fromkeys(name.partition(" (call ")[0] for name in measured.names)
  return Repair(repaired, tuple(map(changes.__getitem__, names)), before, after)


def _require_finite(name: str, tree: Any) -> None:
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.inexact) and not jnp.isfinite(leaf).all():
      place = jax.tree_util.keystr(path, simple=True, separator="/")
      raise UsageError(f"{name} has values that are not finite, in {place}.")


def _lower(
  scaled: Callable[..., Any], calls: Sequence[Call], depth: int, scaler: Scaler
) -> dict[Call, dict[str, np.ndarray]]:
  """Scales with the largest share of the stream with which it does not grow too much.

  Args:
    scaled: takes a share, and returns what `Scaler.scale` does of each call.
    calls: the calls, in their order.
    depth: how many blocks they are.
  """
  share = 1.0
  for _ in range(_MOST_PASSES):
    found = jax.device_get(scaled(share / depth))
    for (path, _), values in zip(calls, found, strict=True):
      if not values["skip"].all():
        raise UsageError(
          f"Block {'/'.join(path)!r} has no skip path: its output vanishes with "
          f"{_listed(scaler.layers[path])}. Choose residual blocks, name the child "
          "that projects the skip path by Blocks(shortcut=...), or the branch's last "
          "layer by last_layers."
        )
    # Forward and backward.
    growth = sum(np.log(values["growth"]).reshape(-1, 2).sum(0) for values in found)
    excess = np.maximum(growth, growth / _LEAST_LOG).max()
    # It is no number where the stream vanishes, which no share prevents.
    if not excess > 1:
      break
    # Growth is proportional to the share, or to its root where branches correlate.
    share *= 0.9 / min(excess, 100)
  return dict(zip(calls, found, strict=True))


def _scaling(
  model: nn.Module,
  variables: Mapping[str, Any],
  inputs: Any,
  scaler: Scaler,
  key: jax.Array,
  arguments: Mapping[str, Any],
) -> tuple[list[Call], int, Callable[[float], Any]]:
  """Returns a Linen network's calls of blocks, their number, and what scales them."""
  mutable = [name for name in variables if name != "params"] + [measure._COLLECTION]
  args, kwargs = blocks_lib.call_arguments(model, inputs, arguments)

  def run(variables: Mapping[str, Any], interceptor: Any) -> Any:
    with nn.intercept_methods(interceptor):
      _, state = model.apply(variables, *args, rngs=key, mutable=mutable, **kwargs)
    return state[measure._COLLECTION]

  finder = measure._Finder(scaler.blocks)
  slots = jax.eval_shape(lambda: run(variables, finder))
  calls = finder.found()
  depth = sum(measure._at(slots, call)["end"].size for call in calls)

  @functools.partial(jax.jit, compiler_options=compiler_options())
  def scaled(variables: Mapping[str, Any], share: jax.Array) -> list[Any]:
    scaler.share = share
    state = run(variables, _LinenBlocks(scaler, finder.transformed))
    return [measure._at(state, call, _FACTOR) for call in calls]

  return calls, depth, functools.partial(scaled, variables)


def _factors(
  passes: Sequence[Mapping[Call, Mapping[str, np.ndarray]]], to: Target
) -> dict[Path, np.ndarray]:
  """Returns what each block's branches are multiplied by."""
  depth = sum(values["factor"].size for values in passes[0].values())
  factors: dict[Path, np.ndarray] = {}
  for result in passes:
    for (path, _), values in result.items():
      factor = values["factor"]
      if to != "measured":
        factor = np.full_like(factor, 0 if to == "zero" else depth**-0.5)
      factors[path] = np.minimum(factors.get(path, factor), factor)
  return factors


def _listed(layers: Layers) -> str:
  return " and ".join(repr("/".join(layer)) for layer in layers)


def _scale(
  params: Mapping[Path, jax.Array],
  factors: Mapping[Path, np.ndarray],
  layers: Mapping[Path, Layers],
) -> tuple[dict[Path, jax.Array], dict[Path, np.ndarray]]:
  """Returns the parameters of last layers, multiplied, and by what they were.

  Args:
    params: all parameters, by their paths.
  """
  scaled: dict[Path, jax.Array] = {}
  applied = dict(factors)
  for path, factor in factors.items():
    for layer, ranks in layers[path].items():
      for name, rank in ranks.items():
        leaf = params.get((*path, *layer, name))
        if leaf is None:
          raise UsageError(
            f"The parameters of {'/'.join(layer)!r}, the last layer of block "
            f"{'/'.join(path)!r}, are not its own: name another one by last_layers."
          )
        each = factor
        # Blocks of a scan that share a parameter have one factor, the smallest.
        if leaf.shape[: leaf.ndim - rank] != factor.shape:
          each = factor.min()
          applied[path] = np.full_like(factor, each)
        each = each.reshape(each.shape + (1,) * (leaf.ndim - each.ndim))
        scaled[*path, *layer, name] = (leaf * each).astype(leaf.dtype)
  return scaled, applied


def _require_scaled(
  planned: Mapping[Call, Mapping[str, np.ndarray]],
  layers: Mapping[Path, Layers],
  signal: Signal,
) -> None:
  """Raises a UsageError if the branches are larger than was planned."""
  moments = {
    (name, number): (moment, layers[path])
    for (path, number), values in planned.items()
    for name, moment in _by_block(path, values["output"])
  }
  for name, moment in zip(signal.names, signal.second_moment[1:], strict=True):
    block, _, call = name.partition(" (call ")
    expected, last = moments[block, int(call.rstrip(")") or 1) - 1]
    # Where the stream vanishes, there is nothing to compare.
    if expected > _LEAST_MOMENT and np.log(moment / expected) >= _CHANCE:
      raise UsageError(
        f"Block {name!r} does not become smaller with the parameters of "
        f"{_listed(last)}, as a layer that standardizes its weights does not: name "
        "another module of its branch by last_layers, or give the branch a scale."
      )


def _by_block(path: Path, values: np.ndarray) -> list[tuple[str, float]]:
  """Returns the names of the blocks at a path with their values."""
  names = block_names(path, values.size if values.ndim else None)
  return list(zip(names, values.reshape(-1).tolist(), strict=True))


class _LinenBlocks:
  """Interceptor that scales the branches of a Linen network's blocks."""

  def __init__(self, scaler: Scaler, transformed: set[Path]) -> None:
    """Takes what scales a block, and what `measure._Finder` found."""
    self._scaler = scaler
    self._transformed = transformed
    self._outside: set[Path] = set()
    self._inside = False

  def __call__(
    self, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
  ) -> Any:
    module, path = context.module, context.module.path
    called = context.method_name == "__call__"
    if self._inside or not called or module not in self._scaler.blocks:
      return run(*args, **kwargs)
    if path in self._transformed and path not in self._outside:
      self._outside.add(path)
      output = run(*args, **kwargs)
      self._outside.remove(path)
      return output
    self._inside = True
    output = self._block(module, args, kwargs)
    self._inside = False
    return output

  def _block(
    self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
  ) -> Any:
    block, variables = module.unbind()
    x, replaced = blocks_lib.stream(type(module), "/".join(module.path), args, kwargs)
    assert module.scope is not None
    rngs = {name: module.make_rng(name) for name in module.scope.rngs}
    mutable = [name for name in variables if name != "params"]

    def call(x: jax.Array, observe: Observe) -> Any:
      args, kwargs = replaced(x)
      with nn.intercept_methods(_Inside(observe)):
        output, _ = block.apply(variables, *args, rngs=rngs, mutable=mutable, **kwargs)
      return output

    output, record = self._scaler.scale(module.path, call, x)
    number = measure._calls_before(module, _FACTOR)
    module.put_variable(measure._COLLECTION, f"{_FACTOR}{number}", record)
    return output


class _Inside:
  """Interceptor that lets one observe the modules inside of a block."""

  def __init__(self, observe: Observe) -> None:
    self._observe = observe
    self._active: set[Path] = set()

  def __call__(
    self, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
  ) -> Any:
    module, path = context.module, context.module.path
    # A transformed module is called twice at one path, outside and inside.
    if context.method_name != "__call__" or not path or path in self._active:
      return run(*args, **kwargs)
    self._active.add(path)
    output = run(*args, **kwargs)
    self._active.remove(path)
    own = {
      name: value.ndim
      for name, value in module.variables.get("params", {}).items()
      if not isinstance(value, Mapping)
    }
    return self._observe(path, own, output)
