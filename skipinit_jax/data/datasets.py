"""Data sets as arrays in memory: by name, from local files only.

`load` decodes a set once and keeps its arrays in a cache file: to decode 60,000 images
takes ten seconds, and to import scikit-learn several.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging

from skipinit_jax import errors
from skipinit_jax.data import image_folder, prepared
from skipinit_jax.files import (
  cache_path,
  check_name,
  local_path,
  local_workdir,
  write_file,
)

_NUM_CLASSES = {"digits": 10, "fashion_mnist": 10, "cifar10": 10, "cifar100": 100}
# Images of half the resolution, for studies on two cores: of what, and how many of its
# first training examples.
_HALVED: dict[str, tuple[str, int | None]] = {
  "fashion_mnist_half": ("fashion_mnist", None),
  "fashion_mnist_half_16384": ("fashion_mnist", 16384),
  "fashion_mnist_half_4096": ("fashion_mnist", 4096),
  "fashion_mnist_quarter_2048": ("fashion_mnist_half", 2048),
}
STREAMED_NAMES: tuple[str, ...] = ("imagenet2012", "sample_photos", image_folder.NAME)
"""The names of the data sets too large for memory, which `streaming.load` takes."""

NAMES: tuple[str, ...] = (*_NUM_CLASSES, *_HALVED, *STREAMED_NAMES)
"""The names of this package's data sets."""

PREPARED_NAMES: tuple[str, ...] = tuple(
  name for name in NAMES if name not in ("digits", image_folder.NAME)
)
"""The names of the data sets that are read from files of tensorflow-datasets."""

_TITLES = {
  "digits": "scikit-learn's 8x8 digits",
  "fashion_mnist": "Fashion-MNIST",
  "fashion_mnist_half": "Fashion-MNIST at 14x14",
  "fashion_mnist_half_16384": "16,384 images of Fashion-MNIST at 14x14",
  "fashion_mnist_half_4096": "4,096 images of Fashion-MNIST at 14x14",
  "fashion_mnist_quarter_2048": "2,048 images of Fashion-MNIST at 7x7",
  "cifar10": "CIFAR-10",
  "cifar100": "CIFAR-100",
  "imagenet2012": "ImageNet",
  "sample_photos": "sample photographs",
  image_folder.NAME: "a folder of images",
}

# Data sets of users, as functions that make them and as folders of images.
_registered: dict[str, Callable[[], "Dataset"]] = {}
_folders: dict[str, pathlib.Path] = {}

# 23 batches of 64; the other 325 digits are the test set.
_DIGITS_TRAIN_EXAMPLES = 1472
_DECODE_CHUNK = 1024
_CACHE_FORMAT = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """Examples in memory.

  Attributes:
    images: uint8 [num_examples, height, width, channels].
    labels: int32 [num_examples].
  """

  images: np.ndarray
  labels: np.ndarray

  @property
  def num_examples(self) -> int:
    """How many examples the split holds."""
    return len(self.labels)

  @functools.cached_property
  def sha256(self) -> str:
    """The start of a digest of images and labels."""
    digest = hashlib.sha256()
    for array in (self.images, self.labels):
      digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """A data set in memory, with the statistics that normalize its images.

  Attributes:
    name: one of `known_names()` that is not streamed.
    num_classes: labels lie in [0, num_classes).
    train: the training examples.
    test: the test examples.
  """

  name: str
  num_classes: int
  train: Split
  test: Split

  @property
  def image_shape(self) -> tuple[int, ...]:
    """Height, width and channels of an image."""
    return self.train.images.shape[1:]

  @property
  def mean(self) -> np.ndarray:
    """Mean of the training pixels in 0..1, float32 [channels]."""
    return self._statistics[0]

  @property
  def std(self) -> np.ndarray:
    """Their standard deviation, 1 for a constant channel, float32 [channels]."""
    return self._statistics[1]

  def record(self) -> dict[str, Any]:
    """Returns what tells these data from others: values of JSON."""
    splits = {
      name: {
        "num_examples": split.num_examples,
        "image_shape": list(split.images.shape[1:]),
        "dtype": str(split.images.dtype),
        "sha256": split.sha256,
      }
      for name, split in (("train", self.train), ("test", self.test))
    }
    return {"num_classes": self.num_classes, **splits}

  @functools.cached_property
  def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
    # A histogram is exact and needs no float copy of all the images.
    images = self.train.images
    channels = images.shape[-1]
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, len(images), _DECODE_CHUNK):
      chunk = images[start : start + _DECODE_CHUNK]
      for channel in range(channels):
        counts[channel] += np.bincount(chunk[..., channel].ravel(), minlength=256)
    levels = np.arange(256) / 255
    weights = counts / counts.sum(axis=1, keepdims=True)
    mean = weights @ levels
    std = np.sqrt((weights * (levels - mean[:, None]) ** 2).sum(axis=1))
    std[std == 0] = 1
    return mean.astype(np.float32), std.astype(np.float32)


