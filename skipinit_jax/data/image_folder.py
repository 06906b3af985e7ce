"""Folders of class folders of images, as people have them.

    flowers/train/daisy/1.jpg    flowers/val/daisy/8.jpg
    flowers/train/tulip/2.png    flowers/val/tulip/9.jpg

A class is a folder in `train`, and its label the folder's place in sorted order. The
folder to evaluate on is called `val`, `validation` or `test`, the first there is. Files
count by their suffix, in folders of class folders too, and all else is passed over.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple, Self

from skipinit_jax.errors import UsageError
from skipinit_jax.files import local_path

__all__ = [
  "NAME",
  "SUFFIXES",
  "FolderSplit",
  "load",
]

NAME = "image_folder"
"""The data set whose folder is `data_dir`."""

SUFFIXES: tuple[str, ...] = (
  ".jpg",
  ".jpeg",
  ".png",
  ".webp",
  ".bmp",
  ".gif",
  ".ppm",
  ".pgm",
  ".tif",
  ".tiff",
)
"""What the names of images end with, in small or capital letters."""

_TEST_FOLDERS = ("val", "validation", "test")
# What a digest of contents reads: some blocks of each file, of so many files at most.
_BLOCK_BYTES = 2**12
_BLOCKS = 4
_MOST_FILES = 2**14
_READING_THREADS = 16


class Example(NamedTuple):
  """An image's file, its name from the split's folder on, and its label."""

  path: str
  name: str
  label: int


@dataclasses.dataclass(frozen=True)
class FolderSplit:
  """A split in a folder of class folders.

  Attributes:
    folder: the folder of the class folders.
    name: the folder's own name, such as "val".
    classes: the class folders' names, in the order of the labels.
    num_examples: how many images it holds.
  """

  folder: str
  name: str
  classes: tuple[str, ...]
  num_examples: int

  @classmethod
  def of(cls, folder: pathlib.Path, classes: tuple[str, ...]) -> Self:
    """Returns the split in a folder.

    Raises:
      UsageError: a class folder has no images.
    """
    split = cls(str(folder), folder.name, classes, len(_examples(str(folder), classes)))
    labels = {example.label for example in split.examples()}
    there = [name for name in classes if (folder / name).is_dir()]
    empty = [name for name in there if classes.index(name) not in labels]
    if empty:
      # It may be filled, and this process asked again.
      _examples.cache_clear()
      others = f" and {len(empty) - 1} more class folders" if empty[1:] else ""
      raise UsageError(
        f"There are no images in {folder / empty[0]}{others}: fill or remove them; "
        f"names of images end with {', '.join(SUFFIXES)}."
      )
    return split

  def record(self) -> dict[str, Any]:
    """Returns what tells its files from others: names, sizes and `content_digest`."""
    digest, total = hashlib.sha256(), 0
    for example in self.examples():
      size = status(example.path).st_size
      digest.update(f"{example.name}\0{size}\n".encode(errors="surrogateescape"))
      total += size
    return {
      "num_examples": self.num_examples,
      "bytes": total,
      "sha256": digest.hexdigest()[:16],
      "content": content_digest([pathlib.Path(each.path) for each in self.examples()]),
    }

  def examples(self) -> tuple[Example, ...]:
    """Returns the images in the order of their classes and names."""
    return _examples(self.folder, self.classes)

  def open(self) -> "_Records":
    """Returns the images by their numbers, as bytes, with their labels and names."""
    return _Records(self.examples())


@dataclasses.dataclass(frozen=True)
class _Records:
  """Reads the files of examples."""

  examples: tuple[Example, ...]

  def __getitem__(self, number: int) -> dict[str, Any]:
    path, name, label = self.examples[number]
    return {"image": read(path), "label": label, "file_name": os.fsencode(name)}


def content_digest(paths: Sequence[Any]) -> str:
  """Returns the start of a digest of files' contents, without reading them whole.

  It reads four blocks of 4 KiB of each file, the first and the last among them, so that
  a file in the place of another of the same size is found. Where there are more than
  16,384 files it reads as many, at even distances.

  Args:
    paths: of `pathlib` or `etils.epath`.
  """
  digest = hashlib.sha256()
  with futures.ThreadPoolExecutor(_READING_THREADS) as readers:
    for blocks in readers.map(_blocks, paths[:: max(1, -(-len(paths) // _MOST_FILES))]):
      digest.update(blocks)
  return digest.hexdigest()[:16]


def _blocks(path: Any) -> bytes:
  with path.open("rb") as file:
    last = max(0, file.seek(0, os.SEEK_END) - _BLOCK_BYTES)
    blocks = []
    for number in range(_BLOCKS):
      file.seek(last * number // (_BLOCKS - 1))
      blocks.append(file.read(_BLOCK_BYTES))
  return b"".join(blocks)


def read(path: str) -> bytes:
  """Returns the bytes of an image's file; a UsageError says where they are not."""
  with _reading(f"The image {path}"):
    return pathlib.Path(path).read_bytes()


