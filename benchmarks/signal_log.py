"""Measures what `signal_every_steps` costs: the time of a row against that of a step.

A row is the measurement, its way to the host, and its line in metrics.jsonl and
TensorBoard. Steps and rows take turns, so that other work on the machine slows both,
and the medians of their times are compared. Compilation comes before.

Example:
  python -m benchmarks.signal_log
"""

import dataclasses
import math
import statistics
import tempfile
import time

import jax
import numpy as np

from benchmarks import tables
from experiments import program
from skipinit_jax import data
from skipinit_jax.data import augmentation, in_memory
from skipinit_jax.studies.names import network_name
from skipinit_jax.training import (
  TrainConfig,
  make_init,
  make_mesh,
  make_optimizer,
  make_train_step,
  make_train_steps,
  replicated,
)
from skipinit_jax.training.metrics import MetricsWriter
from skipinit_jax.training.signal_log import SignalLog, make_measure_signal
from skipinit_jax.training.step import make_next_batch

_CONFIGS = [
  dataclasses.replace(network, method=method)
  for network in (
    TrainConfig(depth=100, batch_size=32),
    # At the default rate it diverges, and training stops.
    TrainConfig(model="residual_mlp", depth=1000, width=64, learning_rate=2**-9),
  )
  for method in ("skipinit", "batch_norm")
]
_ROUNDS = 20
_STEPS_PER_ROUND = 2
_LARGEST_SHARE = 0.02


def measure(config: TrainConfig) -> dict[str, object]:
  """Returns the times of a step and of a row, in seconds, for one network."""
  dataset = data.load(config.dataset)
  num_examples = dataset.train.num_examples
  steps_per_epoch = in_memory.steps_per_epoch(num_examples, config.batch_size)
  mesh = make_mesh()
  model = config.make_model(dataset.num_classes)
  optimizer = make_optimizer(config, steps_per_epoch)

  def augment(_: jax.Array, images: jax.Array) -> jax.Array:
    return augmentation.normalize(images, dataset.mean, dataset.std)

  train_steps = make_train_steps(
    make_train_step(model, optimizer, mesh=mesh),
    augment,
    num_examples=num_examples,
    batch_size=config.batch_size,
    mesh=mesh,
  )
  next_batch = make_next_batch(
    augment, num_examples=num_examples, batch_size=config.batch_size
  )
  measure_signal = make_measure_signal(model, next_batch, mesh=mesh)
  split = in_memory.put(dataset.train, replicated(mesh))
  state = make_init(model, optimizer, dataset.image_shape, mesh=mesh)(np.uint32(0))

  step_seconds, row_seconds = [], []
  with (
    tempfile.TemporaryDirectory() as workdir,
    MetricsWriter(workdir, resume_step=None) as writer,
  ):
    log = SignalLog(
      writer,
      lambda state: measure_signal(state, split),
      every_steps=1,
      total_steps=steps_per_epoch,
      steps_per_epoch=steps_per_epoch,
    )
    # The first round compiles.
    for _ in range(1 + _ROUNDS):
      begin = time.perf_counter()
      state, is_finite = train_steps(state, split, _STEPS_PER_ROUND)
      assert bool(is_finite), "The run diverges: its steps are no steps."
      trained = time.perf_counter()
      log.write_if_due(int(state.step), state)
      step_seconds.append((trained - begin) / _STEPS_PER_ROUND)
      row_seconds.append(time.perf_counter() - trained)
  step = statistics.median(step_seconds[1:])
  row = statistics.median(row_seconds[1:])
  return {
    "network": network_name(config),
    "method": config.method,
    "batch_size": config.batch_size,
    "step_seconds": float(f"{step:.3g}"),
    "row_seconds": float(f"{row:.3g}"),
    "row_in_steps": float(f"{row / step:.3g}"),
    # Rows every so many steps take no more than the share of the steps' time.
    "smallest_interval": math.ceil(row / (_LARGEST_SHARE * step)),
  }


def main() -> None:
  """Prints tables to standard error, and one JSON object to standard output."""
  devices = jax.devices()
  tables.show(
    "signal_log",
    {
      "device": f"{len(devices)} x {devices[0].device_kind}",
      "largest_share": _LARGEST_SHARE,
      "results": [measure(config) for config in _CONFIGS],
    },
  )


if __name__ == "__main__":
  program.run(main)