def register(name: str, make: Callable[[], Dataset] | str | os.PathLike[str]) -> None:
  """Adds a data set of your own, so that programs and studies find it by its name.

  A study's worker processes import the module that was started, so register there, at
  its top level, as with `methods.register`.

  Args:
    name: what `dataset` names in every configuration.
    make: returns the data set, and is called once in each process that trains; or a
      folder of class folders of images, which is streamed: see `image_folder`.

  Raises:
    UsageError: another data set has the name, a folder cannot have it, or `make` is
      neither a function nor a path.
  """
  check_name("data set", name)
  if name in known_names():
    raise errors.UsageError(f"name is {name!r}, which is that of another data set.")
  if isinstance(make, str | os.PathLike):
    _folders[name] = local_workdir(make, "folder of a data set")
    return
  if not callable(make):
    raise errors.UsageError(f"make is {make!r}: it must be a function or a path.")
  _registered[name] = functools.cache(functools.partial(_make, name, make))


def title(name: str) -> str:
  """Returns the name of a data set for people."""
  return _TITLES.get(name, name)


def known_names() -> tuple[str, ...]:
  """Returns the names of all data sets: `NAMES` and those that were registered."""
  return (*NAMES, *_registered, *_folders)


def folder(name: str) -> pathlib.Path | None:
  """Returns the folder that was registered under a name; None: none was."""
  return _folders.get(name)


def is_streamed(name: str) -> bool:
  """Tells whether `streaming.load` takes a data set, and not `load`."""
  return name in STREAMED_NAMES or name in _folders


def load(
  name: str, *, data_dir: str | None = None, cache_dir: str | None = None
) -> Dataset:
  """Loads a data set from local files; never downloads one.

  `digits` comes with scikit-learn: 8x8 images scaled from 0..16 to 0..255, the first
  1472 for training and the last 325 for testing. The other sets are read from the files
  that tensorflow-datasets prepared (ArrayRecord, which needs no TensorFlow), in their
  order. `fashion_mnist_half` is Fashion-MNIST with the mean of each 2x2 pixels;
  `fashion_mnist_half_4096` and `fashion_mnist_half_16384` have its first 4,096 and
  16,384 training images. `fashion_mnist_quarter_2048` has the first 2,048 of half its
  resolution. A registered set comes from its function.

  Args:
    name: one of `known_names()` that is not streamed.
    data_dir: where tensorflow-datasets prepared the set; by default the
      environment variable TFDS_DATA_DIR or ~/tensorflow_datasets.
    cache_dir: where the decoded arrays are kept; by default skipinit_jax/data in
      $XDG_CACHE_HOME or ~/.cache. Where it cannot be written, nothing is kept. Whoever
      may read the folder may read them.

  Returns:
    The data set: images uint8 [N, H, W, C], labels int32 [N].

  Raises:
    UsageError: the name is unknown or that of a streamed set; the set is not prepared
      in `data_dir`; its files or its cache are damaged; or a registered set cannot be
      made, or has arrays of another type or shape.
  """
  if name in _registered:
    return _registered[name]()
  if name not in known_names():
    raise errors.unknown_name("dataset", name, known_names())
  if is_streamed(name):
    raise errors.UsageError(
      f"Dataset {name!r} is streamed, but is needed in memory here: choose one of "
      f"{', '.join((*_NUM_CLASSES, *_HALVED))}."
    )
  if name in _HALVED:
    whole, num_train = _HALVED[name]
    full = load(whole, data_dir=data_dir, cache_dir=cache_dir)
    train = _halved(full.train, num_train)
    return Dataset(name, full.num_classes, train, _halved(full.test))
  if name == "digits":
    with errors.extra("train"):
      source = f"digits of scikit-learn {importlib.metadata.version('scikit-learn')}"
    decode = _decode_digits
  else:
    builder = prepared.open_builder(name, data_dir)
    source = _prepared_source(builder)
    decode = functools.partial(_decode_prepared, builder)
  cache = cache_path("data") if cache_dir is None else local_path(cache_dir)
  if cache is None:
    train, test = decode()
  else:
    train, test = _cached(cache / f"{name}.npz", source, decode)
  dataset = Dataset(name, _NUM_CLASSES[name], train, test)
  _check(dataset)
  return dataset


