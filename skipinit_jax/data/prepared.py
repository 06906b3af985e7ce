"""Finds what tensorflow-datasets has prepared, or says how to prepare it."""

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

from skipinit_jax.errors import UsageError, extra
from skipinit_jax.files import local_path

# What says nothing about the bytes.
_REFUSED = (errno.EACCES, errno.EIO, errno.EMFILE, errno.EPERM, errno.ESTALE)


def directory(data_dir: str | None) -> str | None:
  """Returns where data sets are prepared; None: in ~/tensorflow_datasets.

  Args:
    data_dir: a directory, or a folder of a bucket; None: the environment variable
      TFDS_DATA_DIR.
  """
  given = data_dir or os.environ.get("TFDS_DATA_DIR")
  # A path would take a slash of gs:// away.
  return str(local_path(given)) if given and given.startswith("~") else given or None


def open_builder(name: str, data_dir: str | None) -> Any:
  """Returns the tensorflow-datasets builder of a data set that is prepared.

  Args:
    name: one of `datasets.NAMES`, other than `digits`.
    data_dir: where it is prepared; None: the default of tensorflow-datasets.

  Raises:
    UsageError: the set is not prepared there, with the command that prepares it, is
      not in ArrayRecord format, or its files are damaged or cannot be read.
  """
  with extra("train"):
    import tensorflow_datasets as tfds

  data_dir = directory(data_dir)
  root = data_dir or str(local_path("~/tensorflow_datasets"))
  with damage_errors(f"The data set {name!r}", os.path.join(root, name)):
    try:
      builder = tfds.builder(name, data_dir=data_dir)
      # Asked of a folder that does not exist, `is_prepared` logs a warning.
      prepared = builder.data_path.exists() and builder.is_prepared()
    except tfds.core.DatasetNotFoundError:  # It knows sample_photos by its files alone.
      prepared = False
  if not prepared:
    raise UsageError(
      f"Dataset {name!r} is not prepared in {root}: {_remedy(name, root)}."
    )
  if not is_random_access(builder):
    raise UsageError(
      f"Dataset {name!r} in {builder.data_path} is not in ArrayRecord format, the "
      "one that can be read without TensorFlow: prepare it in another data_dir with "
      "file_format='array_record'."
    )
  return builder


@contextlib.contextmanager
def damage_errors(what: str, folder: os.PathLike[str] | str) -> Iterator[None]:
  """Makes any error in the block a `UsageError`: damaged files raise almost anything.

  Args:
    what: what the block reads.
    folder: the data set's prepared files.
  """
  try:
    yield
  except UsageError:
    raise
  except Exception as error:
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    # Libraries tell in words alone what the system refused.
    refused = any(os.strerror(number) in str(error) for number in _REFUSED)
    remedy = (
      "it may be intact" if refused else "delete that folder and prepare it again"
    )
    raise UsageError(
      f"{what} in {folder} cannot be read ({reason}): {remedy}."
    ) from error


def _remedy(name: str, root: str) -> str:
  """Returns what to do to prepare a data set in a folder."""
  prepare = f"python -m experiments.prepare_data --dataset={name}"
  if name == "fashion_mnist":
    return (
      f"run `{prepare} --source=DIR --data_dir={root}`, where DIR holds its IDX files "
      "(Debian's package dataset-fashion-mnist puts them in "
      "/usr/share/datasets/fashion-mnist)"
    )
  if name == "sample_photos":
    return f"run `{prepare} --data_dir={root}`"
  if name == "imagenet2012":
    return (
      f"run `{prepare} --source=DIR --data_dir={root}`, where DIR holds train and val "
      "with a folder of JPEG files for each class"
    )
  archive = name.replace("cifar", "cifar-")
  return (
    f"run `{prepare} --source={archive}-binary.tar.gz --data_dir={root}` with that "
    f"file of https://www.cs.toronto.edu/~kriz/{archive}-binary.tar.gz"
  )


def is_random_access(builder: Any) -> bool:
  """Returns whether a tfds builder's prepared files are in ArrayRecord format."""
  formats = builder.info.available_file_formats()
  return "array_record" in {file_format.value for file_format in formats}
