"""Which modules are the blocks, and what their calls share in Linen and in NNX."""

import dataclasses
import fnmatch
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from skipinit_jax import layers, models
from skipinit_jax import nnx as native
from skipinit_jax.analysis import probes
from skipinit_jax.analysis.signal import Signal, block_names
from skipinit_jax.errors import UsageError, unknown_name
from skipinit_jax.layers.normalization import normalize_sub_batches

Path = tuple[str, ...]
Call = tuple[Path, int]
"""A block's path, and how often it was called before."""


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Which modules of a network are its residual blocks, and what they add.

  A block's first argument is the stream's features, and so is its result, or the first
  of several; channels are last. A block that is called several times, with the same
  weights, counts as several.

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

  select: type[Any] | tuple[type[Any], ...] | str = (
    models.ResidualBlock,
    native.ResidualBlock,
  )
  shortcut: str = "projection"
  branch: tuple[str, ...] = ("branch_scale", "branch_bias")

  def __contains__(self, module: nn.Module) -> bool:
    return self.selects(module, module.path)

  def selects(self, module: Any, path: Path) -> bool:
    """Tells whether a module at this path is one of the blocks."""
    if not isinstance(self.select, str):
      return isinstance(module, self.select)
    patterns = self.select.split("/")
    return len(patterns) == len(path) and all(map(fnmatch.fnmatchcase, path, patterns))


def none_found(blocks: Blocks, classes: Mapping[str, str]) -> UsageError:
  """Returns the error for a network in which no block is called.

  Args:
    classes: the names of the modules' classes, by their paths.
  """
  select = blocks.select
  modules = {path: kind for path, kind in classes.items() if path}
  if not modules:
    return UsageError(
      "The network has no modules inside, so no blocks: give the blocks as functions "
      "to analysis.diagnose_functions."
    )
  if isinstance(select, str):
    return unknown_name("block", select, modules)
  kinds = select if isinstance(select, tuple) else (select,)
  wanted = " or ".join(dict.fromkeys(kind.__name__ for kind in kinds))
  present = ", ".join(sorted(set(modules.values())))
  return UsageError(
    f"The network has no residual blocks of class {wanted}: select them by one of "
    f"its modules' classes ({present}) or by a pattern of their paths."
  )


def call_arguments(
  model: Any, inputs: Any, arguments: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
  """Returns a call's arguments, positional and by name."""
  if not isinstance(model, nn.Module | nnx.Module):
    raise UsageError(
      f"model is a {type(model).__name__}, no Flax module: give its blocks as "
      "functions to analysis.diagnose_functions."
    )
  names = inspect.signature(type(model).__call__).parameters
  if isinstance(inputs, Mapping) and all(name in names for name in inputs):
    return (), {**inputs, **arguments}
  return (inputs,), dict(arguments)


def stream(
  kind: type[Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]]:
  """Returns a block's first argument, and the arguments with another in its place.

  Args:
    kind: the block's class.
    name: its name, for errors.
  """
  if args:
    return args[0], lambda x: ((x, *args[1:]), dict(kwargs))
  # `self` is the first.
  for argument in list(inspect.signature(kind.__call__).parameters)[1:]:
    if argument in kwargs:
      return kwargs[argument], lambda x, argument=argument: (
        (),
        {**kwargs, argument: x},
      )
  raise UsageError(f"Block {name!r} is called without an argument.")


def first(output: Any) -> Any:
  """Returns a block's output, or the first of several."""
  return output[0] if isinstance(output, tuple) else output


NORMALIZERS = (
  nn.BatchNorm,
  nnx.BatchNorm,
  layers.GhostBatchNorm,
  native.GhostBatchNorm,
)
"""The classes of batch normalization, whose moving variance is known."""


def normalizer_variance(module: Any, x: jax.Array) -> jax.Array:
  """Returns what the moving variance of a batch normalization of x converges to."""
  x = probes.wide(x)
  if isinstance(module, layers.GhostBatchNorm | native.GhostBatchNorm):
    one = jnp.ones(x.shape[-1])
    return normalize_sub_batches(x, module.ghost_batch_size, one, one, 1.0)[2].mean()
  return probes.variance(x)


def gather(
  records: Mapping[Call, probes.Record], bodies: Mapping[Path, object], head: jax.Array
) -> Signal:
  """Brings the records of all calls into one row of blocks, in their order."""
  names: list[str] = []
  # Blocks in the body of one scan take turns.
  order: list[int] = []

  def stacked(call: Call) -> Any:
    # Leading axes are those of the scans around a block.
    return records[call]["output"]["cosine"]

  for _, group in itertools.groupby(
    records, lambda call: (id(bodies[call[0]]), stacked(call).shape)
  ):
    calls, start = list(group), len(names)
    count = stacked(calls[0]).size
    of_calls = [
      [
        name + (f" (call {number + 1})" if (path, 1) in records else "")
        for name in block_names(path, count if stacked((path, number)).ndim else None)
      ]
      for path, number in calls
    ]
    for index in range(count):
      for position, of_call in enumerate(of_calls):
        names.append(of_call[index])
        order.append(start + position * count + index)
  return probes.assemble(names, list(records.values()), head, order)
