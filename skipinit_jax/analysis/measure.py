"""The signal and its gradient, measured in any Flax network, of Linen or NNX.

    signal = measure.signal(model, variables, images, train=True)
    signal = measure.signal(model_of_nnx, images)
    ensemble = measure.over_seeds(model, images, num_seeds=8, train=True)

Neither the model's code nor its output changes. In Linen, a method interceptor sees
the calls of the residual blocks, and what it measures leaves the network as variables
of one collection, which a scan over depth stacks. For NNX, see `inside_nnx.py`.
Only a few numbers of each block are kept:
a derivative's mean square is taken where the derivative is, in the backward pass, and
returned in place of the derivative of a scalar variable.
"""

import dataclasses
import functools
import itertools
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from skipinit_jax.analysis import blocks as blocks_lib
from skipinit_jax.analysis import inside_nnx, probes
from skipinit_jax.analysis.blocks import Blocks, Call, Path
from skipinit_jax.analysis.signal import Signal, to_numpy
from skipinit_jax.errors import UsageError
from skipinit_jax.models import ResidualBlock

__all__ = [
  "Blocks",
  "Ensemble",
  "over_seeds",
  "signal",
  "signal_of_functions",
]

_COLLECTION = "signal"
_SLOTS = "_slots"
_RECORD = "_record"
_OURS = Blocks()


