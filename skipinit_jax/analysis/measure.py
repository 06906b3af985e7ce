"""The signal and its gradient, measured in any Flax Linen network.

    signal = measure.signal(model, variables, images, train=True)
    ensemble = measure.over_seeds(model, images, num_seeds=8, train=True)

Neither the model's code nor its output changes: a method interceptor sees the calls of
the residual blocks, and what it measures leaves the network as Flax variables of one
collection, which a scan over depth stacks. Only a few numbers of each block are kept:
a derivative's mean square is taken where the derivative is, in the backward pass, and
returned in place of the derivative of a scalar variable.
"""

import dataclasses
import fnmatch
import functools
import itertools
import re
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from skipinit_jax.analysis.signal import (
  Signal,
  block_names,
  require_two_examples,
  to_numpy,
)
from skipinit_jax.errors import UsageError, unknown_name
from skipinit_jax.layers import GhostBatchNorm
from skipinit_jax.layers.normalization import normalize_sub_batches
from skipinit_jax.models import ResidualBlock

__all__ = [
  "Blocks",
  "Ensemble",
  "over_seeds",
  "signal",
]

_COLLECTION = "signal"
_PROBE = "_probe"
_STATISTICS = "_statistics"

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Which modules of a network are its residual blocks, and what they add.

  A block's first argument is the stream's features, and so is its result, or the first
  of several; channels are last. A block is called once a pass.

  In this package's blocks, what `merge` adds are skip path and branch. In others,
  the skip path is what the child `shortcut` returns, or else the block's input if it
  has the output's shape; the branch is what the last called child of `branch` returns,
  or else the block's output less the skip path. So where a block scales its sum, name
  the branch's last child. Without skip path, as behind an unnamed projection, the
  statistics of skip path and branch are NaN.

  Attributes:
    select: the blocks' class or classes, or a glob pattern of their paths, in which
      "*" stands for any part of one module's name: "stage*_rest/blocks".
    shortcut: name of the child module that projects the skip path.
    branch: names of child modules at the end of the branch.
  """

  select: type[nn.Module] | tuple[type[nn.Module], ...] | str = ResidualBlock
  shortcut: str = "projection"
  branch: tuple[str, ...] = ("branch_scale", "branch_bias")

  def __contains__(self, module: nn.Module) -> bool:
    if not isinstance(self.select, str):
      return isinstance(module, self.select)
    patterns = self.select.split("/")
    return len(patterns) == len(module.path) and all(
      map(fnmatch.fnmatchcase, module.path, patterns)
    )


def signal(
  model: nn.Module,
  variables: Mapping[str, Any],
  inputs: jax.Array,
  *,
  blocks: Blocks = Blocks(),
  loss: Callable[[Any], jax.Array] | None = None,
  key: jax.Array | None = None,
  **arguments: Any,
) -> Signal:
  """Measures the signal of a network, in one forward and one backward pass.

  It can be called within other compiled functions, and otherwise compiles one program
  at each call. To measure often, compile it once: `jax.jit(lambda variables, x:
  signal(model, variables, x, train=True))`.

  Second moments beyond the range of float32, or of the features' dtype if that is
  wider, are infinite.

  Args:
    model: the network, called as `model.apply(variables, inputs, **arguments)`.
    variables: its variables. Their updates are dropped.
    inputs: a batch of at least two examples, [N, ...].
    blocks: the residual blocks.
    loss: scalar function of the network's output, whose gradient is measured; None: a
      scalar whose derivative with respect to the last block's output is white noise of
      variance one. That suits any network, also one whose classifier starts at zero.
    key: for the noise and the model's own random numbers; None: `jax.random.key(0)`.
    **arguments: the model's other arguments, such as `train=True`.

  Returns:
    The signal of d blocks.

  Raises:
    UsageError: the batch has fewer than two examples; there are no such blocks; a
      block is called several times; or a scan of the network withholds new variables.
  """
  key = jax.random.key(0) if key is None else key
  measured = jax.jit(
    lambda variables, inputs, key: _measure(
      model, variables, inputs, blocks, loss, key, arguments
    )
  )(variables, inputs, key)
  return _with_unknown(measured)


@dataclasses.dataclass(frozen=True)
class Ensemble:
  """Signals of several initializations of one network.

  Attributes:
    signals: with a leading axis over the seeds, float64.
  """

  signals: Signal

  @property
  def mean(self) -> Signal:
    """Mean over the seeds."""
    return jax.tree.map(lambda values: values.mean(0), self.signals)

  @property
  def standard_error(self) -> Signal:
    """Standard error of the mean over the seeds."""
    # Squares of an exploding signal overflow, and infinity says so.
    with np.errstate(over="ignore", invalid="ignore"):
      return jax.tree.map(
        lambda values: values.std(0, ddof=1) / len(values) ** 0.5, self.signals
      )


def over_seeds(
  model: nn.Module,
  inputs: jax.Array,
  *,
  num_seeds: int,
  blocks: Blocks = Blocks(),
  loss: Callable[[Any], jax.Array] | None = None,
  key: jax.Array | None = None,
  **arguments: Any,
) -> Ensemble:
  """Measures the signal of several initializations of a network.

  One program initializes and measures. The seeds take turns, so it needs the memory of
  one.

  Args:
    model: the network, initialized as `model.init(key, inputs, **arguments)`.
    inputs: a batch of at least two examples, [N, ...], the same for all seeds.
    num_seeds: how many initializations; at least two.
    blocks: the residual blocks.
    loss: see `signal`.
    key: what the seeds' keys are split from; None: `jax.random.key(0)`.
    **arguments: the model's other arguments, such as `train=True`.

  Returns:
    The ensemble.

  Raises:
    UsageError: as `signal`, or `num_seeds` is below two.
  """
  if num_seeds < 2:
    raise UsageError(f"num_seeds is {num_seeds}: a standard error needs at least 2.")

  def measure_seed(key: jax.Array, inputs: jax.Array) -> Signal:
    init_key, key = jax.random.split(key)
    variables = model.init(init_key, inputs, **arguments)
    return _measure(model, variables, inputs, blocks, loss, key, arguments)

  keys = jax.random.split(jax.random.key(0) if key is None else key, num_seeds)
  signals = jax.jit(
    lambda keys, inputs: jax.lax.map(lambda key: measure_seed(key, inputs), keys)
  )(keys, inputs)
  return Ensemble(to_numpy(_with_unknown(signals)))


def _measure(
  model: nn.Module,
  variables: Mapping[str, Any],
  inputs: jax.Array,
  blocks: Blocks,
  loss: Callable[[Any], jax.Array] | None,
  key: jax.Array,
  arguments: Mapping[str, Any],
) -> Signal:
  require_two_examples(inputs.shape[0])
  model_key, noise_key = jax.random.split(key)
  mutable = [name for name in variables if name != "params"] + [_COLLECTION]

  def run(probes: Mapping[str, Any], interceptor: Any) -> tuple[Any, Any]:
    with nn.intercept_methods(interceptor):
      outputs, state = model.apply(
        {**variables, _COLLECTION: probes},
        inputs,
        rngs=model_key,
        mutable=mutable,
        **arguments,
      )
    return outputs, state.get(_COLLECTION, {})

  finder = _Finder(blocks)
  _, probes = jax.eval_shape(lambda: run({}, finder))
  paths = finder.found()
  probes = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), probes)
  last = _at(probes, paths[-1])[_PROBE]
  last["noise"] = last["noise"].at[(-1,) * last["noise"].ndim].set(1)

  def scalar(probes: Mapping[str, Any]) -> tuple[jax.Array, Any]:
    outputs, state = run(probes, _Recorder(blocks, finder.transformed, noise_key))
    if loss is not None:
      return loss(outputs), state
    products = [_at(state, path)[_STATISTICS]["noise_product"] for path in paths]
    return functools.reduce(jnp.add, map(jnp.sum, products)), state

  gradients, state = jax.grad(scalar, has_aux=True)(probes)
  return _gather(
    {
      path: _at(state, path)[_STATISTICS] | {"gradient": _at(gradients, path)[_PROBE]}
      for path in paths
    },
    finder.bodies,
  )


def _at(tree: Mapping[str, Any], path: Path) -> Any:
  return functools.reduce(lambda node, name: node[name], path, tree)


def _gather(
  statistics: Mapping[Path, Mapping[str, Any]], bodies: Mapping[Path, object]
) -> Signal:
  """Brings the statistics of all paths into one row of blocks, in their order."""
  names: list[str] = []
  # Blocks in the body of one scan take turns.
  order: list[int] = []

  def stacked(path: Path) -> Any:
    # Leading axes are those of the scans around a block.
    return statistics[path]["noise_product"]

  for _, group in itertools.groupby(
    statistics, lambda path: (id(bodies[path]), stacked(path).shape)
  ):
    paths, start = list(group), len(names)
    count = stacked(paths[0]).size
    of_paths = [
      block_names(path, count if stacked(path).ndim else None) for path in paths
    ]
    for index in range(count):
      for position, of_path in enumerate(of_paths):
        names.append(of_path[index])
        order.append(start + position * count + index)
  blocks = [dict(each) for each in statistics.values()]
  known: dict[str, list[bool]] = {"skip": [], "branch": [], "moving_variance": []}
  for block in blocks:
    for name, places in known.items():
      places += [name in block] * block["noise_product"].size
    for name in ("skip", "branch"):
      block.setdefault(name, jax.tree.map(jnp.zeros_like, block["output"]))
    block.setdefault("moving_variance", jnp.zeros_like(block["noise_product"]))
  if not all("alpha" in block for block in blocks):
    blocks = [block | {"alpha": None} for block in blocks]
  rows = jax.tree.map(
    lambda *leaves: jnp.concatenate([leaf.reshape(-1) for leaf in leaves]), *blocks
  )
  if order != sorted(order):
    rows = jax.tree.map(lambda leaf: leaf[np.array(order)], rows)

  def stream(of: Callable[[Mapping[str, Any]], jax.Array]) -> jax.Array:
    return jnp.append(of(rows["input"])[:1], of(rows["output"]))

  def partly(values: jax.Array, name: str) -> Any:
    places = tuple(known[name][index] for index in order)
    return values if all(places) else _Partial(values, places)

  gradient = rows["gradient"]
  return Signal(
    names=tuple(names),
    second_moment=stream(lambda features: features["second_moment"]),
    variance=stream(lambda features: features["variance"]),
    cosine=stream(lambda features: features["cosine"]),
    gradient_second_moment=jnp.append(gradient["input"][:1], gradient["output"]),
    skip_second_moment=partly(rows["skip"]["second_moment"], "skip"),
    skip_variance=partly(rows["skip"]["variance"], "skip"),
    branch_second_moment=partly(rows["branch"]["second_moment"], "branch"),
    branch_variance=partly(rows["branch"]["variance"], "branch"),
    moving_variance=partly(rows["moving_variance"], "moving_variance"),
    alpha=rows["alpha"],
  )


@struct.dataclass
class _Partial:
  """Values of which some are not known.

  Not a number says so to users, but in compiled code JAX's search for errors would stop
  there.
  """

  values: jax.Array
  known: tuple[bool, ...] = struct.field(pytree_node=False)


def _with_unknown(signal: Signal) -> Signal:
  """Returns a signal that is not a number where it is not known."""

  def fill(field: Any) -> Any:
    if not isinstance(field, _Partial):
      return field
    known, values = np.array(field.known), field.values
    if isinstance(values, jax.core.Tracer):
      # A function of the user's is compiled around it.
      return jnp.where(known, values, jnp.nan)
    return np.where(known, jax.device_get(values), np.float32(np.nan))

  return jax.tree.map(fill, signal, is_leaf=lambda leaf: isinstance(leaf, _Partial))


class _Finder:
  """Interceptor that finds the blocks, in order, and makes the variables of probes."""

  def __init__(self, blocks: Blocks) -> None:
    self.blocks = blocks
    # A transformed class, such as nn.remat(Block) or nn.scan(Block), is called twice
    # at one path, outside and inside of the transformation. The inner call counts.
    self.transformed: set[Path] = set()
    # What a block is called within: the network, or the body of a transformation such
    # as a scan, which is a root of its own among Flax's scopes.
    self.bodies: dict[Path, object] = {}
    self._paths: dict[Path, None] = {}
    self._active: list[Path] = []
    self._classes: dict[str, str] = {}

  def __call__(
    self, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
  ) -> Any:
    module, path = context.module, context.module.path
    # Numbers become wildcards: a thousand blocks are one name, and a usable pattern.
    pattern = re.sub(r"\d+", "*", "/".join(path))
    self._classes[pattern] = type(module).__name__
    if context.method_name != "__call__" or module not in self.blocks:
      return run(*args, **kwargs)
    if path in self._active:
      self.transformed.add(path)
    self._paths[path] = None
    # A scope itself would leak the tracers that it holds.
    self.bodies[path] = weakref.ref(module.scope.root)
    self._active.append(path)
    output = run(*args, **kwargs)
    self._active.pop()
    if path not in self.transformed or path in self._active:
      self._make_probe(module, bool(args), output)
    return output

  def _make_probe(self, module: nn.Module, positional: bool, output: Any) -> None:
    name = "/".join(module.path)
    if not positional:
      raise UsageError(f"Block {name!r} is called without a positional argument.")
    if not module.is_mutable_collection(_COLLECTION):
      raise UsageError(
        f"Block {name!r} is inside a scan that withholds new variables: add "
        f'"{_COLLECTION}": 0 to its variable_axes.'
      )
    if module.has_variable(_COLLECTION, _PROBE):
      raise UsageError(
        f"Block {name!r} is called several times in a pass: choose blocks that are "
        "called once."
      )
    zero = jnp.zeros((), _wide(_first(output)).dtype)
    probe = {"input": zero, "output": zero, "noise": zero}
    module.put_variable(_COLLECTION, _PROBE, probe)

  def found(self) -> list[Path]:
    """Returns the blocks' paths, or raises a UsageError if there are none."""
    select = self.blocks.select
    if self._paths:
      return list(self._paths)
    if isinstance(select, str):
      raise unknown_name("block", select, filter(None, self._classes))
    classes = select if isinstance(select, tuple) else (select,)
    wanted = " or ".join(each.__name__ for each in classes)
    present = ", ".join(sorted(set(self._classes.values())))
    raise UsageError(
      f"The network has no residual blocks of class {wanted}: select them by one of "
      f"its modules' classes ({present}) or by a pattern of their paths."
    )


