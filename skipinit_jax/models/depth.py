"""Stacks of equal residual blocks whose compile time does not grow with depth."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core.scope import LazyRng

from skipinit_jax import methods
from skipinit_jax.errors import UsageError
from skipinit_jax.methods import ModuleFactory
from skipinit_jax.models.stochastic_depth import BranchDrop, branch_drops, dropping

Variables = Mapping[str, Any]
PerBlock = jax.Array | np.ndarray
# A block's second argument, and how it drops its branch.
_Own = Sequence[Any]
_SCANNED = "blocks"
_UNROLLED = "block"


class Stacked(nn.Module):
  """A module with a field `scan`, whose summary counts what all its blocks compute."""

  @nn.nowrap
  def tabulate(
    self,
    *args: Any,
    compute_flops: bool = False,
    compute_vjp_flops: bool = False,
    **kwargs: Any,
  ) -> str:
    """Returns Flax's table of the module, its blocks written out if FLOPs are asked.

    XLA counts the operations of a loop's body once, however often it runs. So does the
    function `flax.linen.tabulate`, which this method cannot reach: it lowers each call
    by itself, where nothing tells a module that it is counted. Give it
    `model.clone(scan=False)`.
    """
    counted = compute_flops or compute_vjp_flops
    return nn.Module.tabulate(
      self.clone(scan=False) if counted else self,
      *args,
      compute_flops=compute_flops,
      compute_vjp_flops=compute_vjp_flops,
      **kwargs,
    )


class DepthStack(Stacked):
  """Equal blocks, one after the other.

  Under `scan` the blocks are one `flax.linen.scan`: program size and compile time
  are those of one block, and every variable has a leading axis over the blocks.
  `unroll_variables` and `scan_variables` translate between the two forms.

  Attributes:
    block: factory of the block, called as `block(name=...)`; it keeps the shape and,
      under `scan`, the dtype: bfloat16 inputs need blocks of that `dtype`.
    num_blocks: how many blocks; none returns the input.
    scan: whether to scan over the blocks, or to write them out. A network of your own
      around a stack writes them out for FLOPs in `tabulate`, as `tabulate` here does.
    remat: whether to compute activations again in the backward pass. Blocks that are
      written out keep their inputs. Under `scan`, segments of blocks are computed
      again, so that memory grows with the square root of their number (Chen et al.,
      2016) where that has suitable divisors, at the price of one more forward pass.
  """

  block: ModuleFactory
  num_blocks: int
  scan: bool = True
  remat: bool = False

  @nn.compact
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
    if self.num_blocks == 0:
      return x
    own = (per_block, drops)

    if not self.scan:
      apply = nn.remat(apply_block) if self.remat else apply_block
      for index in range(self.num_blocks):
        block = self.block(name=f"{_UNROLLED}{index}")
        x = apply(block, x, of_block(own, index))
      return x
    # Every collection and every random stream, so that a user's own block may have any.
    scan = functools.partial(nn.scan, variable_axes={True: 0}, split_rngs={True: True})
    block = self.block(name=_SCANNED)
    segment = _segment_length(self.num_blocks)
    if not self.remat or self.is_initializing():
      scanned = scan(_apply_scanned, length=self.num_blocks)
    elif segment == 1:
      # A scan already keeps XLA from merging the two computations.
      remat = nn.remat(_apply_scanned, prevent_cse=False)
      scanned = scan(remat, length=self.num_blocks)
    else:
      cut = functools.partial(_reshape_axis, 1, (-1, segment))
      in_segments = nn.map_variables(
        scan(
          nn.remat(scan(_ApplyWithKeys(), length=segment), prevent_cse=False),
          length=self.num_blocks // segment,
        ),
        mapped_collections=True,
        trans_in_fn=cut,
        trans_out_fn=functools.partial(_reshape_axis, 2, (-1,)),
        mutable=True,
      )
      keys = {
        name: jax.random.split(stream.rng, self.num_blocks)
        for name, stream in block.scope.rngs.items()
      }
      return in_segments(block, x, cut((own, keys)))[0]
    return scanned(block, x, own)[0]


def apply_block(block: Any, x: jax.Array, own: _Own) -> jax.Array:
  """Applies a block to x and to its part of what all blocks have."""
  argument, drop = own
  with dropping(drop):
    y: jax.Array = block(x) if argument is None else block(x, argument)
    return y


def apply_scanned(block: Any, x: jax.Array, own: _Own) -> jax.Array:
  """Applies a block of a scan.

  Raises:
    UsageError: the shape or dtype of its output is not that of x.
  """
  y = apply_block(block, x, own)
  if (x.shape, x.dtype) != (y.shape, y.dtype):
    raise UsageError(
      f"A block of the DepthStack maps {x.dtype}{[*x.shape]} to {y.dtype}"
      f"{[*y.shape]}: under scan it must keep shape and dtype. Change the block (such "
      "as its features or dtype) or the stack's input, or use scan=False."
    )
  return y


def _apply_scanned(block: Any, x: jax.Array, own: _Own) -> tuple[jax.Array, None]:
  return apply_scanned(block, x, own), None


class _ApplyWithKeys:
  """Applies a block in a scan within a scan, with the random numbers of one scan.

  Two scans split the keys of random streams otherwise than one, and trace their body
  more often, while Flax counts the keys drawn in all tracings: a scan's first tracing
  only finds shapes, and the second one counts on from there.
  """

  def __init__(self) -> None:
    self._counts: dict[Any, Any] | None = None

  def __call__(
    self, block: Any, x: jax.Array, own: tuple[_Own, Mapping[str, jax.Array]]
  ) -> tuple[jax.Array, None]:
    arguments, keys = own
    streams, counts = block.scope.rngs, block.scope.rng_counters
    for name, key in keys.items():
      streams[name] = LazyRng(key, streams[name].suffix)
    if self._counts is not None:
      counts.clear()
      counts.update(_copy(self._counts))
    result = _apply_scanned(block, x, arguments)
    if self._counts is None:
      self._counts = _copy(counts)
    return result


def _copy(counts: Mapping[Any, Any]) -> dict[Any, Any]:
  return {
    key: _copy(count) if isinstance(count, Mapping) else count
    for key, count in counts.items()
  }


def of_block(own: _Own, blocks: int | slice) -> Any:
  """Takes one block's part, or that of several, of what all blocks have."""
  return jax.tree.map(lambda leaf: leaf[blocks], own)


