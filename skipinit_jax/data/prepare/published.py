"""Data sets from the files in which they are published.

CIFAR-10 and CIFAR-100 are binary archives, Fashion-MNIST is IDX files, the format of
MNIST.
"""

import gzip
import io
import math
import os
import pathlib
import tarfile
import zlib
from typing import NamedTuple, TypeAlias

import numpy as np

from skipinit_jax import errors
from skipinit_jax.data import prepared
from skipinit_jax.data.prepare import tfds_files
from skipinit_jax.data.prepare.tfds_files import Splits
from skipinit_jax.files import local_path

__all__ = [
  "ARCHIVES",
  "IDX",
  "prepare",
]

IDX: tuple[str, ...] = ("fashion_mnist",)
"""Data sets that are published as IDX files, under the names that MNIST's have."""

_FILE_PREFIXES = {"train": "train", "test": "t10k"}


class _Archive(NamedTuple):
  """What an archive holds.

  Attributes:
    title: the archive's own name.
    splits: the files of each split. A record is a byte for each kind of label, and an
      image's 32 x 32 bytes of red, green and blue, row by row.
    class_names: the file with the classes' names, by each kind of label, in the order
      of their bytes.
  """

  title: str
  splits: dict[str, tuple[str, ...]]
  class_names: dict[str, str]


_ARCHIVES = {
  "cifar10": _Archive(
    "cifar-10-binary.tar.gz",
    {
      "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
      "test": ("test_batch.bin",),
    },
    {"label": "batches.meta.txt"},
  ),
  "cifar100": _Archive(
    "cifar-100-binary.tar.gz",
    {"train": ("train.bin",), "test": ("test.bin",)},
    {"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"},
  ),
}
_IMAGE = (3, 32, 32)
_GZIP = b"\x1f\x8b"

ARCHIVES: tuple[str, ...] = tuple(_ARCHIVES)
"""Data sets that are published as archives of binary files."""


_Published: TypeAlias = tuple[Splits, dict[str, list[str]]]
"""What files hold: examples, and the names of the classes by each kind of label."""


def prepare(
  name: str, source: str | os.PathLike[str], data_dir: str | None = None
) -> str:
  """Writes the files that `tfds.data_source(name)` and `data.load(name)` read.

  They equal those that tensorflow-datasets writes after it has downloaded the set.
  Nothing is unpacked to disk.

  Args:
    name: one of `IDX` or `ARCHIVES`.
    source: the folder with the four IDX files, gzipped or not; or the archive of the
      binary version, cifar-10-binary.tar.gz or cifar-100-binary.tar.gz, or a folder
      with its files.
    data_dir: where to write; by default the environment variable TFDS_DATA_DIR or
      ~/tensorflow_datasets.

  Returns:
    One sentence on what was done: prepared, or already prepared.

  Raises:
    UsageError: the name is another one; a file is missing, is damaged or does not fit;
      `data_dir` cannot be written, or holds other files for this data set.
  """
  if name not in (*IDX, *ARCHIVES):
    raise errors.unknown_name("published dataset", name, (*IDX, *ARCHIVES))
  path, data_dir = local_path(source), prepared.directory(data_dir)
  read = _read_idx_folder(path) if name in IDX else _read_cifar(_ARCHIVES[name], path)
  return tfds_files.write_arrays(name, *read, data_dir=data_dir, where=f"in {path}")


def _read_cifar(archive: _Archive, path: pathlib.Path) -> _Published:
  files = _read(archive, path)
  splits: Splits = {}
  for split, names in archive.splits.items():
    records = np.concatenate([_records(archive, path, n, files[n]) for n in names])
    num_labels = len(archive.class_names)
    images = records[:, num_labels:].reshape(-1, *_IMAGE).transpose(0, 2, 3, 1)
    labels = dict(zip(archive.class_names, records.T.astype(np.int32), strict=False))
    ids = [f"{split}_{number:05d}" for number in range(len(records))]
    splits[split] = {"image": images, "id": ids, **labels}
  class_names = {
    label: files[file].decode(errors="replace").split()
    for label, file in archive.class_names.items()
  }
  return splits, class_names


def _read(archive: _Archive, source: pathlib.Path) -> dict[str, bytes]:
  """Returns the contents of an archive's files by their names."""
  names = {*sum(archive.splits.values(), ()), *archive.class_names.values()}
  found = {}
  try:
    if source.is_dir():
      found = {n: (source / n).read_bytes() for n in names if (source / n).exists()}
    else:
      content = source.read_bytes()
      # As a whole, which compares it with its checksum.
      content = gzip.decompress(content) if content[:2] == _GZIP else content
      with tarfile.open(fileobj=io.BytesIO(content)) as members:
        for member in members:
          name = os.path.basename(member.name)
          file = members.extractfile(member) if name in names else None
          if file is not None:
            found[name] = file.read()
  except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error) as error:
    reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    raise errors.UsageError(
      f"Source {source} cannot be read ({reason.rstrip('.:')}): it must be "
      f"{archive.title} as it was published, or a folder with its files."
    ) from None
  if missing := sorted(names - found.keys()):
    raise errors.UsageError(
      f"Source {source} has no {missing[0]}: it must be {archive.title}, the binary "
      "version of https://www.cs.toronto.edu/~kriz/cifar.html, or a folder with its "
      "files."
    )
  return found


def _records(
  archive: _Archive, source: pathlib.Path, name: str, content: bytes
) -> np.ndarray:
  """Returns the records of a file: uint8 [num_records, bytes]."""
  size = len(archive.class_names) + int(np.prod(_IMAGE))
  if not content or len(content) % size:
    raise errors.UsageError(
      f"{name} in {source} has {len(content)} bytes, which are no records of {size} "
      f"bytes each: it is damaged, or not of {archive.title}."
    )
  return np.frombuffer(content, np.uint8).reshape(-1, size)


def _read_idx_folder(folder: pathlib.Path) -> _Published:
  if not folder.is_dir():
    raise errors.UsageError(f"Source {str(folder)!r} is not a folder.")
  splits: Splits = {}
  for split, prefix in _FILE_PREFIXES.items():
    images = _read_idx(folder / f"{prefix}-images-idx3-ubyte", 3)[..., None]
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte", 1)
    splits[split] = {"image": images, "label": labels}
  return splits, {}


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
