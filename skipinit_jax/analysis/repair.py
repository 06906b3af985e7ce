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
import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from skipinit_jax.analysis import blocks as blocks_lib
from skipinit_jax.analysis import measure, probes
from skipinit_jax.analysis.blocks import Blocks, Call, Path
from skipinit_jax.analysis.diagnose import Diagnosis, diagnose_signal
from skipinit_jax.analysis.signal import (
  Signal,
  block_names,
  training_arguments,
)
from skipinit_jax.compilation import compiler_options
from skipinit_jax.errors import UsageError, unknown_name
from skipinit_jax.models import ResidualBlock

Target = Literal["measured", "inverse_sqrt_depth", "zero"]
_TARGETS = ("measured", "inverse_sqrt_depth", "zero")
_FACTOR = "_factor"
_INPUT, _BRANCH, _LAYER = "repair:input", "repair:branch", "repair:layer"
_MOST_PASSES = 20
# A decline to a twentieth is harmless. Post-activation makes one of a few blocks each.
_LEAST_LOG = -3.0
# Second moment of the skip path over that of the branch: less is rounding.
_LEAST_SKIP = 1e-9
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

  variables: dict[str, Any]
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
) -> Repair:
  """Scales the last layer of each branch so that the signal passes all blocks.

  The stream's second moment then changes by at most a factor of e over the depth,
  forward and backward. See the module for the derivation. A healthy network stays as it
  is.

  A branch's last layer is the module with parameters from whose output the block's is
  made by sums and elementwise functions alone, but not one through which the skip path
  runs, as through a normalizer of the sum.

  Args:
    model: any Flax Linen network of residual blocks.
    variables: its variables, at initialization.
    batch: at least two different examples, as `measure.signal` takes them.
    blocks: the residual blocks; None: those of this package. See `measure.Blocks`.
    last_layers: the last layers of each block's branches, as patterns of their paths in
      the block, such as "conv2" or "*/out"; None: they are found.
    to: what branches are scaled to: "measured" shares of the stream, 1 / sqrt(d) times
      their present size ("inverse_sqrt_depth"), or "zero".
    more_batches: a block's factor is the smallest over the batches.
    key: for the noise and the model's own random numbers; None: `jax.random.key(0)`.
    **arguments: the model's other arguments. A model's argument `train` is True unless
      given.

  Returns:
    The repaired variables, and what was changed.

  Raises:
    UsageError: as `measure.signal`; a value of the batch or of the variables is not
      finite; a block has no skip path, or its last layer is not found or has no scale;
      or something else than the branches keeps the network from being healthy.
  """
  if to not in _TARGETS:
    raise unknown_name("target `to`", to, _TARGETS)
  batches = (batch, *more_batches)
  for each in batches:
    probes.require_examples(each)
  for name, tree in {"batch": batches, "variables": variables}.items():
    _require_finite(name, tree)
  arguments = training_arguments(model, arguments)
  blocks = blocks or Blocks()
  key = jax.random.key(0) if key is None else key
  signal = jax.jit(
    lambda variables: measure.signal(
      model, variables, batch, blocks=blocks, key=key, **arguments
    ),
    compiler_options=compiler_options(),
  )
  before = diagnose_signal(signal(variables))
  if before.healthy:
    return Repair(dict(variables), (), before, before)

  scaler = _Scaler(blocks, last_layers)
  passes = [_pass(model, variables, each, scaler, key, arguments) for each in batches]
  params, factors = _scale(variables["params"], _factors(passes, to), scaler.layers)
  repaired = {**variables, "params": params}
  measured = signal(repaired)
  after = diagnose_signal(measured)
  if to != "inverse_sqrt_depth":
    _require_scaled(passes[0], scaler.layers, measured)
  if not after.healthy:
    raise UsageError(
      f"Scaling the branches' last layers is not enough: with them scaled, {after}"
    )
  names = list(measured.names)
  changes = [
    Change(name, scaler.layers[path].names, factor)
    for path, values in factors.items()
    for name, factor in _by_block(path, values)
  ]
  changes.sort(key=lambda change: _place(names, change.name))
  return Repair(repaired, tuple(changes), before, after)


