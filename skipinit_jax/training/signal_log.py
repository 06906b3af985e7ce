"""The signal in a network while it trains: alphas, branches and gradients by block."""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh

from skipinit_jax.analysis import measure
from skipinit_jax.training.compilation import compiler_options
from skipinit_jax.training.mesh import (
  batch_sharding,
  replicated,
  sharded_activations,
)
from skipinit_jax.training.metrics import MetricsWriter
from skipinit_jax.training.state import TrainState


class BlockSignal(struct.PyTreeNode):
  """What is logged of d residual blocks, in the order of the network.

  Attributes:
    names: the blocks' names, d of them.
    branch_to_skip: variance of the branch over that of the skip path, [d]: what batch
      normalization makes about 1 / l in block l (De & Smith, 2020, section 2). See
      `analysis.Signal.branch_to_skip`.
    gradient_rms: root mean square of the loss's derivative with respect to the block's
      output, over examples, positions and channels, [d]: the root of
      `analysis.Signal.gradient_second_moment`. It is the gradient of the features, not
      that of the block's parameters.
    alpha: the learnable scalar at the end of the branch, [d]; None where the blocks
      have none.
  """

  names: tuple[str, ...] = struct.field(pytree_node=False)
  branch_to_skip: jax.Array
  gradient_rms: jax.Array
  alpha: jax.Array | None

  def to_row(self, *, with_names: bool) -> dict[str, list[Any]]:
    """Returns the values by name, as lists, for `metrics.jsonl`.

    Args:
      with_names: whether the blocks' names are there too, as `blocks`.
    """
    row: dict[str, list[Any]] = {"blocks": list(self.names)} if with_names else {}
    for name in ("alpha", "branch_to_skip", "gradient_rms"):
      values = getattr(self, name)
      if values is not None:
        # More digits would say nothing about a batch, and double the file.
        row[name] = [float(f"{value:.5g}") for value in np.asarray(values)]
    return row


class SignalLog:
  """Writes the signal of a run as rows of kind "signal", every so many steps.

  It does so at step 0, at multiples of the number of steps, and at the last step. The
  first row names the blocks.
  """

  def __init__(
    self,
    writer: MetricsWriter,
    measure_signal: Callable[[TrainState], BlockSignal],
    *,
    every_steps: int,
    total_steps: int,
    steps_per_epoch: int,
  ):
    """Makes the log of a run.

    Args:
      writer: where to write.
      measure_signal: measures the signal at a state.
      every_steps: steps between rows; 0: there are none.
      total_steps: steps of the run.
      steps_per_epoch: steps of an epoch.
    """
    self._writer = writer
    self._measure_signal = measure_signal
    self._every_steps = every_steps
    self._total_steps = total_steps
    self._steps_per_epoch = steps_per_epoch

  def steps_to_next(self, step: int) -> int:
    """Returns the number of steps from this one to the next with a row, or the end."""
    to_end = self._total_steps - step
    every = self._every_steps
    return min(to_end, every - step % every) if every else to_end

  def write_if_due(self, step: int, state: TrainState) -> None:
    """Writes a row if this step has one.

    Args:
      step: optimizer steps taken.
      state: the state after them.
    """
    every = self._every_steps
    if every and (step % every == 0 or step == self._total_steps):
      row = self._measure_signal(state).to_row(
        with_names="signal" not in self._writer.kinds
      )
      self._writer.write(step, "signal", {"epoch": step / self._steps_per_epoch, **row})


NextBatch = Callable[[TrainState, Any], tuple[jax.Array, jax.Array]]


def make_measure_signal(
  model: nn.Module,
  next_batch: NextBatch,
  *,
  mesh: Mesh,
  accumulation_steps: int = 1,
  sharding: TrainState | None = None,
) -> Callable[[TrainState, Any], BlockSignal]:
  """Returns a jitted function that measures the signal of a run's network.

  Args:
    model: the network, called as `model(images, train)`.
    next_batch: maps the state and the data, traced, to what the state's next step
      trains on: the network's input [B, H, W, C] and labels [B].
    mesh: the mesh whose axis `data` shares the batch.
    accumulation_steps: parts of a batch. Only the first one is measured, so that the
      memory of a step suffices.
    sharding: how the state lies on the mesh; None: whole on every device.

  Returns:
    A function of the state, which it leaves as it is, and the data that returns a
    `BlockSignal`. It is measured in training mode, with a dropout mask of its own.
  """

  def measure_signal(state: TrainState, data: Any) -> BlockSignal:
    keys = state.random_keys()
    images, labels = next_batch(state, data)
    part = len(images) // accumulation_steps
    images, labels = jax.lax.with_sharding_constraint(
      (images[:part], labels[:part]), batch_sharding(mesh)
    )
    with sharded_activations(mesh, part, enabled=sharding is not None):
      signal = measure.signal(
        model,
        {"params": state.params, **state.model_state},
        images,
        loss=lambda logits: optax.softmax_cross_entropy_with_integer_labels(
          logits, labels
        ).mean(),
        key=jax.random.fold_in(keys.dropout, state.step),
        train=True,
      )
    # XLA drops the statistics that are not returned: a third of the time.
    return BlockSignal(
      names=signal.names,
      branch_to_skip=signal.branch_to_skip,
      gradient_rms=jnp.sqrt(signal.gradient_second_moment[1:]),
      alpha=block_alphas(state.params, signal.names),
    )

  return jax.jit(
    measure_signal,
    in_shardings=(replicated(mesh) if sharding is None else sharding, None),
    out_shardings=replicated(mesh),
    compiler_options=compiler_options(),
  )


def block_alphas(params: Mapping[str, Any], names: Sequence[str]) -> jax.Array | None:
  """Returns the learnable scalars at the ends of the branches.

  Args:
    params: the network's parameters.
    names: the blocks' names, as in `analysis.Signal.names`.

  Returns:
    An array of float32, [d]; None if the blocks have no such scalar.
  """

  def find(path: Sequence[str]) -> Any:
    return reduce(lambda node, name: node.get(name, {}), path, params)

  def scalars(name: str) -> tuple[str, ...]:
    # Blocks of a scan share their parameters' path, which their index follows.
    path = tuple(name.split("/"))
    return path if find(path) else path[:-1]

  # By path: a thousand slices of one parameter would be a thousand operations.
  blocks: dict[tuple[str, ...], list[int]] = {}
  for block, name in enumerate(names):
    blocks.setdefault(scalars(name), []).append(block)
  alphas = [find((*path, "branch_scale", "alpha")) for path in blocks]
  if any(isinstance(alpha, Mapping) for alpha in alphas):
    return None
  scales = jnp.concatenate([alpha.reshape(-1) for alpha in alphas])
  # A user's own module may learn one alpha for each channel.
  if len(scales) != len(names):
    return None
  # Two kinds of blocks in one scan, as in a Transformer, take turns.
  order = np.argsort(np.concatenate(list(blocks.values())))
  in_order = bool(np.all(order == np.arange(len(names))))
  return (scales if in_order else scales[order]).astype(jnp.float32)
