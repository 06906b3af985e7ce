"""Variables of Linen networks for NNX ones, and back."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict

from skipinit_jax.errors import UsageError, misfit

# Linen's collections, as the types of NNX.
_TYPES: dict[str, type[nnx.Variable[Any]]] = {
  "params": nnx.Param,
  "batch_stats": nnx.BatchStat,
}


def to_linen(model: nnx.Module | nnx.State) -> dict[str, Any]:
  """Returns parameters and batch statistics as variables of the Linen twin.

  Names and shapes are the same on both sides, so it serves any two networks whose
  modules are named alike, such as `nnx.WideResNet` and `models.WideResNet` with the
  same `scan`. For the other one, see `models.unroll_variables`.

  Args:
    model: an NNX network, or its state.

  Returns:
    Variables, by collection: "params" and, where there are any, "batch_stats".
  """
  state = model if isinstance(model, nnx.State) else nnx.state(model)
  variables = {}
  for collection, kind in _TYPES.items():
    if values := nnx.to_pure_dict(nnx.filter_state(state, kind)):
      variables[collection] = values
  return variables


def from_linen(model: nnx.Module, variables: Mapping[str, Any]) -> None:
  """Gives an NNX network the parameters and batch statistics of its Linen twin.

  See `to_linen`. What a network has besides, such as random keys, stays.

  Args:
    model: the network, which is changed.
    variables: variables of the twin. Its collections "params" and "batch_stats" are
      read.

  Raises:
    UsageError: the variables have other names or shapes than the network's.
  """
  given = {name: variables[name] for name in _TYPES if name in variables}
  if problem := misfit(*map(_shapes, (to_linen(model), given))):
    raise UsageError(
      f"The variables do not fit the network: {problem} (stacks that are scanned and "
      "stacks that are written out differ: see models.scan_variables)."
    )
  state = nnx.state(model, tuple(_TYPES.values()))
  for tree in given.values():
    # NNX would update an array of NumPy in place, and so the caller's.
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, tree))
  nnx.update(model, state)


def _shapes(variables: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  flat = flatten_dict(variables, sep="/")
  return {name: tuple(leaf.shape) for name, leaf in flat.items()}