def _require_finite(name: str, tree: Any) -> None:
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.inexact) and not jnp.isfinite(leaf).all():
      place = jax.tree_util.keystr(path, simple=True, separator="/")
      raise UsageError(f"{name} has values that are not finite, in {place}.")


def _pass(
  model: nn.Module,
  variables: Mapping[str, Any],
  inputs: Any,
  scaler: "_Scaler",
  key: jax.Array,
  arguments: Mapping[str, Any],
) -> dict[Call, dict[str, np.ndarray]]:
  """Returns, by call, what a block's branches are multiplied by and what that does."""
  model_key, scaler.noise_key = jax.random.split(key)
  mutable = [name for name in variables if name != "params"] + [measure._COLLECTION]
  args, kwargs = blocks_lib.call_arguments(model, inputs, arguments)

  def run(variables: Mapping[str, Any], interceptor: Any) -> Any:
    with nn.intercept_methods(interceptor):
      _, state = model.apply(
        variables, *args, rngs=model_key, mutable=mutable, **kwargs
      )
    return state[measure._COLLECTION]

  finder = measure._Finder(scaler.blocks)
  slots = jax.eval_shape(lambda: run(variables, finder))
  calls = finder.found()
  depth = sum(measure._at(slots, call)["end"].size for call in calls)
  scaler.transformed = finder.transformed

  @functools.partial(jax.jit, compiler_options=compiler_options())
  def scaled(variables: Mapping[str, Any], share: jax.Array) -> list[Any]:
    scaler.share = share
    state = run(variables, scaler)
    return [measure._at(state, call, _FACTOR) for call in calls]

  share = 1.0
  for _ in range(_MOST_PASSES):
    found = jax.device_get(scaled(variables, share / depth))
    for (path, _), values in zip(calls, found, strict=True):
      _require_skip(path, scaler.layers[path], values)
    # Forward and backward.
    growth = sum(np.log(values["growth"]).reshape(-1, 2).sum(0) for values in found)
    excess = np.maximum(growth, growth / _LEAST_LOG).max()
    if excess <= 1:
      break
    # Growth is proportional to the share, or to its root where branches correlate.
    share *= 0.9 / min(excess, 100)
  return dict(zip(calls, found, strict=True))


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


def _require_skip(
  path: Path, layers: "_Layers", values: Mapping[str, np.ndarray]
) -> None:
  # A branch that is zero makes it infinite or, without skip path, not a number.
  if (values["skip"] > _LEAST_SKIP).all():
    return
  raise UsageError(
    f"Block {'/'.join(path)!r} has no skip path: its output vanishes with "
    f"{layers.text}. Choose residual blocks, name the child that projects the "
    "skip path by Blocks(shortcut=...), or the branch's last layer by last_layers."
  )


def _scale(
  params: Mapping[str, Any],
  factors: Mapping[Path, np.ndarray],
  layers: Mapping[Path, "_Layers"],
) -> tuple[dict[str, Any], dict[Path, np.ndarray]]:
  """Returns the parameters, those of last layers multiplied, and by what they were."""
  scaled: dict[str, Any] = jax.tree.map(lambda leaf: leaf, dict(params))
  applied = dict(factors)
  for path, factor in factors.items():
    for layer, ranks in layers[path].parameters.items():
      try:
        owner = functools.reduce(lambda node, name: node[name], path + layer, scaled)
        leaves = {name: owner[name] for name in ranks}
      except KeyError:
        raise UsageError(
          f"The parameters of {'/'.join(layer)!r}, the last layer of block "
          f"{'/'.join(path)!r}, are not its own: name another one by last_layers."
        ) from None
      for name, leaf in leaves.items():
        axes = leaf.ndim - ranks[name]
        # Blocks of a scan that share a parameter have one factor, the smallest.
        each = factor
        if leaf.shape[:axes] != factor.shape:
          each = factor.min()
          applied[path] = np.full_like(factor, each)
        each = each.reshape(each.shape + (1,) * (leaf.ndim - each.ndim))
        owner[name] = (leaf * each).astype(leaf.dtype)
  return scaled, applied


