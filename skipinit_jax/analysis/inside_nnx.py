"""How the calls of an NNX network's blocks are seen, and what is recorded of them.

The network that runs is a copy, whose blocks have another class, that of the network's
with a `__call__` around theirs. What is measured leaves a block as variables of its
own, as in `sow` and `perturb` of NNX, so that `nnx.scan` stacks it.
"""

import contextvars
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import tracers

from skipinit_jax import nnx as native
from skipinit_jax.analysis import blocks as blocks_lib
from skipinit_jax.analysis import probes
from skipinit_jax.analysis.blocks import Blocks, Call, Path
from skipinit_jax.analysis.signal import Signal
from skipinit_jax.errors import UsageError

_SLOTS = "_signal_slots"
_RECORD = "_signal_record"


class _Slots(nnx.Variable[Any]):
  """A block's slots, one after the other."""


class _Record(nnx.Variable[Any]):
  """The leaves of a block's record, one after the other."""


def measure(
  graphdef: Any,
  state: Any,
  inputs: Any,
  blocks: Blocks,
  loss: Callable[[Any], jax.Array] | None,
  key: jax.Array,
  arguments: Mapping[str, Any],
) -> Signal:
  """Measures the signal of an NNX network, given as its parts."""
  probes.require_examples(inputs)
  noise_key = None if loss is not None else jax.random.split(key)[1]

  def run(watcher: _Watcher) -> tuple[Any, dict[Call, jax.Array]]:
    outputs, modules = run_watched(watcher, graphdef, state, inputs, arguments)
    return outputs, watcher.left(modules)

  finder = _Watcher(blocks)
  _, shapes = jax.eval_shape(lambda: run(finder))
  if not finder.calls:
    raise blocks_lib.none_found(blocks, finder.classes)
  calls = list(finder.calls)
  turns = [jnp.zeros(shapes[call].shape[:-1]) for call in calls]
  slots = [dict.fromkeys(probes.SLOTS, zeros) for zeros in turns]
  # A scan's last turn is its last block.
  slots[-1]["last"] = turns[-1].at[(-1,) * turns[-1].ndim].set(1)
  structures: dict[Call, Any] = {}

  def measured(slots: Any) -> tuple[Any, list[jax.Array]]:
    stacked = {
      call: jnp.stack([of_call[name] for name in probes.SLOTS], -1)
      for call, of_call in zip(calls, slots, strict=True)
    }
    recorder = _Watcher(blocks, stacked, calls[-1], noise_key)
    outputs, leaves = run(recorder)
    structures.update(recorder.structures)
    return outputs, [leaves[call] for call in calls]

  gradients, records, head = probes.differentiate(measured, slots, loss)
  full = {}
  for call, leaves, gradient in zip(calls, records, gradients, strict=True):
    record = jax.tree.unflatten(structures[call], list(jnp.moveaxis(leaves, -1, 0)))
    full[call] = record | {"gradient": gradient}
  return blocks_lib.gather(full, finder.bodies, head)


