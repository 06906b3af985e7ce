"""The signal in a network while it trains: alphas, branches and gradients by block."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from skipinit_jax.analysis import Signal, figures, measure
from skipinit_jax.compilation import compiler_options
from skipinit_jax.training.mesh import (
  batch_sharding,
  replicated,
  sharded_activations,
)
from skipinit_jax.training.metrics import MetricsWriter
from skipinit_jax.training.state import TrainState
from skipinit_jax.training.step import Batches

# The fields of a signal that the logged quantities are made of.
_LOGGED = {
  "names",
  "alpha",
  "branch_variance",
  "skip_variance",
  "gradient_second_moment",
}


@dataclasses.dataclass(frozen=True)
class SignalLog:
  """Writes the signal of a run as rows of kind "signal", every so many steps.

  It does so at step 0, at multiples of the number of steps, and at the last step. The
  first row names the blocks.

  Attributes:
    writer: gets the rows.
    measure_signal: measures the signal at a state.
    every_steps: steps between rows; 0: there are none.
    total_steps: of the run.
    steps_per_epoch: of an epoch.
  """

  writer: MetricsWriter
  measure_signal: Callable[[TrainState], Signal]
  _: dataclasses.KW_ONLY
  every_steps: int
  total_steps: int
  steps_per_epoch: int

  def steps_to_next(self, step: int) -> int:
    """Returns the number of steps from this one to the next with a row, or the end."""
    to_end = self.total_steps - step
    every = self.every_steps
    return min(to_end, every - step % every) if every else to_end

  def write_if_due(self, step: int, state: TrainState) -> None:
    """Writes a row if this step has one."""
    every = self.every_steps
    if every and (step % every == 0 or step == self.total_steps):
      signal = self.measure_signal(state)
      row: dict[str, Any] = {"epoch": step / self.steps_per_epoch}
      if "signal" not in self.writer.kinds:
        row["blocks"] = list(signal.names)
      for name in figures.SIGNAL_QUANTITIES:
        values = getattr(signal, name)
        if values is not None:
          # More digits would say nothing about a batch, and double the file.
          row[name] = [float(f"{value:.5g}") for value in np.asarray(values)]
      self.writer.write(step, "signal", row)


def make_measure_signal(
  model: nn.Module,
  batches: Batches,
  *,
  mesh: Mesh,
  sharding: TrainState,
  accumulation_steps: int = 1,
) -> jax.stages.Wrapped:
  """Returns a jitted function that measures the signal of a run's network.

  Args:
    model: the network, called as `model(images, train)`.
    batches: gives the batch of the state's next step.
    mesh: the mesh whose axis `data` shares the batch.
    sharding: how the state lies on the mesh.
    accumulation_steps: parts of a batch. Only the first one is measured, so that the
      memory of a step suffices.

  Returns:
    A function of the state, which it leaves as it is, and the data that `batches`
    takes. It returns a `Signal` of what is logged; the rest of it is None. It is
    measured in training mode, with a dropout mask of its own.
  """

  def measure_signal(state: TrainState, data: Any) -> Signal:
    keys = state.random_keys()
    images, labels = batches(state, data)(state.step)
    part = len(images) // accumulation_steps
    images, labels = jax.lax.with_sharding_constraint(
      (images[:part], labels[:part]), batch_sharding(mesh)
    )
    with sharded_activations(mesh, part, sharding.params):
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
    names = {field.name for field in dataclasses.fields(signal)} - _LOGGED
    absent: dict[str, Any] = dict.fromkeys(names)
    return dataclasses.replace(signal, **absent)

  return jax.jit(
    measure_signal,
    in_shardings=(sharding, None),
    out_shardings=replicated(mesh),
    compiler_options=compiler_options(),
  )