def status(path: str) -> os.stat_result:
  """Returns size and time of an image's file, as `read` its bytes."""
  with _reading(f"The image {path}"):
    return os.stat(path)


def load(
  folder: str | os.PathLike[str], what: str = "The data set"
) -> tuple[FolderSplit, FolderSplit]:
  """Finds the images to train on and those to evaluate on.

  Args:
    folder: the folder with `train` and one of `val`, `validation` and `test`.
    what: what the folder is to the user.

  Raises:
    UsageError: a folder is missing or cannot be read, has no class folders or an empty
      one, or the folder to evaluate on has a class that `train` has not.
  """
  train_folder, test_folder = find(folder, what)
  train = FolderSplit.of(train_folder, classes := class_folders(train_folder))
  unknown = [name for name in class_folders(test_folder) if name not in {*classes}]
  if unknown:
    raise UsageError(
      f"{test_folder} has the class {unknown[0]!r}, which {train_folder} has not."
    )
  return train, FolderSplit.of(test_folder, classes)


def find(
  folder: str | os.PathLike[str], what: str
) -> tuple[pathlib.Path, pathlib.Path]:
  """Returns the folder to train on and the one to evaluate on.

  Raises:
    UsageError: one is missing.
  """
  root = local_path(folder)
  train = root / "train"
  test = next((root / name for name in _TEST_FOLDERS if (root / name).is_dir()), None)
  if not train.is_dir() or test is None:
    raise UsageError(
      f"{what} {root} needs the folders train and val (or validation, or test), each "
      "with a folder of images for each class."
    )
  return train, test


def class_folders(folder: pathlib.Path) -> tuple[str, ...]:
  """Returns the sorted names of the class folders.

  Raises:
    UsageError: there are none, or the folder cannot be read.
  """
  names = [name for name, _, is_folder in _scan(folder) if is_folder]
  if not names:
    raise UsageError(
      f"{folder} has no class folders: put each image into a folder that is named "
      "after its class."
    )
  return tuple(names)


def images(
  folder: str | os.PathLike[str], above: tuple[str, ...] = ()
) -> Iterator[str]:
  """Yields the paths of a folder's images, sorted in each folder.

  Args:
    above: the folders that this one is in, as paths without links.

  Raises:
    UsageError: a folder cannot be read, or is a link to one that it is in.
  """
  here = os.path.realpath(folder)
  if here in above:
    raise UsageError(f"{os.fspath(folder)} leads back to {here}: remove the link.")
  for name, path, is_folder in _scan(folder):
    if is_folder:
      yield from images(path, (*above, here))
    elif name.lower().endswith(SUFFIXES):
      yield path


def _scan(folder: str | os.PathLike[str]) -> list[tuple[str, str, bool]]:
  """Returns names and paths in a folder, sorted, and which of them are folders."""
  with _reading(str(folder)), os.scandir(folder) as entries:
    found = [(entry.name, entry.path, entry.is_dir()) for entry in entries]
  return sorted(each for each in found if not each[0].startswith("."))


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise UsageError(f"{what} cannot be read ({error.strerror}).") from None


@functools.lru_cache(maxsize=4)
def _examples(folder: str, classes: tuple[str, ...]) -> tuple[Example, ...]:
  return tuple(
    Example(path, os.path.relpath(path, folder), label)
    for label, name in enumerate(classes)
    if os.path.isdir(os.path.join(folder, name))
    for path in images(os.path.join(folder, name))
  )
