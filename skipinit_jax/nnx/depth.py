"""Stacks of equal blocks, as one `nnx.scan`."""

import jax
from flax import nnx

from skipinit_jax.methods import ModuleFactory
from skipinit_jax.models.depth import PerBlock, apply_block, apply_scanned, of_block
from skipinit_jax.models.stochastic_depth import BranchDrop


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
        x = apply(getattr(self, f"block{index}"), x, of_block(own, index))
      return x
    apply = apply_scanned
    if self.remat:
      # A scan already keeps XLA from merging the two computations.
      apply = nnx.remat(apply, prevent_cse=False)
    scanned = nnx.scan(apply, in_axes=(0, nnx.Carry, 0), out_axes=nnx.Carry)
    y: jax.Array = scanned(self.blocks, x, own)
    return y
