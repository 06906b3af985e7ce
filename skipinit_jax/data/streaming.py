"""Batches of a data set that is decoded while it is trained on, such as ImageNet.

Grain runs worker processes that read records in any order, decode and crop them. A
training batch is a function of the seed, the batch size and the batch's number alone:
it depends neither on the number of processes or workers nor on where a run resumed. So
there is no state to save, and a run resumes at any batch at once.

A program that uses workers must start below `if __name__ == "__main__":`, because each
worker imports its main module. Workers never use JAX's devices.
"""

import abc
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent import futures
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
from absl import flags
from etils import epath

from skipinit_jax import errors
from skipinit_jax.cores import num_cores
from skipinit_jax.data import datasets, decode, image_folder, in_memory, prepared
from skipinit_jax.data.image_folder import FolderSplit

__all__ = [
  "StreamedDataset",
  "StreamedSplit",
  "eval_batches",
  "load",
  "num_workers",
  "train_batches",
]

# The statistics of ImageNet's training pixels that torchvision and others use.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_TEST_SPLIT = "validation"

# Workers hand over pieces of a batch, so that all of them work on the next batch. A
# piece has at most this many rows, so that memory does not grow with the batch size.
_MAX_PIECE_ROWS = 64
# Upper bound for the pieces of one worker that lie in shared memory at a time.
_PIECES_PER_WORKER = 4
# Each process decodes pieces in some threads, and reads records ahead for all of them
# in others, which hides the latency of remote storage.
_DECODING_THREADS = 2
_READING_THREADS = 16
_DIGEST_BYTES = 2**16
_SHARED_MEMORY = "/dev/shm"

# A part of each random generator's seed: what it is for.
_ORDER, _CROP = 0, 1


@dataclasses.dataclass(frozen=True)
class StreamedSplit:
  """A split in tensorflow-datasets' ArrayRecord files.

  Attributes:
    folder: the folder of the prepared files.
    name: what tensorflow-datasets calls it, such as "validation".
    num_examples: how many examples it holds.
  """

  folder: str
  name: str
  num_examples: int

  def record(self) -> dict[str, Any]:
    """Returns what tells its files from others without reading them all.

    Returns:
      Number of examples and files, bytes, the start of a digest of the files' names
      and sizes and of the ends of the first one, and `image_folder.content_digest`.
    """
    folder = epath.Path(self.folder)
    paths = sorted(folder.glob(f"*-{self.name}.*"))
    sizes = [(path.name, path.stat().length) for path in paths]
    digest = hashlib.sha256(json.dumps(sizes).encode())
    if paths:
      with paths[0].open("rb") as file:
        digest.update(file.read(_DIGEST_BYTES))
        file.seek(max(0, sizes[0][1] - _DIGEST_BYTES))
        digest.update(file.read())
    return {
      "num_examples": self.num_examples,
      "files": len(paths),
      "bytes": sum(size for _, size in sizes),
      "sha256": digest.hexdigest()[:16],
      "content": image_folder.content_digest(paths),
    }

  def open(self) -> Any:
    """Returns the records by their numbers, with images as the bytes of their files."""
    import tensorflow_datasets as tfds

    with prepared.damage_errors(f"The {self.name} split", self.folder):
      builder = tfds.builder_from_directory(self.folder)
      raw = {"image": tfds.decode.SkipDecoding()}
      return builder.as_data_source(self.name, decoders=raw)


@dataclasses.dataclass(frozen=True)
class StreamedDataset:
  """A data set in files, whose batches are decoded as they are needed.

  Attributes:
    name: one that `datasets.is_streamed`.
    num_classes: labels lie in [0, num_classes).
    image_size: height and width of the images in batches.
    train: the training examples.
    test: the examples to evaluate on: ImageNet's validation set.
  """

  name: str
  num_classes: int
  image_size: int
  train: StreamedSplit | FolderSplit
  test: StreamedSplit | FolderSplit

  @property
  def image_shape(self) -> tuple[int, ...]:
    """Height, width and channels of an image in a batch."""
    return self.image_size, self.image_size, 3

  def record(self) -> dict[str, Any]:
    """Returns what tells these data from others: values of JSON."""
    splits = {split.name: split.record() for split in (self.train, self.test)}
    return {"num_classes": self.num_classes, **splits}

  @property
  def mean(self) -> np.ndarray:
    """Mean of ImageNet's training pixels in 0..1, float32 [3]."""
    return np.array(_MEAN, np.float32)

  @property
  def std(self) -> np.ndarray:
    """Their standard deviation, float32 [3]."""
    return np.array(_STD, np.float32)


