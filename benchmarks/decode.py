"""Measures decoding and cropping of JPEG files, and how many cores feed a chip.

Several ways take the same windows out of the same files, with one thread each: this
package's, Pillow as torchvision's `RandomResizedCrop` uses it, and tf.data where
TensorFlow is installed. Then the whole input pipeline runs with 0, 1 and 2 worker
processes. Rates are images for each second that a core computes, for all threads and
processes together: other work on the machine changes that little. From the pipeline's
rate follows how many cores feed a chip.

Example:
  python -m benchmarks.decode
"""

import contextlib
import functools
import importlib.metadata
import io
import math
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from PIL import Image

from benchmarks import benchmark
from skipinit_jax.data import decode, streaming
from skipinit_jax.data.decode import Window
from skipinit_jax.data.prepare import sample_photos

_ROUNDS = flags.DEFINE_integer(
  "rounds", 15, "Passes over the files, of each way.", lower_bound=1
)

_SIZE = 224
_BATCH_SIZE = 64
_NUM_WORKERS = (0, 1, 2)
_PIPELINE_ROUNDS = 3
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

_Crops = Iterator[np.ndarray]
"""Images, uint8 [_SIZE, _SIZE, 3], that are computed as one goes over them."""

_Way = Callable[[Sequence[bytes], Sequence[Window]], _Crops]
"""Takes windows out of files."""


def skipinit_jax_crops(files: Sequence[bytes], windows: Sequence[Window]) -> _Crops:
  """Decodes and crops as the input pipeline does."""
  for encoded, window in zip(files, windows, strict=True):
    yield decode.decode(encoded, functools.partial(_same_window, window), _SIZE)


def _same_window(window: Window, height: int, width: int) -> Window:
  return window


def pillow_crops(files: Sequence[bytes], windows: Sequence[Window]) -> _Crops:
  """Decodes and crops as torchvision does."""
  for encoded, (top, left, height, width) in zip(files, windows, strict=True):
    with Image.open(io.BytesIO(encoded)) as image:
      cropped = image.convert("RGB").crop((left, top, left + width, top + height))
      yield np.asarray(cropped.resize((_SIZE, _SIZE), Image.Resampling.BILINEAR))


def tensorflow_crops(files: Sequence[bytes], windows: Sequence[Window]) -> _Crops:
  """Decodes and crops with tf.data."""
  import tensorflow as tf

  def crop(encoded: Any, window: Any) -> Any:
    image = tf.image.decode_and_crop_jpeg(encoded, window, channels=3)
    image = tf.image.resize([image], [_SIZE, _SIZE], method="bilinear")[0]
    return tf.cast(tf.round(image), tf.uint8)

  data = tf.data.Dataset.from_tensor_slices((list(files), np.int32(windows)))
  options = tf.data.Options()
  options.threading.private_threadpool_size = 1
  return data.map(crop).with_options(options).as_numpy_iterator()


def _ways() -> dict[str, _Way]:
  ways: dict[str, _Way] = {"skipinit_jax": skipinit_jax_crops, "Pillow": pillow_crops}
  with contextlib.suppress(ImportError):
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    ways[f"tf.data {tf.__version__}"] = tensorflow_crops
  return ways


def crop_rate(way: _Way, files: Sequence[bytes], windows: Sequence[Window]) -> float:
  """Returns the images a core second of one pass over the files."""
  # The first image comes before the pass: tf.data builds its program there.
  crops = way(files, windows)
  first = next(crops)
  begin = time.process_time()
  for _ in crops:
    pass
  seconds = time.process_time() - begin
  # All ways see the same: the mean levels of the first image agree.
  (expected,) = pillow_crops(files[:1], windows[:1])
  assert abs(first.mean() - expected.mean()) < 3
  return (len(files) - 1) / seconds


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


def _pipeline_name(num_workers: int) -> str:
  return f"skipinit_jax, whole pipeline, workers: {num_workers}"


def measure() -> dict[str, Any]:
  """Returns the JSON object."""
  cv2.setNumThreads(1)
  with tempfile.TemporaryDirectory() as data_dir:
    sample_photos.prepare(data_dir)
    dataset = streaming.load(sample_photos.NAME, data_dir=data_dir, image_size=_SIZE)
    builder = tfds.builder_from_directory(dataset.train.folder)
    raw = {"image": tfds.decode.SkipDecoding()}
    records = builder.as_data_source("train", decoders=raw)
    files = [record["image"] for record in records]
    rng = np.random.default_rng(0)
    sizes = [Image.open(io.BytesIO(encoded)).size for encoded in files]
    windows = [decode.random_window(rng, height, width) for width, height in sizes]
    crops = {
      name: functools.partial(crop_rate, way, files, windows)
      for name, way in _ways().items()
    }
    pipelines = {
      _pipeline_name(workers): functools.partial(pipeline_rate, dataset, workers)
      for workers in _NUM_WORKERS
    }
    rates = benchmark.take_turns(crops, _ROUNDS.value)
    rates |= benchmark.take_turns(pipelines, _PIPELINE_ROUNDS)
  # At the rate of the last pipeline, the one with the most workers.
  per_core = statistics.median(rates[_pipeline_name(_NUM_WORKERS[-1])])
  chips = []
  for chip, minutes in _MINUTES_ON_8_CHIPS.items():
    needed = _MLPERF_EPOCHS * _IMAGENET_EXAMPLES / (8 * 60 * minutes)
    chips.append(
      {
        "chip": chip,
        "its images/s": benchmark.digits(needed),
        "cores": math.ceil(needed / per_core),
      }
    )
  return {
    "versions": {
      name: importlib.metadata.version(name)
      for name in ("grain", "opencv-python-headless", "pillow", "simplejpeg")
    },
    "files": {
      "number": len(files),
      "mean_bytes": round(statistics.mean(map(len, files))),
      "image_size": _SIZE,
    },
    "tables": {
      "decode": [
        {"way": name, "images for each second of a core": benchmark.summary(each)}
        for name, each in rates.items()
      ],
      "chips": chips,
    },
  }


if __name__ == "__main__":
  benchmark.run(measure)
