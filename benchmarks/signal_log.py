"""Measures what `signal_every_steps` costs: the time of a row against that of a step.

A row is the measurement, its way to the host, and its line in metrics.jsonl and
TensorBoard. Steps and rows take turns, and the medians of their times are compared.
Compilation comes before.

Example:
  python -m benchmarks.signal_log
"""

import dataclasses
import math
import statistics
import tempfile
import time

from benchmarks import benchmark
from skipinit_jax import data
from skipinit_jax.training import TrainConfig, Trainer, make_mesh
from skipinit_jax.training.metrics import MetricsWriter
from skipinit_jax.training.signal_log import SignalLog

_NETWORKS = (
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
_METHODS = ("skipinit", "batch_norm")
_ROUNDS = 40
_LARGEST_SHARE = 0.02


def measure(config: TrainConfig) -> dict[str, object]:
  """Returns the times of a step and of a row, in seconds, for one network."""
  dataset = data.load(config.dataset)
  model = config.make_model(dataset.num_classes)
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

    def take_step() -> float:
      nonlocal state
      begin = time.perf_counter()
      state, is_finite = trainer.train_steps(state, 1)
      assert bool(is_finite), "The run diverges: its steps are no steps."
      return time.perf_counter() - begin

    def write_row() -> float:
      begin = time.perf_counter()
      log.write_if_due(int(state.step), state)
      return time.perf_counter() - begin

    # The first round is slower.
    turns = benchmark.take_turns({"step": take_step, "row": write_row}, 1 + _ROUNDS)
  step, row = (statistics.median(seconds[1:]) for seconds in turns.values())
  return {
    "network": config.network_title,
    "method": config.method,
    "seconds of a step": benchmark.digits(step),
    "seconds of a row": benchmark.digits(row),
    # Rows every so many steps take no more than the share of the steps' time.
    "steps between rows": math.ceil(row / (_LARGEST_SHARE * step)),
  }


def measure_all() -> dict[str, object]:
  """Returns the JSON object."""
  rows = [
    measure(dataclasses.replace(network, method=method))
    for network in _NETWORKS
    for method in _METHODS
  ]
  return {"largest_share": _LARGEST_SHARE, "tables": {"signal_log": rows}}


if __name__ == "__main__":
  benchmark.run(measure_all)
