"""How the branches of an NNX network's blocks are scaled.

As where it is measured, a copy runs, whose modules have a `__call__` around theirs.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from skipinit_jax.analysis import blocks as blocks_lib
from skipinit_jax.analysis import inside_nnx
from skipinit_jax.analysis.blocks import Call, Path
from skipinit_jax.analysis.branches import Observe, Scaler
from skipinit_jax.compilation import compiler_options

_RECORD = "_repair_record"
# The parts of what `Scaler.scale` returns, in its order.
_NAMES = ("factor", "skip", "output", "growth")


class _Record(nnx.Variable[Any]):
  """What scaling a block came to."""


def scaling(
  model: nnx.Module, inputs: Any, scaler: Scaler, arguments: Mapping[str, Any]
) -> tuple[list[Call], int, Callable[[float], Any]]:
  """Returns the blocks' calls, how many blocks they are, and what scales them."""
  graphdef, state = nnx.split(model)
  calls: list[Call] = []

  def records(state: Any, share: jax.Array) -> list[jax.Array]:
    scaler.share = share
    watcher = _Watcher(scaler)
    _, modules = inside_nnx.run_watched(watcher, graphdef, state, inputs, arguments)
    calls[:] = watcher.calls
    return [getattr(modules[path], f"{_RECORD}{number}")[...] for path, number in calls]

  shapes = jax.eval_shape(records, state, jnp.float32(1))
  depth = sum(int(np.prod(shape.shape[:-1])) for shape in shapes)
  scaled = jax.jit(records, compiler_options=compiler_options())

  def by_name(share: float) -> list[dict[str, np.ndarray]]:
    return [
      {
        "factor": record[..., 0],
        "skip": record[..., 1],
        "output": record[..., 2],
        "growth": record[..., 3:],
      }
      for record in map(np.asarray, jax.device_get(scaled(state, jnp.float32(share))))
    ]

  return calls, depth, by_name


class _Watcher:
  """Scales the blocks whose calls it sees."""

  def __init__(self, scaler: Scaler) -> None:
    self._scaler = scaler
    self.calls: dict[Call, None] = {}
    self._observe: tuple[Path, Observe] | None = None

  def watch(self, model: nnx.Module) -> dict[Path, nnx.Module]:
    """Watches a model's modules, and returns the blocks by their paths."""
    found: dict[Path, nnx.Module] = {}
    for path, module in inside_nnx.modules_by_path(model):
      is_block = self._scaler.blocks.selects(module, path)
      if is_block:
        found[path] = module
      if is_block or _own(module) or path[-1:] == (self._scaler.blocks.shortcut,):
        module._signal_path = path
        module._signal_block = is_block
        kind: Any = type(module)
        object.__setattr__(module, "__class__", inside_nnx.watched(kind))
    return found

  def merged(self, shortcut: jax.Array, branch: jax.Array) -> None:
    """Sees what a block of this package adds, which its program says too."""

  def call(self, module: Any, run: Any, args: Any, kwargs: Any) -> Any:
    """Calls a watched module."""
    path = module._signal_path
    if self._observe is not None:
      block, observe = self._observe
      output = run(*args, **kwargs)
      inner = path[len(block) :]
      return observe(inner, _own(module), output) if inner else output
    if not module._signal_block:
      return run(*args, **kwargs)
    number = 0
    while hasattr(module, f"{_RECORD}{number}"):
      number += 1
    self.calls[path, number] = None
    x, replaced = blocks_lib.stream(type(module), "/".join(path), args, kwargs)
    graphdef, state = nnx.split(module)

    def call(x: jax.Array, observe: Observe) -> Any:
      args, kwargs = replaced(x)
      # Its variables belong to this trace, so that the block may update them.
      copy: Any = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
      self._observe = path, observe
      try:
        return copy(*args, **kwargs)
      finally:
        self._observe = None

    output, record = self._scaler.scale(path, call, x)
    values = jnp.concatenate([jnp.atleast_1d(record[name]) for name in _NAMES])
    setattr(module, f"{_RECORD}{number}", _Record(values))
    return output


def _own(module: nnx.Module) -> dict[str, int]:
  """Returns the names and ranks of a module's own parameters."""
  return {
    name: value.ndim
    for name, value in vars(module).items()
    # A layer without bias may have a parameter that is None.
    if isinstance(value, nnx.Param) and hasattr(value, "ndim")
  }