def _require_scaled(
  planned: Mapping[Call, Mapping[str, np.ndarray]],
  layers: Mapping[Path, "_Layers"],
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
    if not np.log(moment / expected) < _CHANCE:
      raise UsageError(
        f"Block {name!r} does not become smaller with the parameters of {last.text}, "
        "as a layer that standardizes its weights does not: name another module of its "
        "branch by last_layers, or give the branch a scale."
      )


def _by_block(path: Path, values: np.ndarray) -> list[tuple[str, float]]:
  """Returns the names of the blocks at a path with their values."""
  names = block_names(path, values.size if values.ndim else None)
  return list(zip(names, values.reshape(-1).tolist(), strict=True))


def _place(names: Sequence[str], block: str) -> int:
  return next(i for i, name in enumerate(names) if name.partition(" (")[0] == block)


class _Layers(NamedTuple):
  """The last layers of a block's branches.

  Attributes:
    parameters: by path in the block, the parameters that scale them, with their ranks.
  """

  parameters: Mapping[Path, Mapping[str, int]]

  @property
  def names(self) -> tuple[str, ...]:
    return tuple("/".join(path) for path in self.parameters)

  @property
  def text(self) -> str:
    return " and ".join(map(repr, self.names))


class _Scaler:
  """Interceptor that scales the branches of the blocks, one after the other.

  Attributes:
    blocks: the blocks.
    last_layers: see `repair`.
    transformed: see `measure._Finder`.
    noise_key: for the noise that stands for the gradient.
    share: c / d, each branch's part of the stream.
    layers: by the blocks' paths, what was found.
  """

  transformed: set[Path]
  noise_key: jax.Array
  share: jax.Array

  def __init__(self, blocks: Blocks, last_layers: str | Sequence[str] | None) -> None:
    self.blocks = blocks
    named = [last_layers] if isinstance(last_layers, str) else last_layers
    self.last_layers = named
    self.layers: dict[Path, _Layers] = {}
    self._outside: set[Path] = set()
    self._inside = False

  def __call__(
    self, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
  ) -> Any:
    module, path = context.module, context.module.path
    called = context.method_name == "__call__"
    if self._inside or not called or module not in self.blocks:
      return run(*args, **kwargs)
    if path in self.transformed and path not in self._outside:
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

    def call(x: jax.Array, interceptor: Any) -> Any:
      args, kwargs = replaced(x)
      with nn.intercept_methods(interceptor):
        output, _ = block.apply(variables, *args, rngs=rngs, mutable=mutable, **kwargs)
      return output

    layers = _find_layers(call, x, self.blocks, self.last_layers, module.path)
    self.layers[module.path] = layers

    def times(x: jax.Array, factor: jax.Array) -> Any:
      return call(x, _Times(layers, factor))

    def terms(factor: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Any]:
      """Returns the block's features and what it makes of a gradient; its output."""

      def features(x: jax.Array) -> tuple[jax.Array, Any]:
        output = times(x, factor)
        return blocks_lib.first(output), output

      y, pull, output = jax.vjp(features, x, has_aux=True)
      noise = jax.random.normal(jax.random.clone(self.noise_key), y.shape, jnp.float32)
      (gradient,) = pull(noise.astype(y.dtype))
      return (probes.wide(y), probes.wide(gradient)), output

    # Not at zero: where a ReLU follows the sum, its derivative jumps there.
    small = jnp.sqrt(self.share)
    low, high = small / 16, small
    at_both, _ = jax.vmap(terms)(jnp.stack([low, high]))
    branch = [(each[1] - each[0]) / (high - low) for each in at_both]
    skip = [each[0] - low * b for each, b in zip(at_both, branch, strict=True)]
    in_skip, in_branch = _moments(skip), _moments(branch)
    ratio = (in_branch / in_skip).max()
    factor = jnp.where(ratio > self.share, jnp.sqrt(self.share / ratio), 1.0)
    scaled, output = terms(factor)
    in_sum = _moments(scaled)
    number = measure._calls_before(module, _FACTOR)
    module.put_variable(
      measure._COLLECTION,
      f"{_FACTOR}{number}",
      {
        "factor": factor,
        "skip": in_skip[0] / in_branch[0],
        "output": in_sum[0],
        "growth": in_sum / in_skip,
      },
    )
    return output


def _moments(terms: Sequence[jax.Array]) -> jax.Array:
  return jnp.stack([jnp.square(each).mean() for each in terms])


class _Times:
  """Interceptor that multiplies the outputs of layers by a factor."""

  def __init__(self, layers: _Layers, factor: jax.Array) -> None:
    self.layers = layers
    self.factor = factor
    self._active: set[Path] = set()

  def __call__(
    self, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
  ) -> Any:
    path = context.module.path
    # A transformed module is called twice at one path, outside and inside.
    if (
      context.method_name != "__call__"
      or path not in self.layers.parameters
      or path in self._active
    ):
      return run(*args, **kwargs)
    self._active.add(path)
    output = run(*args, **kwargs)
    self._active.remove(path)
    return (output * self.factor).astype(output.dtype)


def _find_layers(
  call: Callable[[jax.Array, Any], Any],
  x: jax.Array,
  blocks: Blocks,
  patterns: Sequence[str] | None,
  path: Path,
) -> _Layers:
  """Finds the last layers of a block's branches."""
  tagger = _Tagger(blocks)

  def tagged(x: jax.Array) -> Any:
    return blocks_lib.first(call(checkpoint_name(x, _INPUT), tagger))

  jaxpr = jax.make_jaxpr(tagged)(x).jaxpr
  names = ["/".join(layer) for layer in tagger.parameters]
  name = "/".join(path)
  if patterns is None:
    found = _last_layers(jaxpr, tagger.has_branch)
    chosen = [list(tagger.parameters)[index] for index in sorted(found)]
  else:
    chosen = [
      layer
      for layer, layer_name in zip(tagger.parameters, names, strict=True)
      if any(fnmatch.fnmatchcase(layer_name, pattern) for pattern in patterns)
    ]
  if not chosen:
    text = ", ".join(map(repr, names)) or "none"
    which = "not found" if patterns is None else f"none of {', '.join(patterns)}"
    raise UsageError(
      f"The last layer of the branch of block {name!r} is {which}: name it by "
      f"last_layers, one of its modules with parameters ({text})."
    )
  return _Layers({layer: tagger.parameters[layer] for layer in chosen})


class _Tagger:
  """Interceptor that names, in the block's program, the outputs of its layers.

  Attributes:
    parameters: the layers by their paths in the order of their first calls, with the
      parameters that scale their outputs.
    has_branch: whether the block itself says what its branch is.
  """

  def __init__(self, blocks: Blocks) -> None:
    self.blocks = blocks
    self.parameters: dict[Path, dict[str, int]] = {}
    self.has_branch = False

  def __call__(
    self, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
  ) -> Any:
    module, path = context.module, context.module.path
    if context.method_name == "merge" and isinstance(module, ResidualBlock):
      self.has_branch = True
      return run(args[0], checkpoint_name(args[1], _BRANCH))
    output = run(*args, **kwargs)
    if context.method_name != "__call__" or not path:
      return output
    if path == (self.blocks.shortcut,):
      return checkpoint_name(output, _INPUT)
    own = {
      name: value.ndim
      for name, value in module.variables.get("params", {}).items()
      if not isinstance(value, Mapping)
    }
    # A bias alone adds something that is no factor of the branch.
    if own.keys() <= {"bias"}:
      return output
    # A kernel beside its own scale is standardized: it has none.
    if "scale" in own:
      own.pop("kernel", None)
    self.parameters[path] = own
    index = list(self.parameters).index(path)
    return checkpoint_name(output, f"{_LAYER}{index}")


class _Terms(NamedTuple):
  """What a value is a sum of: outputs of layers, and whether the stream is in it."""

  layers: frozenset[int] = frozenset()
  stream: bool = False

  def plus(self, other: "_Terms") -> "_Terms":
    return _Terms(self.layers | other.layers, self.stream or other.stream)


# What leaves an output where it is, up to a factor for each element.
_ELEMENTWISE = frozenset(
  [
    *("add", "add_any", "sub", "neg", "mul", "div", "max", "min", "select_n", "name"),
    *("convert_element_type", "reduce_precision", "copy", "optimization_barrier"),
    *("reshape", "transpose", "squeeze", "broadcast_in_dim", "slice", "gather", "rev"),
    *("pad", "concatenate", "reduce_window_sum", "sharding_constraint"),
  ]
)


class _Program:
  """A program of JAX, read from a result back to what it is a sum of."""

  def __init__(self, jaxpr: Any, arguments: Sequence[Callable[[], _Terms]]) -> None:
    self._makers = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}
    self._arguments = dict(zip(jaxpr.invars, arguments, strict=True))
    self._known: dict[Any, _Terms] = {}

  def terms(self, value: Any) -> _Terms:
    """Returns what a variable of the program is a sum of."""
    if isinstance(value, jax.extend.core.Literal):
      return _Terms()
    if value not in self._known:
      self._known[value] = self._terms(value)
    return self._known[value]

  def _terms(self, value: Any) -> _Terms:
    if value in self._arguments:
      return self._arguments[value]()
    if value not in self._makers:
      return _Terms()
    eqn = self._makers[value]
    operands = [functools.partial(self.terms, operand) for operand in eqn.invars]
    inner = _called(eqn)
    if inner is not None:
      called = _Program(inner, operands)
      return called.terms(inner.outvars[eqn.outvars.index(value)])
    primitive, name = eqn.primitive.name, eqn.params.get("name")
    if primitive not in _ELEMENTWISE:
      return _Terms()
    if primitive == "name":
      if name == _INPUT:
        return _Terms(stream=True)
      terms = operands[0]()
      # The stream runs through a normalizer of the sum.
      if not name.startswith(_LAYER) or terms.stream:
        return terms
      return _Terms(frozenset({int(name.removeprefix(_LAYER))}))
    if primitive in ("div", "gather"):
      operands = operands[:1]
    elif primitive == "select_n":
      operands = operands[1:]
    found = [operand() for operand in operands]
    if primitive == "mul":
      # Of two factors, one carries the branch: the one that comes later.
      return max(found, key=lambda terms: (terms.stream, max(terms.layers, default=-1)))
    return functools.reduce(_Terms.plus, found, _Terms())


def _called(eqn: Any) -> Any:
  """Returns the program that an equation calls with its own operands, or None."""
  for value in eqn.params.values():
    inner = getattr(value, "jaxpr", value)
    if hasattr(inner, "eqns") and len(inner.invars) == len(eqn.invars):
      return inner
  return None


def _last_layers(jaxpr: Any, has_branch: bool) -> frozenset[int]:
  program = _Program(jaxpr, [_Terms] * len(jaxpr.invars))
  if has_branch:
    (branch,) = [
      eqn.outvars[0]
      for eqn in jaxpr.eqns
      if eqn.primitive.name == "name" and eqn.params["name"] == _BRANCH
    ]
    return program.terms(branch).layers
  return program.terms(jaxpr.outvars[0]).layers