def load(
  name: str, *, data_dir: str | None = None, image_size: int = 224
) -> StreamedDataset:
  """Finds the files of a data set; never downloads one.

  Args:
    name: one that `datasets.is_streamed`.
    data_dir: where tensorflow-datasets, or `experiments.prepare_data`, prepared the
      set; by default the environment variable TFDS_DATA_DIR or
      ~/tensorflow_datasets. The folder itself of `image_folder`, which needs no
      preparation; a registered folder has its own.
    image_size: height and width of the images in batches.

  Returns:
    The data set.

  Raises:
    UsageError: the name is not that of a streamed set; the set is not prepared in
      `data_dir` or lacks a split; a folder is no such folder; or the image size is not
      positive.
  """
  if name not in datasets.known_names():
    raise errors.unknown_name("dataset", name, datasets.known_names())
  if not datasets.is_streamed(name):
    raise errors.UsageError(
      f"Dataset {name!r} is in memory, at its own image size, and not streamed: only "
      f"{', '.join(datasets.STREAMED_NAMES)} and registered folders are."
    )
  errors.require_positive(image_size=image_size)
  if name == image_folder.NAME and not data_dir:
    raise errors.UsageError(
      f"data_dir is missing: dataset {name!r} is the folder of that name, with train "
      "and val in it."
    )
  folder = datasets.folder(name) or (data_dir if name == image_folder.NAME else None)
  if folder is not None:
    train, test = image_folder.load(folder, f"Dataset {name!r} in")
    return StreamedDataset(name, len(train.classes), image_size, train, test)
  builder = prepared.open_builder(name, data_dir)
  sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
  for split in ("train", _TEST_SPLIT):
    if not sizes.get(split):
      raise errors.UsageError(
        f"Dataset {name!r} in {builder.data_path} has no {split} examples: delete that "
        "folder and prepare it again."
      )
  return StreamedDataset(
    name=name,
    num_classes=builder.info.features["label"].num_classes,
    image_size=image_size,
    train=StreamedSplit(str(builder.data_path), "train", sizes["train"]),
    test=StreamedSplit(str(builder.data_path), _TEST_SPLIT, sizes[_TEST_SPLIT]),
  )