def _halved(split: Split, num_examples: int | None = None) -> Split:
  """Returns the first examples with the mean of each 2x2 pixels, rounded."""
  images, labels = split.images[:num_examples], split.labels[:num_examples]
  squares = [images[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
  return Split(np.floor(np.mean(squares, axis=0) + 0.5).astype(np.uint8), labels)


def _make(name: str, make: Callable[[], Dataset]) -> Dataset:
  """Returns what a user's function makes, with arrays of NumPy in place of others."""
  try:
    made = make()
    train, test = (
      Split(np.asarray(split.images), np.asarray(split.labels))
      for split in (made.train, made.test)
    )
    _check(dataclasses.replace(made, train=train, test=test))
    # Integers are int64 where nobody says otherwise.
    train, test = (
      Split(split.images, split.labels.astype(np.int32)) for split in (train, test)
    )
    dataset = dataclasses.replace(made, train=train, test=test)
  except errors.UsageError:
    raise
  except Exception as error:
    raise errors.UsageError(
      f"Data set {name!r} cannot be made: its function raised an error or returned no "
      f"Dataset ({type(error).__name__}: {str(error).partition(chr(10))[0]})."
    ) from error
  return dataset


def _check(dataset: Dataset) -> None:
  """Raises a UsageError if arrays would not train, or train something else."""
  for title, split in (("train", dataset.train), ("test", dataset.test)):
    images, labels = split.images, split.labels
    problem = ""
    if images.dtype != np.uint8 or images.ndim != 4:
      problem = (
        f"images are {images.dtype} of shape {images.shape}, but must be uint8 "
        "[num_examples, height, width, channels]"
      )
    elif images.shape[1:] != dataset.image_shape:
      problem = (
        f"images have shape {images.shape[1:]}, those of training {dataset.image_shape}"
      )
    elif labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
      problem = (
        f"labels are {labels.dtype} of shape {labels.shape}, but must be integers of "
        f"shape ({len(images)},)"
      )
    elif not images.size:
      problem = "there are no examples, or images without pixels"
    elif not 0 <= labels.min() <= labels.max() < dataset.num_classes:
      problem = (
        f"labels are {labels.min()} to {labels.max()}, but num_classes is "
        f"{dataset.num_classes}"
      )
    if problem:
      raise errors.UsageError(f"Data set {dataset.name!r}, {title}: {problem}.")


def _decode_digits() -> tuple[Split, Split]:
  from sklearn import datasets

  digits = datasets.load_digits()
  images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)
  labels = digits.target.astype(np.int32)
  n = _DIGITS_TRAIN_EXAMPLES
  return Split(images[:n], labels[:n]), Split(images[n:], labels[n:])


def _prepared_source(builder: Any) -> str:
  """Returns a text that changes whenever the prepared files do."""
  import tensorflow_datasets as tfds

  paths = sorted(pathlib.Path(builder.data_path).iterdir())
  files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
  digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
  return f"{builder.info.full_name} of tfds {tfds.__version__}, files {digest}"


def _decode_prepared(builder: Any) -> tuple[Split, Split]:
  shape = builder.info.features["image"].shape

  def decode(split: str) -> Split:
    records = builder.as_data_source(split)
    images = np.empty((len(records), *shape), np.uint8)
    labels = np.empty(len(records), np.int32)
    for start in range(0, len(records), _DECODE_CHUNK):
      chunk = range(start, min(start + _DECODE_CHUNK, len(records)))
      for index, example in zip(chunk, records.__getitems__(list(chunk)), strict=True):
        images[index] = example["image"]
        labels[index] = example["label"]
    return Split(images, labels)

  with prepared.damage_errors(f"The data set {builder.name!r}", builder.data_path):
    return decode("train"), decode("test")


def _cached(
  path: pathlib.Path, source: str, decode: Callable[[], tuple[Split, Split]]
) -> tuple[Split, Split]:
  """Returns what `decode` does, from the cache if it was made from `source`."""
  source = f"cache format {_CACHE_FORMAT}, {source}"
  try:
    splits = _read_cache(path, source)
  except OSError as error:
    logging.warning("Cannot read the data cache %s: %s.", path, error.strerror)
    splits = None
  if splits is None:
    splits = decode()
    try:
      _write_cache(path, source, splits)
    except OSError as error:
      logging.warning("Cannot write the data cache %s: %s.", path, error.strerror)
  return splits


def _read_cache(path: pathlib.Path, source: str) -> tuple[Split, Split] | None:
  """Returns the cached splits, or None if none were made from `source`."""
  try:
    # At once, so that what the system says is not taken for damage.
    content = io.BytesIO(path.read_bytes())
  except FileNotFoundError:
    return None
  try:
    # Reading a member to its end compares it with the archive's checksum.
    with np.load(content, allow_pickle=False) as arrays:
      if str(arrays["source"]) != source:
        return None
      train = Split(arrays["train_images"], arrays["train_labels"])
      return train, Split(arrays["test_images"], arrays["test_labels"])
  except Exception as error:  # A damaged archive raises almost anything.
    raise errors.UsageError(
      f"The data cache {path} is damaged: delete it, and it will be made again."
    ) from error


def _write_cache(path: pathlib.Path, source: str, splits: tuple[Split, Split]) -> None:
  train, test = splits
  archive = io.BytesIO()
  np.savez(
    archive,
    source=np.array(source),
    train_images=train.images,
    train_labels=train.labels,
    test_images=test.images,
    test_labels=test.labels,
  )
  path.parent.mkdir(parents=True, exist_ok=True)
  # Other processes, and other users of a shared folder, may read or write it too.
  write_file(path, archive.getvalue(), mode=path.parent.stat().st_mode & 0o644 | 0o600)
