"""Measures decoding and cropping of JPEG files, and how many cores feed a chip.

Three ways take the same windows out of the same files: this package's, Pillow as
torchvision's `RandomResizedCrop` uses it, and tf.data, with one thread each. They take
turns, and the medians of their rounds are compared. Then the whole input pipeline runs
with 0, 1 and 2 worker processes. Rates are images for each second that a core computes,
for all threads and processes together: other work on the machine changes that little.
From the pipeline's rate follows how many cores feed a chip.

Examples:
  python -m benchmarks.decode
  python -m benchmarks.decode --tensorflow_python=/tmp/tensorflow/bin/python
"""

import contextlib
import importlib.metadata
import io
import math
import multiprocessing
import os
import pathlib
import pickle
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import cv2
import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from PIL import Image

from benchmarks import machine, tables
from experiments import program
from skipinit_jax.data import decode, streaming
from skipinit_jax.data.decode import Window
from skipinit_jax.data.prepare import sample_photos
from skipinit_jax.errors import UsageError

_TENSORFLOW_PYTHON = flags.DEFINE_string(
  "tensorflow_python",
  None,
  "Python interpreter that has TensorFlow, to compare with tf.data, which is left out "
  "without it.",
)
_DATA_DIR = flags.DEFINE_string(
  "data_dir",
  None,
  f"Where {sample_photos.NAME} is prepared. By default it is, in a temporary folder.",
)
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
# Neither source tells how many epochs those runs took: about 40 are usual at batch
# sizes of a few thousand. The time of evaluation is neglected.
_MLPERF_EPOCHS = 40
_IMAGENET_EXAMPLES = 1_281_167

# What the interpreter with TensorFlow runs: a pass over the files for each line that it
# reads, whose seconds of a core it prints.
_TENSORFLOW_PROGRAM = """
import os, pickle, sys, time
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)
files, rounds, size = pickle.load(sys.stdin.buffer)

def crop(encoded, window):
  image = tf.image.decode_and_crop_jpeg(encoded, window, channels=3)
  image = tf.image.resize([image], [size, size], method="bilinear")[0]
  return tf.cast(tf.round(image), tf.uint8)

print(tf.__version__, flush=True)
for windows in rounds:
  data = tf.data.Dataset.from_tensor_slices((files, windows)).map(crop)
  options = tf.data.Options()
  options.threading.private_threadpool_size = 1
  data = data.with_options(options)
  first = next(iter(data))
  sys.stdin.buffer.readline()
  begin = time.process_time()
  for image in data:
    pass
  print(time.process_time() - begin, first.numpy().mean(), flush=True)
"""


def crop_with_pillow(encoded: bytes, window: Window) -> np.ndarray:
  """Decodes and crops as torchvision does: uint8 [size, size, 3]."""
  with Image.open(io.BytesIO(encoded)) as image:
    top, left, height, width = window
    cropped = image.convert("RGB").crop((left, top, left + width, top + height))
    return np.asarray(cropped.resize((_SIZE, _SIZE), Image.Resampling.BILINEAR))


def crop_with_this_package(encoded: bytes, window: Window) -> np.ndarray:
  """Decodes and crops as the input pipeline does: uint8 [size, size, 3]."""
  return decode.decode(encoded, lambda height, width: window, _SIZE)


def one_pass(
  crop: Callable[[bytes, Window], np.ndarray],
  files: Sequence[bytes],
  windows: Sequence[Window],
) -> float:
  """Returns the seconds of a core that all files take."""
  begin = time.process_time()
  for encoded, window in zip(files, windows, strict=True):
    crop(encoded, window)
  return time.process_time() - begin


@contextlib.contextmanager
def tensorflow_pass(
  python: str, files: Sequence[bytes], rounds: Sequence[Sequence[Window]]
) -> Iterator[tuple[str, Callable[[], tuple[float, float]]]]:
  """Starts TensorFlow; gives its version and what runs the next round.

  Args:
    python: an interpreter that has TensorFlow.
    files: JPEG files, as bytes.
    rounds: the windows of each round.
  """
  with subprocess.Popen(
    [python, "-c", _TENSORFLOW_PROGRAM],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    # No GPU: it would only be looked for.
    env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
  ) as process:
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout
    pickle.dump((list(files), [list(map(tuple, r)) for r in rounds], _SIZE), stdin)
    stdin.flush()
    version = stdout.readline().decode().strip()
    if not version:
      raise UsageError(f"--tensorflow_python is {python!r}: it cannot run TensorFlow.")

    def run() -> tuple[float, float]:
      stdin.write(b"\n")
      stdin.flush()
      seconds, mean = map(float, stdout.readline().split())
      return seconds, mean

    yield version, run


