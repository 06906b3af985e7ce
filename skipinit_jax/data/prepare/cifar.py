"""CIFAR-10 and CIFAR-100 from their published binary archives."""

import gzip
import io
import os
import pathlib
import tarfile
import zlib
from typing import NamedTuple

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

NAMES: tuple[str, ...] = tuple(_ARCHIVES)
"""Data sets that are published as such archives."""


def prepare(
  name: str, source: str | os.PathLike[str], data_dir: str | None = None
) -> str:
  """Writes the files that `tfds.data_source(name)` and `data.load(name)` read.

  They equal those that tensorflow-datasets writes after it has downloaded the set.
  Nothing is unpacked to disk.

  Args:
    name: one of `NAMES`.
    source: the archive of the binary version, cifar-10-binary.tar.gz or
      cifar-100-binary.tar.gz, or a folder with its files.
    data_dir: where to write; by default the environment variable TFDS_DATA_DIR or
      ~/tensorflow_datasets.

  Returns:
    One sentence on what was done: prepared, or already prepared.

  Raises:
    UsageError: the name is not in `NAMES`; the archive lacks a file, or is damaged or
      another one; `data_dir` cannot be written, or holds other files for this data set.
  """
  if name not in NAMES:
    raise errors.unknown_name("dataset of CIFAR's archives", name, NAMES)
  archive, path = _ARCHIVES[name], local_path(source)
  files = _read(archive, path)
  splits, more = {}, {}
  for split, names in archive.splits.items():
    records = np.concatenate([_records(archive, path, n, files[n]) for n in names])
    num_labels = len(archive.class_names)
    images = records[:, num_labels:].reshape(-1, *_IMAGE).transpose(0, 2, 3, 1)
    labels = dict(zip(archive.class_names, records.T.astype(np.int32), strict=False))
    splits[split] = Split(images, labels.pop("label"))
    ids = [f"{split}_{number:05d}" for number in range(len(records))]
    more[split] = {"id": ids, **labels}
  return tfds_files.write_arrays(
    name,
    splits,
    data_dir=prepared.directory(data_dir),
    where=f"in {path}",
    more=more,
    class_names={
      label: files[file].decode(errors="replace").split()
      for label, file in archive.class_names.items()
    },
  )


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