class _Watcher:
  """Sees the calls of blocks and of what is inside of them.

  Without slots it finds the blocks, and leaves slots in them for their shapes.
  """

  def __init__(
    self,
    blocks: Blocks,
    slots: Mapping[Call, jax.Array] | None = None,
    last: Call | None = None,
    noise_key: jax.Array | None = None,
  ) -> None:
    self.blocks = blocks
    self.slots = slots
    self.last = last
    self.noise_key = noise_key
    self.calls: dict[Call, None] = {}
    # What a block is called within: the network, or the body of a scan.
    self.bodies: dict[Path, Any] = {}
    self.classes: dict[str, str] = {}
    self.structures: dict[Call, Any] = {}
    self._traces: list[Any] = []
    # For each block being called: its path and what was seen inside of it.
    self._open: list[tuple[Path, dict[str, jax.Array]]] = []

  def watch(self, model: nnx.Module) -> dict[Path, nnx.Module]:
    """Watches a model's modules, and returns the blocks by their paths."""
    found: dict[Path, nnx.Module] = {}
    children = {self.blocks.shortcut, *self.blocks.branch}
    for path, module in modules_by_path(model):
      # Numbers become wildcards: a thousand blocks are one name.
      pattern = re.sub(r"\d+", "*", "/".join(path))
      self.classes[pattern] = type(module).__name__
      is_block = self.blocks.selects(module, path)
      if is_block:
        found[path] = module
      is_child = bool(children.intersection(path[-1:]))
      if is_block or is_child or isinstance(module, blocks_lib.NORMALIZERS):
        module._signal_path, module._signal_block = path, is_block
        kind: Any = type(module)
        object.__setattr__(module, "__class__", watched(kind))
    for (path, number), slots in (self.slots or {}).items():
      setattr(found[path], f"{_SLOTS}{number}", _Slots(slots))
    return found

  def left(self, modules: Mapping[Path, nnx.Module]) -> dict[Call, jax.Array]:
    """Returns what was left in each block."""
    kind = _SLOTS if self.slots is None else _RECORD
    values = {}
    for path, number in self.calls:
      variable = getattr(modules[path], f"{kind}{number}", None)
      if variable is None:
        raise UsageError(
          f"Block {'/'.join(path)!r} is inside a loop that drops what it writes, such "
          "as jax.lax.scan over a state: use nnx.scan over the blocks."
        )
      values[path, number] = variable[...]
    return values

  def call(self, module: Any, run: Any, args: Any, kwargs: Any) -> Any:
    """Calls a watched module."""
    if module._signal_block:
      return self._block(module, run, args, kwargs)
    if not self._open:
      return run(*args, **kwargs)
    (block, seen), path = self._open[-1], module._signal_path
    if isinstance(module, blocks_lib.NORMALIZERS):
      seen.setdefault(
        "moving_variance", blocks_lib.normalizer_variance(module, args[0])
      )
    output = run(*args, **kwargs)
    if path[:-1] == block:
      if path[-1] == self.blocks.shortcut:
        seen["skip"] = output
      elif path[-1] in self.blocks.branch:
        seen["branch"] = output
        alpha = getattr(module, "alpha", None)
        # A module of a user's own may learn one for each channel.
        if isinstance(alpha, nnx.Param) and alpha[...].size == 1:
          seen["alpha"] = alpha[...].reshape(()).astype(jnp.float32)
    return output

  def merged(self, shortcut: jax.Array, branch: jax.Array) -> None:
    """Sees what a block of this package adds."""
    if self._open:
      self._open[-1][1].update(skip=shortcut, branch=branch)

  def _block(self, module: Any, run: Any, args: Any, kwargs: Any) -> Any:
    path, name = module._signal_path, "/".join(module._signal_path)
    kind = _SLOTS if self.slots is None else _RECORD
    number = 0
    while hasattr(module, f"{kind}{number}"):
      number += 1
    self.calls[path, number] = None
    x, replaced = blocks_lib.stream(type(module), name, args, kwargs)
    probes.require_features(name, input=x)
    slots = None
    if self.slots is not None:
      values = getattr(module, f"{_SLOTS}{number}")[...]
      slots = dict(zip(probes.SLOTS, values, strict=True))
      x = probes.probe(x, slots["input"])
    args, kwargs = replaced(x)
    seen: dict[str, jax.Array] = {}
    self._open.append((path, seen))
    output = run(*args, **kwargs)
    self._open.pop()
    y = blocks_lib.first(output)
    probes.require_features(name, output=y)
    if slots is None:
      self.bodies[path] = self._body()
      setattr(module, f"{_SLOTS}{number}", _Slots(jnp.zeros(len(probes.SLOTS))))
      return output
    y = probes.probe(y, slots["output"], slots["spread"])
    leaves, structure = jax.tree.flatten(probes.record(x, y, seen))
    self.structures[path, number] = structure
    setattr(module, f"{_RECORD}{number}", _Record(jnp.stack(leaves)))
    if (path, number) == self.last:
      y = probes.end(y, slots["end"], slots["last"] > 0, self.noise_key)
    return (y, *output[1:]) if isinstance(output, tuple) else y

  def _body(self) -> Any:
    """Returns an object that stands for what is being traced."""
    trace = tracers.current_jax_trace()
    if trace not in self._traces:
      self._traces.append(trace)
    return self._traces[self._traces.index(trace)]


def modules_by_path(model: nnx.Module) -> list[tuple[Path, Any]]:
  """Returns a network and its modules, each with its path."""
  # Flax 0.10 has no `nnx.iter_modules`.
  return [
    (tuple(map(str, path)), node)
    for path, node in nnx.iter_graph(model)
    if isinstance(node, nnx.Module)
  ]


_present: contextvars.ContextVar[Any] = contextvars.ContextVar("watcher")


def run_watched(
  watcher: Any, graphdef: Any, state: Any, inputs: Any, arguments: Mapping[str, Any]
) -> tuple[Any, dict[Path, nnx.Module]]:
  """Runs a network, given as its parts, and returns its outputs and its blocks.

  Args:
    watcher: who sees the calls of watched modules: it has `watch`, `call` and `merged`,
      as above.
  """
  # Its variables belong to this trace, so that the model may update them.
  model = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
  modules = watcher.watch(model)
  args, kwargs = blocks_lib.call_arguments(model, inputs, arguments)
  token = _present.set(watcher)
  try:
    return model(*args, **kwargs), modules
  finally:
    _present.reset(token)


@functools.cache
def watched(kind: Any) -> Any:
  """Returns a class of modules whose calls the present watcher sees."""

  def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
    run = functools.partial(kind.__call__, self)
    return _present.get().call(self, run, args, kwargs)

  def merge(self: Any, shortcut: jax.Array, branch: jax.Array) -> Any:
    _present.get().merged(shortcut, branch)
    return kind.merge(self, shortcut, branch)

  methods: dict[str, Any] = {"__call__": functools.wraps(kind.__call__)(__call__)}
  if issubclass(kind, native.ResidualBlock):
    methods["merge"] = merge
  metaclass: Any = type(kind)
  derived: type[Any] = metaclass(kind.__name__, (kind,), methods)
  return derived
