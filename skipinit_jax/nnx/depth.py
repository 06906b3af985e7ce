"""Stacks of equal blocks, as one `nnx.scan`."""

from typing import Any

import jax
from flax import nnx

from skipinit_jax.methods import ModuleFactory
from skipinit_jax.models.depth import PerBlock, of_block, require_same_type
from skipinit_jax.models.stochastic_depth import BranchDrop, dropping


class DepthStack(nnx.Module):
  """Equal blocks, one after the other: see `models.DepthStack`.

  Under `scan` the blocks are made by one `nnx.vmap` and run by one `nnx.scan`: program
  size and compile time are those of one block, and every variable of `blocks` has a
  leading axis over them. Written out, the blocks are `block0`, `block1`, ...
  """

  def __init__(
    self,
    block: ModuleFactory,
    num_blocks: int,
    *,
    scan: bool = True,
    remat: bool = False,
    rngs: nnx.Rngs,
  ) -> None:
    """Makes the blocks.

    Args:
      block: factory of the block, called as `block(rngs=rngs)`; it keeps the shape.
      num_blocks: how many blocks; none returns the input.
      scan: whether to scan over the blocks, or to write them out.
      remat: whether to compute each block's activations again in the backward pass.
      rngs: the blocks' random numbers.
    """
    self.num_blocks = num_blocks
    self.scan = scan
    self.remat = remat
    if not scan:
      for index in range(num_blocks):
        setattr(self, f"block{index}", block(rngs=rngs))
    elif num_blocks:
      split = nnx.split_rngs(splits=num_blocks)
      make = nnx.vmap(lambda rngs: block(rngs=rngs), in_axes=0, out_axes=0)
      self.blocks = split(make)(rngs)

  def __call__(
    self,
    x: jax.Array,
    per_block: PerBlock | None = None,
    drops: BranchDrop | None = None,
  ) -> jax.Array:
    """Applies the blocks to x, whose shape they keep.

    Args:
      per_block: [num_blocks], each block's second argument; None: blocks take x alone.
      drops: [num_blocks], how each drops its branch; None: none does.
    """
    own = (per_block, drops)
    if self.num_blocks == 0:
      return x
    if not self.scan:
      apply = nnx.remat(apply_block) if self.remat else apply_block
      for index in range(self.num_blocks):
        x = apply(x, getattr(self, f"block{index}"), of_block(own, index))
      return x
    apply = _apply_scanned
    if self.remat:
      # A scan already keeps XLA from merging the two computations.
      apply = nnx.remat(apply, prevent_cse=False)
    scanned = nnx.scan(apply, in_axes=(nnx.Carry, 0, 0), out_axes=nnx.Carry)
    y: jax.Array = scanned(x, self.blocks, own)
    return y


def apply_block(x: jax.Array, block: Any, own: Any) -> jax.Array:
  """Applies a block to x and to its part of what all blocks have."""
  argument, drop = own
  with dropping(drop):
    y: jax.Array = block(x) if argument is None else block(x, argument)
    return y


def _apply_scanned(x: jax.Array, block: Any, own: Any) -> jax.Array:
  return require_same_type(x, apply_block(x, block, own))
