"""Measures what the train loop costs: its images a second against the bare step's.

The bare step is the compiled train step of the same network in a loop of the host, on
one batch that lies on the device. The loop is `training.train` as users call it, with
augmentation, metrics, TensorBoard, checkpoints and progress. An epoch ends when its row
of metrics is written, and all that happens between two such rows counts. The loop runs
with one evaluation, at the end, with one each epoch, and with a checkpoint each epoch
besides. Each run is between two of the bare step, so that other work on the machine
slows both.

Example:
  python -m benchmarks.train_loop
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import benchmark, compiled_step
from skipinit_jax import data
from skipinit_jax.data import augmentation, in_memory
from skipinit_jax.training import TrainConfig, batch_sharding, make_mesh, train

_ROUNDS = flags.DEFINE_integer(
  "rounds", 2, "Rounds of each network, in which all loops take turns.", lower_bound=1
)
_SECONDS = flags.DEFINE_float(
  "seconds", 2.0, "About how long a loop runs in a round.", lower_bound=0.1
)

_AUGMENTED = TrainConfig(crop_padding=1, flip=True, schedule="constant")
_CONFIGS = (
  dataclasses.replace(_AUGMENTED, depth=10, width=1),
  dataclasses.replace(_AUGMENTED, depth=16, width=2),
)
_LOOPS: dict[str, dict[str, Any]] = {
  "one evaluation": {"eval_every_epochs": 2**30},
  "an evaluation each epoch": {"eval_every_epochs": 1},
  "an evaluation and a checkpoint each epoch": {"checkpoint_every_seconds": 0.0},
}
# The first epoch compiles and tells how many steps fit into a dispatch; its checkpoint
# is then written in the background.
_STARTING_SECONDS = 1.0
_FEWEST_EPOCHS = 4


def make_bare_epochs(config: TrainConfig) -> tuple[Callable[[int], float], int]:
  """Compiles the train step of a configuration.

  Returns:
    A function that takes the steps of some epochs on one batch, which lies on the
    device, and returns the mean seconds of an epoch; and the images of an epoch.
  """
  dataset = data.load(config.dataset)
  steps = in_memory.steps_per_epoch(dataset.train.num_examples, config.batch_size)
  step = compiled_step.make_step(
    config, dataset.image_shape, dataset.num_classes, jax.devices()
  )
  images = jnp.asarray(dataset.train.images[: config.batch_size])
  images = augmentation.normalize(images, dataset.mean, dataset.std)
  labels = dataset.train.labels[: config.batch_size]
  batch = jax.device_put((images, labels), batch_sharding(make_mesh()))
  state = step.init()

  def epoch_seconds(num_epochs: int) -> float:
    nonlocal state
    begin = time.perf_counter()
    for _ in range(num_epochs * steps):
      state = step.apply(state, *batch)
    jax.block_until_ready(state)
    assert math.isfinite(state.sums.loss), "The steps diverge: they are no steps."
    return (time.perf_counter() - begin) / num_epochs

  epoch_seconds(1)
  return epoch_seconds, steps * config.batch_size


def loop_epoch_seconds(config: TrainConfig) -> list[float]:
  """Trains in a fresh workdir, and returns the seconds of each epoch but the first."""
  ends = []

  def note_end(step: int, kind: str, values: Any) -> None:
    if kind == "train":
      ends.append(time.perf_counter())

  with (
    tempfile.TemporaryDirectory() as workdir,
    open(os.devnull, "w") as log,
    contextlib.redirect_stderr(log),
  ):
    result = train(config, workdir, on_metrics=note_end)
  assert result.status == "completed", f"The run was {result.status}."
  return [end - begin for begin, end in itertools.pairwise(ends)]


def measure(config: TrainConfig) -> list[dict[str, Any]]:
  """Returns a row for each loop with one network."""
  bare_seconds, images = make_bare_epochs(config)
  epoch = bare_seconds(2)
  num_epochs = max(_FEWEST_EPOCHS, round(_SECONDS.value / epoch))
  starting = max(1, round(_STARTING_SECONDS / epoch))

  def take_turn(changes: dict[str, Any]) -> tuple[float, list[float], float]:
    """Returns seconds of the bare step's epoch, the loop's epochs, and again."""
    run = dataclasses.replace(config, epochs=1 + starting + num_epochs, **changes)
    before = bare_seconds(num_epochs)
    # The last epoch may have an evaluation of its own, after its end.
    loop = loop_epoch_seconds(run)[starting:]
    return before, loop, bare_seconds(num_epochs)

  ways = {name: functools.partial(take_turn, each) for name, each in _LOOPS.items()}
  turns = benchmark.take_turns(ways, _ROUNDS.value)
  rows = []
  for name, each in turns.items():
    befores, loops, afters = zip(*each, strict=True)
    means = [statistics.fmean(loop) for loop in loops]
    shares = [
      (b + a) / 2 / mean for b, mean, a in zip(befores, means, afters, strict=True)
    ]
    rows.append(
      {
        "network, and the loop with": f"{config.network_title}, {name}",
        "seconds an epoch": benchmark.summary([*itertools.chain(*loops)]),
        "images/s": benchmark.digits(images / statistics.median(means)),
        "bare step's": benchmark.digits(images / statistics.median(befores + afters)),
        "share": round(statistics.median(shares), 2),
      }
    )
  return rows


def measure_all() -> dict[str, Any]:
  """Returns the JSON object."""
  return {"tables": {"train_loop": [row for each in _CONFIGS for row in measure(each)]}}


if __name__ == "__main__":
  benchmark.run(measure_all)
