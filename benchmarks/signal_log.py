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

from benchmarks import tables
from experiments import program
from skipinit_jax import data
from skipinit_jax.training import TrainConfig, Trainer, make_mesh
from skipinit_jax.training.metrics import MetricsWriter
from skipinit_jax.training.signal_log import SignalLog

_CONFIGS = [
  dataclasses.replace(network, method=method)
  for network in (
    TrainConfig(depth=100, batch_size=32, signal_every_steps=1),
    # At the default rate it diverges, and training stops.
    TrainConfig(
      model="residual_mlp",
      depth=1000,
      width=64,
      learning_rate=2**-9,
      signal_every_steps=1,
    ),
  )
  for method in ("skipinit", "batch_norm")
]
_ROUNDS = 20
_STEPS_PER_ROUND = 2
_LARGEST_SHARE = 0.02


def measure(config: TrainConfig) -> dict[str, object]:
  """Returns the times of a step and of a row, in seconds, for one network."""
  dataset = data.load(config.dataset)
  model = config.make_model(dataset.num_classes)

  step_seconds, row_seconds = [], []
  with (
    tempfile.TemporaryDirectory() as workdir,
    MetricsWriter(workdir, resume_step=None) as writer,
    Trainer(config, dataset, model, make_mesh()) as trainer,
  ):
    log = SignalLog(
      writer,
      trainer.measure_signal,
      every_steps=1,
      total_steps=trainer.steps_per_epoch,
      steps_per_epoch=trainer.steps_per_epoch,
    )
    state = trainer.initial_state
    # The first round is slower.
    for _ in range(1 + _ROUNDS):
      begin = time.perf_counter()
      state, is_finite = trainer.train_steps(state, _STEPS_PER_ROUND)
      assert bool(is_finite), "The run diverges: its steps are no steps."
      trained = time.perf_counter()
      log.write_if_due(int(state.step), state)
      step_seconds.append((trained - begin) / _STEPS_PER_ROUND)
      row_seconds.append(time.perf_counter() - trained)
  step = statistics.median(step_seconds[1:])
  row = statistics.median(row_seconds[1:])
  return {
    "network": config.network_title,
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