@overload
def signal(
  model: nn.Module,
  variables: Mapping[str, Any],
  inputs: Any,
  *,
  blocks: Blocks = _OURS,
  loss: Callable[[Any], jax.Array] | None = None,
  key: jax.Array | None = None,
  **arguments: Any,
) -> Signal: ...
@overload
def signal(
  model: nnx.Module,
  inputs: Any,
  /,
  *,
  blocks: Blocks = _OURS,
  loss: Callable[[Any], jax.Array] | None = None,
  key: jax.Array | None = None,
  **arguments: Any,
) -> Signal: ...
def signal(  # type: ignore[misc]
  model: Any,
  variables: Any = None,
  inputs: Any = None,
  *,
  blocks: Blocks = _OURS,
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
    model: the network, called as `model.apply(variables, inputs, **arguments)`; or one
      of NNX, called as `model(inputs, **arguments)` in the mode that it has. It stays
      as it is: a copy runs.
    variables: those of a Linen network. Their updates are dropped. NNX has none here.
    inputs: a batch of at least two examples: an array [N, ...], of integers too, or a
      tree of them. A dict whose keys are names of the model's arguments is given as
      these arguments.
    blocks: the residual blocks.
    loss: scalar function of the network's output, whose gradient is measured; None: a
      scalar whose derivative with respect to the last block's output is white noise of
      variance one. That suits any network, also one whose classifier starts at zero.
    key: for the noise and the model's own random numbers; None: `jax.random.key(0)`.
    **arguments: the model's other arguments, such as `train=True`.

  Returns:
    The signal of d blocks.

  Raises:
    UsageError: the batch has fewer than two examples; there are no such blocks; what
      a block takes or returns are no features; a scan of the network withholds new
      variables; or there are variables beside a network of NNX.
  """
  key = jax.random.key(0) if key is None else key
  of_module: Any = functools.partial(_measure, model)
  if isinstance(model, nnx.Module):
    inputs = inputs_of_nnx(variables, inputs)
    graphdef, variables = nnx.split(model)
    of_module = functools.partial(inside_nnx.measure, graphdef)
  measured = jax.jit(
    lambda variables, inputs, key: of_module(
      variables, inputs, blocks, loss, key, arguments
    )
  )(variables, inputs, key)
  return probes.with_unknown(measured)


def inputs_of_nnx(first: Any, second: Any) -> Any:
  """Returns the batch, the only argument beside a network of NNX."""
  if first is not None and second is not None:
    raise UsageError(
      "There are three arguments, but a network of NNX has its variables inside: give "
      "the model and the batch alone."
    )
  return second if first is None else first


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
  model: nn.Module | Callable[[nnx.Rngs], nnx.Module],
  inputs: Any,
  *,
  num_seeds: int,
  blocks: Blocks = _OURS,
  loss: Callable[[Any], jax.Array] | None = None,
  key: jax.Array | None = None,
  **arguments: Any,
) -> Ensemble:
  """Measures the signal of several initializations of a network.

  One program initializes and measures. The seeds take turns, so it needs the memory of
  one.

  Args:
    model: the network, initialized as `model.init(key, inputs, **arguments)`; or a
      function that makes one of NNX, such as `lambda rngs: Network(rngs=rngs)`.
    inputs: a batch as `signal` takes it, the same for all seeds.
    num_seeds: how many initializations; at least two.
    blocks: the residual blocks.
    loss: see `signal`.
    key: what the seeds' keys are split from; None: `jax.random.key(0)`.
    **arguments: the model's other arguments, such as `train=True`.

  Returns:
    The ensemble.

  Raises:
    UsageError: as `signal`; `num_seeds` is below two; or the model is a network of NNX,
      which has its values already.
  """
  if num_seeds < 2:
    raise UsageError(f"num_seeds is {num_seeds}: a standard error needs at least 2.")

  if isinstance(model, nnx.Module):
    raise UsageError(
      f"model is a {type(model).__name__}, which has its values already: give a "
      "function that makes one from random streams, such as lambda rngs: "
      f"{type(model).__name__}(..., rngs=rngs)."
    )

  def measure_seed(key: jax.Array, inputs: jax.Array) -> Signal:
    init_key, key = jax.random.split(key)
    if not isinstance(model, nn.Module):
      parts = nnx.split(model(nnx.Rngs(init_key)))
      return inside_nnx.measure(*parts, inputs, blocks, loss, key, arguments)
    args, kwargs = blocks_lib.call_arguments(model, inputs, arguments)
    variables = model.init(init_key, *args, **kwargs)
    return _measure(model, variables, inputs, blocks, loss, key, arguments)

  keys = jax.random.split(jax.random.key(0) if key is None else key, num_seeds)
  signals = jax.jit(
    lambda keys, inputs: jax.lax.map(lambda key: measure_seed(key, inputs), keys)
  )(keys, inputs)
  return Ensemble(to_numpy(probes.with_unknown(signals)))


Function = Callable[[Any], Any]


def signal_of_functions(
  blocks: Sequence[Function],
  x: jax.Array,
  *,
  branches: Sequence[Function] | None = None,
  head: Function | None = None,
  loss: Callable[[Any], jax.Array] | None = None,
  names: Sequence[str] | None = None,
  key: jax.Array | None = None,
) -> Signal:
  """Measures the signal of a network that is given as functions.

  So it is a network of any framework whose blocks JAX can differentiate.

  Args:
    blocks: the residual blocks, each a function of the stream [N, ..., channels]. A
      function for one example is given under `jax.vmap`.
    x: the first block's input, of at least two examples: behind a stem or embedding.
    branches: for each block what it adds to the skip path, a function of the block's
      input; None: what a block returns less what it takes, where shapes are equal.
    head: what stands behind the last block; None: nothing.
    loss: scalar function of the output; None: as in `signal`.
    names: the blocks' names; None: their numbers, from 1.
    key: for the noise that stands for a loss; None: `jax.random.key(0)`.

  Returns:
    The signal of d blocks.

  Raises:
    UsageError: there are no blocks, or not as many branches or names; fewer than two
      examples; or what a block returns are no features.
  """
  for kind, functions in (("blocks", blocks), ("branches", branches)):
    if functions is not None and not (
      isinstance(functions, Sequence) and all(map(callable, functions))
    ):
      raise UsageError(
        f"{kind} is {functions!r}: it must be a list of functions, one for each block."
      )
  for kind, given in (("branches", branches), ("names", names)):
    if given is not None and len(given) != len(blocks):
      raise UsageError(
        f"{kind} has {len(given)} entries: there are {len(blocks)} blocks."
      )
  if not blocks:
    raise UsageError("blocks is empty: give the functions of the residual blocks.")
  if names is None:
    names = [str(number) for number in range(1, len(blocks) + 1)]
  x = jnp.asarray(x)
  probes.require_examples(x)
  probes.require_features(names[0], input=x)
  key = jax.random.key(0) if key is None else key

  def run(x: jax.Array, slots: Sequence[Any], key: jax.Array) -> Any:
    records = []
    for index, (name, block, of_block) in enumerate(
      zip(names, blocks, slots, strict=True)
    ):
      x = probes.probe(x, of_block["input"])
      y = block(x)
      probes.require_features(name, output=y)
      y = probes.probe(y, of_block["output"], of_block["spread"])
      # What the branch adds is recorded, and not differentiated.
      parts = {} if branches is None else {"branch": branches[index](x)}
      if parts and parts["branch"].shape == y.shape:
        parts["skip"] = y - parts["branch"]
      records.append(probes.record(x, y, parts))
      x = y
    # The same noise as that of a module.
    noise = None if loss is not None else jax.random.split(key)[1]
    x = probes.end(x, slots[-1]["end"], jnp.array(True), noise)
    return x if head is None else head(x), records

  @jax.jit
  def measured(x: jax.Array, key: jax.Array) -> Signal:
    slots = [probes.slots(x) for _ in blocks]
    gradients, records, elasticity = probes.differentiate(
      lambda slots: run(x, slots, key), slots, loss
    )
    pairs = zip(records, gradients, strict=True)
    full = [record | {"gradient": gradient} for record, gradient in pairs]
    return probes.assemble(names, full, elasticity)

  return probes.with_unknown(measured(x, key))


def _measure(
  model: nn.Module,
  variables: Mapping[str, Any],
  inputs: Any,
  blocks: Blocks,
  loss: Callable[[Any], jax.Array] | None,
  key: jax.Array,
  arguments: Mapping[str, Any],
) -> Signal:
  args, kwargs = blocks_lib.call_arguments(model, inputs, arguments)
  probes.require_examples(inputs)
  model_key, noise_key = jax.random.split(key)
  mutable = [name for name in variables if name != "params"] + [_COLLECTION]

  def run(slots: Mapping[str, Any], interceptor: Any) -> tuple[Any, Any]:
    with nn.intercept_methods(interceptor):
      outputs, state = model.apply(
        {**variables, _COLLECTION: slots},
        *args,
        rngs=model_key,
        mutable=mutable,
        **kwargs,
      )
    return outputs, state.get(_COLLECTION, {})

  finder = _Finder(blocks)
  _, slots = jax.eval_shape(lambda: run({}, finder))
  calls = finder.found()
  slots = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), slots)
  # A scan's last turn is its last block.
  last = calls[-1]
  place = _at(slots, last)
  place["last"] = place["last"].at[(-1,) * place["last"].ndim].set(1)
  noise = None if loss is not None else noise_key

  gradients, state, head = probes.differentiate(
    lambda slots: run(slots, _Recorder(blocks, finder.transformed, last, noise)),
    slots,
    loss,
  )
  return blocks_lib.gather(
    {
      call: _at(state, call, _RECORD) | {"gradient": _at(gradients, call)}
      for call in calls
    },
    finder.bodies,
    head,
  )


def _at(tree: Mapping[str, Any], call: Call, kind: str = _SLOTS) -> Any:
  path, number = call
  return functools.reduce(lambda node, name: node[name], path, tree)[f"{kind}{number}"]


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
    self._calls: dict[Call, None] = {}
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
    # A scope itself would leak the tracers that it holds.
    self.bodies[path] = weakref.ref(module.scope.root)
    self._active.append(path)
    output = run(*args, **kwargs)
    self._active.pop()
    if path not in self.transformed or path in self._active:
      self._make_slots(
        module,
        blocks_lib.stream(type(module), "/".join(module.path), args, kwargs)[0],
        output,
      )
    return output

  def _make_slots(self, module: nn.Module, x: Any, output: Any) -> None:
    name = "/".join(module.path)
    y = blocks_lib.first(output)
    probes.require_features(name, input=x, output=y)
    if not module.is_mutable_collection(_COLLECTION):
      raise UsageError(
        f"Block {name!r} is inside a scan that withholds new variables: add "
        f'"{_COLLECTION}": 0 to its variable_axes.'
      )
    number = _calls_before(module, _SLOTS)
    self._calls[module.path, number] = None
    module.put_variable(_COLLECTION, f"{_SLOTS}{number}", probes.slots(y))

  def found(self) -> list[Call]:
    """Returns the blocks' calls, or raises a UsageError if there are none."""
    if not self._calls:
      raise blocks_lib.none_found(self.blocks, self._classes)
    return list(self._calls)


def _calls_before(module: nn.Module, kind: str) -> int:
  """Returns how often a block was called before, by the variables that it has."""
  # A scope is new for each trace of a transformation; a counter here would not be.
  numbers = itertools.count()
  return next(n for n in numbers if not module.has_variable(_COLLECTION, f"{kind}{n}"))


class _Recorder:
  """Interceptor that records the blocks' statistics and probes the gradient."""

  def __init__(
    self,
    blocks: Blocks,
    transformed: set[Path],
    last: Call,
    noise_key: jax.Array | None,
  ) -> None:
    self.blocks = blocks
    self.transformed = transformed
    self.last = last
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
    elif called and isinstance(module, blocks_lib.NORMALIZERS):
      seen.setdefault(
        "moving_variance", blocks_lib.normalizer_variance(module, args[0])
      )
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
    number = _calls_before(module, _RECORD)
    slots: dict[str, Any] = module.get_variable(_COLLECTION, f"{_SLOTS}{number}")
    x, replaced = blocks_lib.stream(type(module), "/".join(module.path), args, kwargs)
    x = probes.probe(x, slots["input"])
    args, kwargs = replaced(x)
    seen: dict[str, jax.Array] = {}
    self._open.append((module.path, seen))
    output = run(*args, **kwargs)
    self._open.pop()
    y = probes.probe(blocks_lib.first(output), slots["output"], slots["spread"])
    # What is seen is alpha and a normalizer's variance, where there are such, beside
    # skip path and branch.
    record = probes.record(x, y, seen)
    module.put_variable(_COLLECTION, f"{_RECORD}{number}", record)
    if (module.path, number) == self.last:
      y = probes.end(y, slots["end"], slots["last"] > 0, self.noise_key)
    return (y, *output[1:]) if isinstance(output, tuple) else y