def measure_ways(files: Sequence[bytes]) -> dict[str, list[float]]:
  """Returns the images a core second of each way, round by round."""
  rng = np.random.default_rng(0)
  sizes = [Image.open(io.BytesIO(encoded)).size for encoded in files]
  rounds = [
    [decode.random_window(rng, height, width) for width, height in sizes]
    for _ in range(_ROUNDS.value)
  ]
  ways: dict[str, Callable[[int], float]] = {
    "skipinit_jax": lambda i: one_pass(crop_with_this_package, files, rounds[i]),
    "Pillow": lambda i: one_pass(crop_with_pillow, files, rounds[i]),
  }
  with contextlib.ExitStack() as stack:
    if _TENSORFLOW_PYTHON.value:
      version, run = stack.enter_context(
        tensorflow_pass(_TENSORFLOW_PYTHON.value, files, rounds)
      )

      def run_tensorflow(i: int) -> float:
        seconds, mean = run()
        # All ways see the same: the mean levels of the first image agree.
        assert abs(mean - crop_with_pillow(files[0], rounds[i][0]).mean()) < 3
        return seconds

      ways[f"tf.data {version}"] = run_tensorflow
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(_ROUNDS.value):
      for name, way in ways.items():
        rates[name].append(len(files) / way(i))
  return rates


def measure_pipeline(
  dataset: streaming.StreamedDataset, num_workers: int
) -> tuple[float, float]:
  """Returns the images a second, and a core second, of the whole pipeline."""
  batches = streaming.train_batches(
    dataset, batch_size=_BATCH_SIZE, seed=0, num_workers=num_workers
  )
  with contextlib.closing(batches):
    # Workers start, and their buffers fill.
    for _ in range(1 + 4 * num_workers):
      next(batches)
    begin, cpu_begin = time.perf_counter(), _cpu_seconds()
    for _ in range(_BATCHES_PER_ROUND):
      next(batches)
    seconds, cpu_seconds = time.perf_counter() - begin, _cpu_seconds() - cpu_begin
  images = _BATCHES_PER_ROUND * _BATCH_SIZE
  return images / seconds, images / cpu_seconds


def _cpu_seconds() -> float:
  """Returns the time that this process and its workers have computed for."""
  total = time.process_time()
  for child in multiprocessing.active_children():
    stat = pathlib.Path(f"/proc/{child.pid}/stat").read_text()
    user, system = stat.rpartition(")")[2].split()[11:13]
    total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
  return total


def main() -> None:
  """Prints tables to standard error, and one JSON object to standard output."""
  cv2.setNumThreads(1)
  with contextlib.ExitStack() as stack:
    data_dir = _DATA_DIR.value
    if data_dir is None:
      data_dir = stack.enter_context(tempfile.TemporaryDirectory())
      sample_photos.prepare(data_dir)
    dataset = streaming.load(sample_photos.NAME, data_dir=data_dir, image_size=_SIZE)
    builder = tfds.builder_from_directory(dataset.train.folder)
    raw = {"image": tfds.decode.SkipDecoding()}
    records = builder.as_data_source("train", decoders=raw)
    files = [record["image"] for record in records]
    ways = measure_ways(files)
    pipeline: dict[int, list[tuple[float, float]]] = {n: [] for n in _NUM_WORKERS}
    for _ in range(_PIPELINE_ROUNDS):
      for num_workers, rounds in pipeline.items():
        rounds.append(measure_pipeline(dataset, num_workers))

  images_per_core_second = {
    name: machine.summary(rates) for name, rates in ways.items()
  }
  whole = {
    str(num_workers): {
      "images_per_second": machine.summary([wall for wall, _ in rounds]),
      "images_per_core_second": machine.summary([cpu for _, cpu in rounds]),
    }
    for num_workers, rounds in pipeline.items()
  }
  per_core = whole[str(max(_NUM_WORKERS))]["images_per_core_second"]["median"]
  chips = {}
  for chip, minutes in _MINUTES_ON_8_CHIPS.items():
    needed = _MLPERF_EPOCHS * _IMAGENET_EXAMPLES / (8 * 60 * minutes)
    chips[chip] = {
      "images_per_second": float(f"{needed:.3g}"),
      "cores": math.ceil(needed / per_core),
    }

  tables.show(
    "decode",
    {
      "machine": f"{os.cpu_count()} x {machine.cpu_name()}",
      "versions": {
        name: importlib.metadata.version(name)
        for name in ("grain", "opencv-python-headless", "pillow", "simplejpeg")
      },
      "files": {
        "number": len(files),
        "mean_bytes": round(statistics.mean(map(len, files))),
        "image_size": _SIZE,
      },
      "images_per_core_second": images_per_core_second,
      "pipeline_by_workers": whole,
      "chips": chips,
    },
  )


if __name__ == "__main__":
  program.run(main)