class Stages(NamedTuple):
  """The stages of a convolutional network.

  Attributes:
    block: the class of the blocks.
    branch_layers: the layers of a block's branch.
    features: the features of the blocks' layers, by stage.
    num_blocks: the number of blocks, by stage.
    strides: the first block's strides, by stage.
  """

  block: ModuleFactory
  branch_layers: int
  features: Sequence[int]
  num_blocks: Sequence[int]
  strides: Sequence[int]


def apply_stages(
  network: Any, x: jax.Array, conv: ModuleFactory, *, train: bool, **fields: Any
) -> jax.Array:
  """Applies the stages of a convolutional network, inside of its `__call__`.

  The first block of a stage may change the shape; the rest is a `DepthStack`.

  Args:
    network: the network, which has a method, `stages()`, `scan`, `remat` and dtypes.
    x: what the first block takes, [N, H, W, C].
    conv: factory of the blocks' convolutions.
    train: whether normalizers use the statistics of the batch, and branches drop.
    **fields: further fields of the blocks.
  """
  method, stages = methods.get(network.method), network.stages()
  block = functools.partial(
    stages.block,
    conv=conv,
    projection_init=method.kernel_init,
    **fields,
    **method.activated_block_fields(
      num_blocks=sum(stages.num_blocks),
      branch_layers=stages.branch_layers,
      train=train,
      dtype=network.dtype,
      param_dtype=network.param_dtype,
    ),
  )
  parts = zip(
    stages.features,
    stages.num_blocks,
    stages.strides,
    method.expected_stds(stages.num_blocks),
    branch_drops(network, method.drop_path, stages.num_blocks, train=train),
    strict=True,
  )
  for stage, (width, length, stride, *own) in enumerate(parts, start=1):
    stage_block = functools.partial(block, width)
    first = stage_block(strides=stride, name=f"stage{stage}_first")
    x = apply_block(first, x, of_block(own, 0))
    rest = DepthStack(
      stage_block,
      length - 1,
      network.scan,
      network.remat,
      name=f"stage{stage}_rest",
    )
    x = rest(x, *of_block(own, slice(1, None)))
  return x


def _segment_length(num_blocks: int) -> int:
  """Returns how many blocks to compute again at a time.

  Kept are the inputs of all segments, and, while one is computed again, the activations
  of its blocks: several of an input's size each. Near half the root of the number of
  blocks, the two take about the same memory. One, where no divisor is near.
  """
  ideal = math.sqrt(num_blocks) / 2
  divisors = [n for n in range(1, math.isqrt(num_blocks) + 1) if num_blocks % n == 0]
  return min(divisors, key=lambda n: abs(math.log(n / ideal)))


def _reshape_axis(axes: int, shape: tuple[int, ...], tree: Any) -> Any:
  """Gives the first `axes` axes of each array another shape."""
  return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[axes:]), tree)


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
  # A tuple is what a stack itself has sown, such as its captured output.
  sown = {key: value for key, value in variables.items() if isinstance(value, tuple)}
  names = [f"{_UNROLLED}{index}" for index in range(len(variables) - len(sown))]
  if names and set(names) == variables.keys() - sown.keys():
    blocks = [variables[name] for name in names]
    return sown | {_SCANNED: jax.tree.map(_stack, *blocks)}
  return {
    key: scan_variables(value) if isinstance(value, Mapping) else value
    for key, value in variables.items()
  }


def _stack(*leaves: PerBlock) -> PerBlock:
  # JAX would narrow NumPy's float64.
  numpy = all(isinstance(leaf, np.ndarray) for leaf in leaves)
  return np.stack(leaves) if numpy else jnp.stack(leaves)


def is_stacked(path: tuple[Any, ...]) -> bool:
  """Tells whether a variable has a leading axis over the blocks of a stack.

  Args:
    path: the variable's path, as `jax.tree_util.tree_map_with_path` gives it.
  """
  return any(getattr(key, "key", None) == _SCANNED for key in path)