class _Recorder:
  """Interceptor that records the blocks' statistics and probes the gradient."""

  def __init__(
    self, blocks: Blocks, transformed: set[Path], noise_key: jax.Array
  ) -> None:
    self.blocks = blocks
    self.transformed = transformed
    self.noise_key = noise_key
    self._outside: set[Path] = set()
    # For each block being called: its path and what was seen inside of it.
    self._open: list[tuple[Path, dict[str, jax.Array]]] = []

  def __call__(
    self, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
  ) -> Any:
    module, path = context.module, context.module.path
    if context.method_name != "__call__" or module not in self.blocks:
      return self._inside(run, args, kwargs, context)
    if path in self.transformed and path not in self._outside:
      self._outside.add(path)
      output = run(*args, **kwargs)
      self._outside.remove(path)
      return output
    return self._block(module, run, args, kwargs)

  def _inside(
    self, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
  ) -> Any:
    if not self._open:
      return run(*args, **kwargs)
    (block, seen), module = self._open[-1], context.module
    called = context.method_name == "__call__"
    if context.method_name == "merge" and isinstance(module, ResidualBlock):
      seen["skip"], seen["branch"] = args
    elif called and isinstance(module, nn.BatchNorm | GhostBatchNorm):
      seen.setdefault("moving_variance", _normalizer_variance(module, args[0]))
    output = run(*args, **kwargs)
    if called and module.path[:-1] == block:
      if module.name == self.blocks.shortcut:
        seen["skip"] = output
      elif module.name in self.blocks.branch:
        seen["branch"] = output
        if module.has_variable("params", "alpha"):
          alpha = module.get_variable("params", "alpha")
          # A module of a user's own may learn one for each channel.
          if alpha.size == 1:
            seen["alpha"] = alpha.reshape(()).astype(jnp.float32)
    return output

  def _block(
    self, module: nn.Module, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
  ) -> Any:
    probe: dict[str, jax.Array] = module.get_variable(_COLLECTION, _PROBE)
    x = _probe(args[0], probe["input"])
    seen: dict[str, jax.Array] = {}
    self._open.append((module.path, seen))
    output = run(x, *args[1:], **kwargs)
    self._open.pop()
    y = _probe(_first(output), probe["output"])

    if x.shape == y.shape:
      seen.setdefault("skip", x)
    if "skip" in seen:
      seen.setdefault("branch", y - seen["skip"])
    features = {"input": x, "output": y} | {
      name: seen.pop(name) for name in ("skip", "branch") if name in seen
    }
    statistics = {
      **{name: _statistics(each) for name, each in features.items()},
      "noise_product": self._noise_product(y, probe["noise"]),
      # What is left: a normalizer's variance and alpha, where there are such.
      **seen,
    }
    module.put_variable(_COLLECTION, _STATISTICS, statistics)
    return (y, *output[1:]) if isinstance(output, tuple) else y

  def _noise_product(self, y: jax.Array, chosen: jax.Array) -> jax.Array:
    """Product of y with white noise in the chosen block, otherwise zero."""

    def product(y: jax.Array) -> jax.Array:
      y = _wide(y)
      # Every block of a scan has this key, and one block's noise is drawn.
      key = jax.random.clone(self.noise_key)
      return (y * jax.random.normal(key, y.shape, y.dtype)).sum()

    # Noise for every block would take a good part of the time of a forward pass.
    return jax.lax.cond(chosen > 0, product, lambda y: jnp.zeros_like(chosen), y)


