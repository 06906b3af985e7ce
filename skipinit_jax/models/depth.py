"""Stacks of equal residual blocks whose compile time does not grow with depth."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from skipinit_jax.methods import ModuleFactory

Variables = Mapping[str, Any]
Constants = jax.Array | np.ndarray
_SCANNED = "blocks"
_UNROLLED = "block"


class DepthStack(nn.Module):
  """Equal blocks, one after the other.

  Under `scan` the blocks are one `flax.linen.scan`: program size and compile time
  are those of one block, and every variable has a leading axis over the blocks.
  `unroll_variables` and `scan_variables` translate between the two forms.

  Attributes:
    block: factory of the block, called as `block(name=...)`; it keeps the shape.
    num_blocks: how many blocks; none returns the input.
    scan: whether to scan over the blocks, or to write them out.
    remat: whether to recompute a block's activations in the backward pass, so
      that only the blocks' inputs are kept.
  """

  block: ModuleFactory
  num_blocks: int
  scan: bool = True
  remat: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, constants: Constants | None = None) -> jax.Array:
    """Applies the blocks to x, whose shape they keep.

    Args:
      x: what the first block takes.
      constants: [num_blocks], what distinguishes the blocks from each other: each takes
        its own number as its second argument; None: they have none.
    """

    def apply(block: Any, x: jax.Array, constant: Any) -> jax.Array:
      return block(x) if constant is None else block(x, constant)

    if self.remat:
      # A scan already keeps XLA from merging the two computations.
      apply = nn.remat(apply, prevent_cse=not self.scan)
    if self.num_blocks == 0:
      return x
    if not self.scan:
      for index in range(self.num_blocks):
        constant = None if constants is None else constants[index]
        x = apply(self.block(name=f"{_UNROLLED}{index}"), x, constant)
      return x
    scanned = nn.scan(
      lambda block, x, constant: (apply(block, x, constant), None),
      # Every collection and every random stream, so that a user's own block may
      # have any.
      variable_axes={True: 0},
      split_rngs={True: True},
      length=self.num_blocks,
    )
    return scanned(self.block(name=_SCANNED), x, constants)[0]


def unroll_variables(variables: Variables) -> dict[str, Any]:
  """Turns variables of scanned stacks into those of unrolled ones.

  Args:
    variables: variables of a model with `scan=True`.

  Returns:
    The variables of the same model with `scan=False`: the same function.
  """
  unrolled: dict[str, Any] = {}
  for key, value in variables.items():
    if key == _SCANNED:
      length = jax.tree.leaves(value)[0].shape[0]
      for index in range(length):
        block = jax.tree.map(lambda leaf, index=index: leaf[index], value)
        unrolled[f"{_UNROLLED}{index}"] = block
    else:
      unrolled[key] = unroll_variables(value) if isinstance(value, Mapping) else value
  return unrolled


def scan_variables(variables: Variables) -> dict[str, Any]:
  """Turns variables of unrolled stacks into those of scanned ones.

  Args:
    variables: variables of a model with `scan=False`.

  Returns:
    The variables of the same model with `scan=True`: the same function.
  """
  names = [f"{_UNROLLED}{index}" for index in range(len(variables))]
  if names and set(names) == set(variables):
    blocks = [variables[name] for name in names]
    return {_SCANNED: jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}
  return {
    key: scan_variables(value) if isinstance(value, Mapping) else value
    for key, value in variables.items()
  }


def is_stacked(path: tuple[Any, ...]) -> bool:
  """Tells whether a variable has a leading axis over the blocks of a stack.

  Args:
    path: the variable's path, as `jax.tree_util.tree_map_with_path` gives it.
  """
  return any(getattr(key, "key", None) == _SCANNED for key in path)
