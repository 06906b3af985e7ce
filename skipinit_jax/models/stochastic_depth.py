"""Stochastic depth: branches that are left out at random (Huang et al., ECCV 2016)."""

import contextlib
import contextvars
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn


class BranchDrop(NamedTuple):
  """How residual branches are left out, of one block or of several along an axis.

  Attributes:
    rate: the probability for each example.
    key: the random key.
  """

  rate: jax.Array | np.ndarray
  key: jax.Array


def branch_drops(
  module: nn.Module, rate: float, stage_blocks: Sequence[int], *, train: bool
) -> list[BranchDrop] | list[None]:
  """Returns how the blocks of a network drop their branches, stage by stage.

  Huang et al., section 3: the l-th of L blocks is left out with probability l / L times
  the rate. Keys come from the stream "dropout" and go with the blocks: masks do not
  depend on how the stack is computed, scanned or not.

  Args:
    module: the network, inside of its `__call__`.
    rate: the last block's probability.
    stage_blocks: the blocks of each stage.

  Returns:
    For each stage, arrays over its blocks; None where no branch is dropped.
  """
  if not rate or not train or module.is_initializing():
    return [None] * len(stage_blocks)
  return split_drops(module.make_rng("dropout"), rate, stage_blocks)


def split_drops(
  key: jax.Array, rate: float, stage_blocks: Sequence[int]
) -> list[BranchDrop]:
  """As `branch_drops` in training, with the key of all blocks."""
  num_blocks = sum(stage_blocks)
  rates = rate * np.arange(1, num_blocks + 1, dtype=np.float32) / num_blocks
  keys = jax.random.split(key, num_blocks)
  ends = np.cumsum([0, *stage_blocks])
  return [
    BranchDrop(rates[start:end], keys[start:end])
    for start, end in itertools.pairwise(ends)
  ]


_dropped: contextvars.ContextVar[tuple[BranchDrop, Iterator[int]] | None] = (
  contextvars.ContextVar("dropped", default=None)
)


@contextlib.contextmanager
def dropping(drop: BranchDrop | None) -> Iterator[None]:
  """Drops the branches of residual blocks in this context, example by example.

  A branch that stays is divided by its probability, so that the expectation stays.

  Args:
    drop: how a block does it. The several `ResidualBlock`s of one, such as an
      `EncoderBlock`, have the same rate and masks of their own.
  """
  token = _dropped.set(None if drop is None else (drop, itertools.count()))
  try:
    yield
  finally:
    _dropped.reset(token)


def drop_here(branch: jax.Array) -> jax.Array:
  """Returns a branch as stochastic depth leaves it in the present context."""
  if (dropped := _dropped.get()) is None:
    return branch
  drop, merges = dropped
  keep = 1 - drop.rate
  mask = jax.random.bernoulli(
    jax.random.fold_in(drop.key, next(merges)),
    keep,
    (len(branch), *[1] * (branch.ndim - 1)),
  )
  return jnp.where(mask, branch / keep, 0).astype(branch.dtype)