@jax.custom_vjp
def _probe(x: jax.Array, slot: jax.Array) -> jax.Array:
  """Returns x; the slot's "derivative" is the mean square of x's."""
  return x


def _probe_forward(x: jax.Array, slot: jax.Array) -> tuple[jax.Array, None]:
  return x, None


def _probe_backward(_: None, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
  x, factor = _in_range(_wide(cotangent))
  return cotangent, jnp.square(x).mean() * factor


_probe.defvjp(_probe_forward, _probe_backward)


def _first(output: Any) -> Any:
  return output[0] if isinstance(output, tuple) else output


def _wide(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _in_range(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns x over a power of two, and the square of that."""
  # The sum of many large squares overflows before their mean does.
  scale = jnp.where(jnp.abs(x).max() < 2.0**40, 1.0, 2.0**40).astype(x.dtype)
  return x / scale, scale**2


def _variance(x: jax.Array) -> jax.Array:
  return x.var(tuple(range(x.ndim - 1))).mean()


def _normalizer_variance(
  module: nn.BatchNorm | GhostBatchNorm, x: jax.Array
) -> jax.Array:
  x = _wide(x)
  if isinstance(module, GhostBatchNorm):
    one = jnp.ones((1,) * x.ndim)
    return normalize_sub_batches(x, module.ghost_batch_size, one, one, 1.0)[2].mean()
  return _variance(x)


def _statistics(x: jax.Array) -> dict[str, jax.Array]:
  x = _wide(x)
  size = x.shape[0]
  rows = x.reshape(size, -1)
  # Squares overflow long before the features do, but a direction has no scale.
  rows /= jnp.maximum(jnp.abs(rows).max(1, keepdims=True), jnp.finfo(x.dtype).tiny)
  squares = jnp.square(rows).sum(1, keepdims=True)
  rows *= jax.lax.rsqrt(jnp.maximum(squares, 1))
  pairs = jnp.square(rows.sum(0)).sum() - jnp.square(rows).sum()
  x, factor = _in_range(x)
  return {
    "second_moment": jnp.square(x).mean() * factor,
    "variance": _variance(x) * factor,
    "cosine": pairs / (size * (size - 1)),
  }