def num_workers(data_workers: int | None) -> int:
  """Returns how many processes decode on a host; None: one for every two cores."""
  if data_workers is None:
    return max(1, num_cores() // _DECODING_THREADS)
  return data_workers


def train_batches(
  dataset: StreamedDataset,
  *,
  batch_size: int,
  seed: int,
  first_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  num_workers: int = 0,
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
  """Returns one process's part of the training batches, without end.

  Batch number `step` is the one after `step` updates. An epoch has
  `in_memory.steps_per_epoch` batches, and each takes the examples in another order. It
  leaves out the last ones that do not fill a batch. Each example is cropped
  (`decode.random_window`) and, with probability 1/2, mirrored.

  Args:
    batch_size: examples of all processes together.
    seed: decides the order, the crops and the mirroring.
    first_step: number of the first batch.
    process_index: which part: process p of P gets rows p B / P to (p + 1) B / P - 1.
    process_count: number of parts.
    num_workers: processes that decode; 0: threads of this one.

  Returns:
    A generator of images, uint8 [batch_size / process_count, image_size, image_size,
    3], and labels, int32 [batch_size / process_count]. Closing it ends the workers.

  Raises:
    UsageError: the batch size is not between 1 and the number of examples, or is no
      multiple of `process_count`; later, from the generator: a record is damaged.
  """
  steps = in_memory.steps_per_epoch(dataset.train.num_examples, batch_size)
  rows = _rows_per_process(batch_size, process_count)
  pieces = _TrainPieces(
    dataset=dataset,
    split=dataset.train,
    batch_size=batch_size,
    first_row=process_index * rows,
    rows=rows,
    seed=seed,
    steps_per_epoch=steps,
    first_step=first_step,
  )
  return _batches(pieces, None, num_workers)


def eval_batches(
  dataset: StreamedDataset,
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  num_workers: int = 0,
) -> Generator[tuple[np.ndarray, np.ndarray, np.ndarray], None, None]:
  """Returns one process's part of the evaluation batches.

  The examples come in the order of the files, cropped by `decode.center_window`. All
  batches are equal in size, and all processes get as many: the last one is filled up
  with blank examples, so that a sum weighted by the mask counts every example once.

  Args:
    batch_size: examples of all processes together.
    process_index: which part: process p of P gets rows p B / P to (p + 1) B / P - 1.
    process_count: number of parts.
    num_workers: processes that decode; 0: threads of this one.

  Returns:
    A generator of images and labels as `train_batches` gives them, and a mask, bool
    [batch_size / process_count], false where an example only fills up. Closing it
    ends the workers.

  Raises:
    UsageError: the batch size is below 1 or no multiple of `process_count`; later,
      from the generator: a record is damaged.
  """
  if batch_size < 1:
    raise errors.UsageError(f"Evaluation batch size {batch_size} is not at least 1.")
  rows = _rows_per_process(batch_size, process_count)
  pieces = _EvalPieces(
    dataset=dataset,
    split=dataset.test,
    batch_size=batch_size,
    first_row=process_index * rows,
    rows=rows,
  )
  num_batches = math.ceil(dataset.test.num_examples / batch_size)
  return _batches(pieces, num_batches, num_workers)


def _rows_per_process(batch_size: int, process_count: int) -> int:
  if batch_size % process_count:
    raise errors.UsageError(
      f"Batch size {batch_size} is not a multiple of {process_count}, the number of "
      "processes."
    )
  return batch_size // process_count


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  """Returns the order in which an epoch takes the examples: int64 [num_examples]."""
  return np.random.default_rng((_ORDER, seed, epoch)).permutation(num_examples)


@functools.lru_cache
def _open(split: StreamedSplit | FolderSplit) -> Any:
  """Returns the records of a split."""
  records = split.open()
  # The first record imports what reading needs, which two threads at a time may not.
  # An error in it comes again in its turn.
  with contextlib.suppress(Exception):
    records[0]
  return records


@functools.lru_cache
def _readers() -> futures.ThreadPoolExecutor:
  return futures.ThreadPoolExecutor(_READING_THREADS, "skipinit-read")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pieces(abc.ABC):
  """One process's part of all batches, as a random-access source for Grain.

  Element n holds rows of batch n // pieces_per_batch.

  Attributes:
    dataset: the data set.
    split: which of its splits.
    batch_size: examples of all processes together.
    first_row: the process's first row in each batch.
    rows: its number of rows.
  """

  dataset: StreamedDataset
  split: StreamedSplit | FolderSplit
  batch_size: int
  first_row: int
  rows: int

  def __len__(self) -> int:
    # Without end, evaluation too: Grain keeps the shared memory of a worker's last
    # piece until Python collects garbage.
    return sys.maxsize

  def __getitem__(self, piece: int) -> tuple[np.ndarray, ...]:
    batch, part = divmod(piece, self.rows // self.piece_rows)
    start = self.first_row + part * self.piece_rows
    return self.piece(batch, range(start, start + self.piece_rows))

  @functools.cached_property
  def piece_rows(self) -> int:
    """Rows of a piece: the largest divisor that is small enough."""
    sizes = range(1, min(self.rows, _MAX_PIECE_ROWS) + 1)
    return max(size for size in sizes if self.rows % size == 0)

  @abc.abstractmethod
  def piece(self, batch: int, rows: range) -> tuple[np.ndarray, ...]:
    """Returns some rows of a batch; they count over all processes."""

  def decode(
    self, numbers: Sequence[int], windows: Iterable[decode.ChooseWindow]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images and labels of records; what is left of a piece is blank."""
    images = np.zeros((self.piece_rows, *self.dataset.image_shape), np.uint8)
    labels = np.zeros(self.piece_rows, np.int32)
    records = _open(self.split)
    # Reads ahead.
    reading = _readers().map(lambda number: records[number], numbers)
    for row, (number, window) in enumerate(zip(numbers, windows, strict=False)):
      where = f"Record {number} of the {self.split.name} split of {self.dataset.name!r}"
      with prepared.damage_errors(where, self.split.folder):
        record = next(reading)
        encoded, label = record["image"], record["label"]
        if encoded is None:  # What array_record gives of a file that was cut.
          raise ValueError("it is empty")
      try:
        images[row] = decode.decode(encoded, window, self.dataset.image_size)
      except ValueError as error:
        raise errors.UsageError(
          f"{where} in {self.split.folder} (file {os.fsdecode(record['file_name'])!r}) "
          f"is no image that can be decoded ({error}): replace that file, and prepare "
          "the data set again if it was prepared."
        ) from error
      labels[row] = label
    return images, labels


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TrainPieces(_Pieces):
  """Pieces of training batches: images and labels.

  Attributes:
    seed: of everything random.
    steps_per_epoch: number of batches in an epoch.
    first_step: number of the batch that piece 0 belongs to.
  """

  seed: int
  steps_per_epoch: int
  first_step: int

  def piece(self, batch: int, rows: range) -> tuple[np.ndarray, ...]:
    """Returns some rows of a batch, cropped and mirrored at random."""
    step = self.first_step + batch
    epoch, index = divmod(step, self.steps_per_epoch)
    order = _order(self.seed, epoch, self.split.num_examples)
    numbers = order[[index * self.batch_size + row for row in rows]].tolist()
    # A generator for each example, so that it does not matter who decodes it.
    generators = [
      np.random.default_rng((_CROP, self.seed, step * self.batch_size + row))
      for row in rows
    ]
    mirrored = np.array([rng.random() < 0.5 for rng in generators])
    windows = [functools.partial(decode.random_window, rng) for rng in generators]
    images, labels = self.decode(numbers, windows)
    images[mirrored] = images[mirrored, :, ::-1]
    return images, labels


class _EvalPieces(_Pieces):
  """Pieces of evaluation batches: images, labels and mask."""

  def piece(self, batch: int, rows: range) -> tuple[np.ndarray, ...]:
    """Returns some rows of a batch; the blank ones come last."""
    numbers = [batch * self.batch_size + row for row in rows]
    mask = np.array(numbers) < self.split.num_examples
    existing = numbers[: mask.sum()]
    return *self.decode(existing, itertools.repeat(decode.center_window)), mask


def _batches(
  pieces: _Pieces, num_batches: int | None, num_workers: int
) -> Generator[Any, None, None]:
  if num_workers < 0:
    raise errors.UsageError(f"num_workers is {num_workers}: it must be at least 0.")
  piece_bytes = pieces.piece_rows * math.prod(pieces.dataset.image_shape)
  _check_shared_memory(num_workers * _PIECES_PER_WORKER * piece_bytes)
  return _assemble(pieces, num_batches, num_workers)


def _assemble(
  pieces: _Pieces, num_batches: int | None, num_workers: int
) -> Generator[Any, None, None]:
  """Yields the batches that the pieces make up; None: without end."""
  # Imports orbax too, which takes a second.
  with errors.extra("photos"):
    import grain

  if not flags.FLAGS.is_parsed():
    # Grain reads flags of its own, which a notebook or a test has not parsed.
    flags.FLAGS.mark_as_parsed()
  if num_workers == 0:
    _open(pieces.split)
  stream = (
    grain.MapDataset.source(pieces)
    .to_iter_dataset(grain.ReadOptions(_DECODING_THREADS, _DECODING_THREADS))
    .mp_prefetch(
      grain.MultiprocessingOptions(num_workers),
      worker_init_fn=functools.partial(_prepare_worker, pieces.split),
    )
  )
  # Workers start when the first piece is asked for.
  starting = _held_signals() if num_workers else contextlib.nullcontext()
  with contextlib.closing(iter(stream)) as iterator:
    for _ in itertools.count() if num_batches is None else range(num_batches):
      batch: list[np.ndarray] = []
      for start in range(0, pieces.rows, pieces.piece_rows):
        with starting:
          piece = next(iterator)
        starting = contextlib.nullcontext()
        if not batch:
          batch = [np.empty((pieces.rows, *p.shape[1:]), p.dtype) for p in piece]
        # Copied, so that the piece's shared memory is free for another.
        for whole, part in zip(batch, piece, strict=True):
          whole[start : start + len(part)] = part
        piece = part = None
      yield tuple(batch)


@contextlib.contextmanager
def _held_signals() -> Iterator[None]:
  """Starts processes that never get the signals which ask this one to stop.

  Ctrl-C and batch systems signal all processes of a program. This one decides when it
  stops, and may need some more batches until then. Processes and threads that start
  within this block inherit that the signals are blocked.
  """
  # Where this starts later, the thread that starts it unblocks the signals.
  resource_tracker.ensure_running()
  former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _prepare_worker(split: StreamedSplit | FolderSplit, index: int, count: int) -> None:
  """Runs in each worker process before it decodes."""
  del index, count
  threading.Thread(target=_end_with_parent, daemon=True).start()
  # There is a worker for each core.
  import cv2

  cv2.setNumThreads(1)
  _open(split)


def _end_with_parent() -> None:
  """Ends this worker with the process that started it, even if that was killed."""
  parent = multiprocessing.parent_process()
  assert parent is not None
  parent.join()
  os._exit(1)


def _check_shared_memory(needed: int) -> None:
  """Checks for room; a worker that finds none would crash without a message."""
  if not os.path.isdir(_SHARED_MEMORY):
    return
  free = shutil.disk_usage(_SHARED_MEMORY).free
  if free < needed:
    raise errors.UsageError(
      f"{_SHARED_MEMORY} has {free >> 20} MiB free, and num_workers may need "
      f"{math.ceil(needed / 2**20)} MiB: take fewer workers, or enlarge it (Docker: "
      "--shm-size)."
    )
