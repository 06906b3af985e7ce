"""Data sets of IDX files, the format of MNIST."""

import gzip
import math
import os
import pathlib
import zlib

import numpy as np

from skipinit_jax import errors
from skipinit_jax.data import prepared
from skipinit_jax.data.datasets import Split
from skipinit_jax.data.prepare import tfds_files
from skipinit_jax.files import local_path

__all__ = [
  "NAMES",
  "prepare",
]

NAMES: tuple[str, ...] = ("fashion_mnist",)
"""Data sets that are published as IDX files, under the names that MNIST's have."""

_FILE_PREFIXES = {"train": "train", "test": "t10k"}


def prepare(
  name: str, source: str | os.PathLike[str], data_dir: str | None = None
) -> str:
  """Writes the files that `tfds.data_source(name)` and `data.load(name)` read.

  They equal those that tensorflow-datasets writes after it has downloaded the set.

  Args:
    name: one of `NAMES`.
    source: folder with the four IDX files, gzipped or not.
    data_dir: where to write; by default the environment variable TFDS_DATA_DIR or
      ~/tensorflow_datasets.

  Returns:
    One sentence on what was done: prepared, or already prepared.

  Raises:
    UsageError: the name is not in `NAMES`; an IDX file is missing, is damaged or does
      not fit; `data_dir` cannot be written, or holds other files for this data set.
  """
  if name not in NAMES:
    raise errors.unknown_name("dataset of IDX files", name, NAMES)
  folder, data_dir = local_path(source), prepared.directory(data_dir)
  if not folder.is_dir():
    raise errors.UsageError(f"Source {str(source)!r} is not a folder.")
  splits = {
    split: _read_split(folder, prefix) for split, prefix in _FILE_PREFIXES.items()
  }
  return tfds_files.write_arrays(name, splits, data_dir=data_dir, where=f"in {folder}")


def _read_split(folder: pathlib.Path, prefix: str) -> Split:
  images = _read_idx(folder / f"{prefix}-images-idx3-ubyte", 3)[..., None]
  labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte", 1)
  return Split(images, labels.astype(np.int32))


def _read_idx(path: pathlib.Path, num_dimensions: int) -> np.ndarray:
  """Reads an IDX file of unsigned bytes, gzipped if `path` itself is missing."""
  zipped = path.with_name(f"{path.name}.gz")
  if not path.exists():
    if not zipped.exists():
      raise errors.UsageError(f"There is neither {zipped} nor {path.name} beside it.")
    path = zipped
  try:
    content = path.read_bytes()
    if path == zipped:
      content = gzip.decompress(content)
  except (OSError, EOFError, zlib.error) as error:
    raise errors.UsageError(f"Cannot read {path}: {error}.") from error
  # Two zero bytes, 8 for unsigned bytes, the number of dimensions, and the size
  # of each as a big-endian integer.
  header = 4 + 4 * num_dimensions
  if len(content) < header or content[:4] != bytes([0, 0, 8, num_dimensions]):
    raise errors.UsageError(
      f"{path} is not an IDX file of unsigned bytes with {num_dimensions} dimensions."
    )
  shape = tuple(np.frombuffer(content[4:header], ">u4").tolist())
  if len(content) - header != math.prod(shape):
    raise errors.UsageError(
      f"{path} holds {len(content) - header} bytes of data where its header says "
      f"{' x '.join(map(str, shape))}."
    )
  return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
