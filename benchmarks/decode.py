"""Measures the input pipeline for photographs, and how many cores feed a chip.

JPEG files are decoded and cropped, with 0, 1 and 2 worker processes. Rates are images
for each second that a core computes, for all threads and processes together: other work
on the machine changes that little.

Example:
  python -m benchmarks.decode
"""

import contextlib
import functools
import importlib.metadata
import math
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time
from typing import Any

import cv2
from absl import flags

from benchmarks import benchmark
from skipinit_jax.data import streaming
from skipinit_jax.data.prepare import sample_photos

_ROUNDS = flags.DEFINE_integer(
  "rounds", 3, "Turns of each number of processes.", lower_bound=1
)

_SIZE = 224
_BATCH_SIZE = 64
_NUM_WORKERS = (0, 1, 2)
_BATCHES_PER_ROUND = 16

# Assumptions: how fast a chip trains ResNet-50, from the minutes for ImageNet that the
# vendors submitted to MLPerf Training, about the best that the chips reach. TPU v4 in
# round 0.7: IEEE Spectrum, "Here's How Google's TPU v4 AI Chip Stacked Up in Training
# Tests" (2021). H100 in round 3.0, entry 3.0-2053, as listed on
# https://developer.nvidia.com/deep-learning-performance-training-inference/training.
_MINUTES_ON_8_CHIPS = {"TPU v4": 30.7, "H100": 13.466}
# Neither source tells how many epochs the runs took: about 40 are usual at batch
# sizes of a few thousand. The time of evaluation is neglected.
_MLPERF_EPOCHS = 40
_IMAGENET_EXAMPLES = 1_281_167


def pipeline_rate(dataset: streaming.StreamedDataset, num_workers: int) -> float:
  """Returns the images a core second of the whole pipeline."""
  batches = streaming.train_batches(
    dataset, batch_size=_BATCH_SIZE, seed=0, num_workers=num_workers
  )
  with contextlib.closing(batches):
    # Workers start, and their buffers fill.
    for _ in range(1 + 4 * num_workers):
      next(batches)
    begin = _cpu_seconds()
    for _ in range(_BATCHES_PER_ROUND):
      next(batches)
    return _BATCHES_PER_ROUND * _BATCH_SIZE / (_cpu_seconds() - begin)


def _cpu_seconds() -> float:
  """Returns the time that this process and its workers have computed for."""
  total = time.process_time()
  for child in multiprocessing.active_children():
    stat = pathlib.Path(f"/proc/{child.pid}/stat").read_text()
    user, system = stat.rpartition(")")[2].split()[11:13]
    total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
  return total


def measure() -> dict[str, Any]:
  """Returns the JSON object."""
  cv2.setNumThreads(1)
  with tempfile.TemporaryDirectory() as data_dir:
    sample_photos.prepare(data_dir)
    dataset = streaming.load(sample_photos.NAME, data_dir=data_dir, image_size=_SIZE)
    pipelines = {
      workers: functools.partial(pipeline_rate, dataset, workers)
      for workers in _NUM_WORKERS
    }
    rates = benchmark.take_turns(pipelines, _ROUNDS.value)
  per_core = statistics.median(rates[_NUM_WORKERS[-1]])
  needed = {
    chip: _MLPERF_EPOCHS * _IMAGENET_EXAMPLES / (8 * 60 * minutes)
    for chip, minutes in _MINUTES_ON_8_CHIPS.items()
  }
  packages = ("grain", "opencv-python-headless", "simplejpeg")
  return {
    "versions": {name: importlib.metadata.version(name) for name in packages},
    "tables": {
      "decode": [
        {
          "worker processes": workers,
          "images for each second of a core": benchmark.summary(each),
        }
        for workers, each in rates.items()
      ],
      "chips": [
        {
          "chip": chip,
          "its images/s": benchmark.digits(rate),
          "cores": math.ceil(rate / per_core),
        }
        for chip, rate in needed.items()
      ],
    },
  }


if __name__ == "__main__":
  benchmark.run(measure)
