"""Measures what the train loop costs: its images a second against the bare step's.

The bare step is the compiled train step of the same network in a loop of the host, on
one batch that lies on the device. The loop is `training.train` as users call it, with
augmentation, metrics, TensorBoard, checkpoints and progress. Its epochs are timed from
outside of it, by the wall-clock times in the events that it writes at the end of each:
all that happens between two of them counts. Each round runs the loop with one
evaluation, at the end, and with one each epoch, both between runs of the bare step, so
that other work on the machine slows all of them. Checkpoints are as often as they are
by default; what one each epoch would cost is measured too.

Example:
  python -m benchmarks.train_loop
"""

import contextlib
import dataclasses
import itertools
import math
import os
import statistics
import struct
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from tensorboardX.proto.event_pb2 import Event

from benchmarks import compiled_step, machine, tables
from experiments import program
from skipinit_jax import data
from skipinit_jax.data import augmentation, in_memory
from skipinit_jax.files import Path, workdir_path
from skipinit_jax.training import TrainConfig, train

_ROUNDS = flags.DEFINE_integer(
  "rounds", 2, "Rounds of each network, in which all ways take turns.", lower_bound=1
)
_SECONDS = flags.DEFINE_float(
  "seconds", 2.0, "About how long a way runs in a round.", lower_bound=0.1
)

_AUGMENTED = TrainConfig(crop_padding=1, flip=True, schedule="constant")
_CONFIGS = (
  dataclasses.replace(_AUGMENTED, depth=10, width=1),
  dataclasses.replace(_AUGMENTED, depth=16, width=2),
)
# The first epoch compiles and tells how many steps fit into a dispatch; its checkpoint
# is then written in the background.
_STARTING_SECONDS = 1.0
_FEWEST_EPOCHS = 4
_NEVER = 2**30


class BareStep:
  """The compiled train step of a configuration, and a batch for it on the device."""

  def __init__(self, config: TrainConfig):
    dataset = data.load(config.dataset)
    self.steps_per_epoch = in_memory.steps_per_epoch(
      dataset.train.num_examples, config.batch_size
    )
    step = compiled_step.make_step(
      config, dataset.image_shape, dataset.num_classes, jax.devices()
    )
    images = jnp.asarray(dataset.train.images[: config.batch_size])
    images = augmentation.normalize(images, dataset.mean, dataset.std)
    labels = dataset.train.labels[: config.batch_size]
    self._batch = jax.device_put((images, labels), step.batch_sharding)
    self._state, self._step = step.init(), step.apply
    self.epoch_seconds(1)

  def epoch_seconds(self, num_epochs: int) -> float:
    """Returns the seconds that the steps of one epoch take, as the mean of several."""
    begin = time.perf_counter()
    for _ in range(num_epochs * self.steps_per_epoch):
      self._state = self._step(self._state, *self._batch)
    jax.block_until_ready(self._state)
    seconds = (time.perf_counter() - begin) / num_epochs
    assert math.isfinite(self._state.sums.loss), "The steps diverge: they are no steps."
    return seconds


def loop_epoch_seconds(config: TrainConfig) -> list[float]:
  """Trains in a fresh workdir, and returns the seconds of each epoch but the first."""
  with tempfile.TemporaryDirectory() as workdir, _progress_to_a_log():
    result = train(config, workdir)
    assert result.status == "completed", "The run diverged: its epochs are no epochs."
    ends = event_times(workdir_path(workdir) / "tensorboard", "train/loss")
  assert len(ends) == config.epochs
  return [end - begin for begin, end in itertools.pairwise(ends)]


@contextlib.contextmanager
def _progress_to_a_log() -> Iterator[None]:
  with open(os.devnull, "w") as log, contextlib.redirect_stderr(log):
    yield


def event_times(directory: Path, tag: str) -> list[float]:
  """Returns the wall-clock times of a tag's events, in the order of their writing."""
  (path,) = directory.iterdir()
  content = path.read_bytes()
  times, position = [], 0
  while position < len(content):
    # A record: its length, the length's checksum, the event, and its checksum.
    (length,) = struct.unpack_from("<Q", content, position)
    event = Event.FromString(content[position + 12 : position + 12 + length])
    position += 12 + length + 4
    if any(value.tag == tag for value in event.summary.value):
      times.append(event.wall_time)
  return times


def measure(config: TrainConfig) -> dict[str, Any]:
  """Returns how fast the bare step and the loop are for one network."""
  bare = BareStep(config)
  epoch = bare.epoch_seconds(2)
  num_epochs = max(_FEWEST_EPOCHS, round(_SECONDS.value / epoch))
  starting = max(1, round(_STARTING_SECONDS / epoch))
  loops: dict[str, dict[str, Any]] = {
    "one evaluation": {"eval_every_epochs": _NEVER},
    "an evaluation each epoch": {"eval_every_epochs": 1},
    "an evaluation and a checkpoint each epoch": {"checkpoint_every_seconds": 0.0},
  }
  rounds: dict[str, list[float]] = {name: [] for name in loops}
  epochs: dict[str, list[float]] = {name: [] for name in loops}
  ratios: dict[str, list[float]] = {name: [] for name in loops}
  bare_rounds = []
  for _ in range(_ROUNDS.value):
    before = bare.epoch_seconds(num_epochs)
    bare_rounds.append(before)
    for name, changes in loops.items():
      run = dataclasses.replace(config, epochs=1 + starting + num_epochs, **changes)
      # The last epoch may have an evaluation of its own, after its end.
      seconds = loop_epoch_seconds(run)[starting:]
      after = bare.epoch_seconds(num_epochs)
      bare_rounds.append(after)
      epochs[name] += seconds
      rounds[name].append(statistics.fmean(seconds))
      ratios[name].append((before + after) / 2 / rounds[name][-1])
      before = after
  images = bare.steps_per_epoch * config.batch_size
  return {
    "network": config.network_title,
    "dataset": config.dataset,
    "batch_size": config.batch_size,
    "steps_per_epoch": bare.steps_per_epoch,
    "epochs_per_round": num_epochs,
    "bare_step": {
      "epoch_seconds": machine.summary(bare_rounds),
      "images_per_second": machine.summary([images / each for each in bare_rounds]),
    },
    "loop": {
      name: {
        "epoch_seconds": machine.summary(epochs[name]),
        "images_per_second": machine.summary([images / each for each in rounds[name]]),
        "share_of_bare_step": machine.summary(ratios[name]),
      }
      for name in loops
    },
  }


def main() -> None:
  """Prints tables to standard error, and one JSON object to standard output."""
  cases = [measure(config) for config in _CONFIGS]
  tables.show("train_loop", {"machine": machine.description(), "cases": cases})


if __name__ == "__main__":
  program.run(main)
