"""Writes a data set as tensorflow-datasets files, without TensorFlow."""

import contextlib
import io
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from skipinit_jax import errors
from skipinit_jax.data.prepared import is_random_access


def write(
  make_builder: Callable[[], Any], sizes: Mapping[str, int], data_dir: str | None
) -> str:
  """Writes what a builder generates, in ArrayRecord format.

  tensorflow-datasets does the writing, into a temporary folder that it renames at the
  end.

  Args:
    make_builder: returns a tensorflow-datasets builder that encodes its images itself:
      tensorflow-datasets would use TensorFlow.
    sizes: number of examples of each split.
    data_dir: where the builder writes; only named in messages.

  Returns:
    One sentence on what was done: prepared, or already prepared.

  Raises:
    UsageError: `data_dir` cannot be written, or holds other files for the data set.
  """
  import tensorflow_datasets as tfds

  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  try:
    builder = make_builder()
    if builder.data_path.exists():
      return _already_prepared(builder, sizes)
    # It prints that it downloads, and makes a folder for that.
    silence = contextlib.redirect_stdout(io.StringIO())
    with silence, tempfile.TemporaryDirectory() as downloads:
      builder.download_and_prepare(download_dir=downloads, file_format="array_record")
  except OSError as error:
    where = "the default data_dir" if data_dir is None else f"data_dir {data_dir!r}"
    raise errors.UsageError(f"Cannot write to {where}: {error}.") from error
  return f"Prepared {_summary(builder, sizes)}."


def _already_prepared(builder: Any, sizes: Mapping[str, int]) -> str:
  prepared = {name: info.num_examples for name, info in builder.info.splits.items()}
  if prepared != sizes or not is_random_access(builder):
    found = (
      f"{prepared} as {builder.info.file_format.value}" if prepared else "no examples"
    )
    raise errors.UsageError(
      f"{builder.data_path} already exists and holds {found}, not {dict(sizes)} in "
      "ArrayRecord format: delete it or choose another data_dir."
    )
  return f"Already prepared: {_summary(builder, sizes)}."


def _summary(builder: Any, sizes: Mapping[str, int]) -> str:
  counts = " and ".join(f"{size} {split}" for split, size in sizes.items())
  return f"{builder.name} with {counts} examples in {builder.data_path}"
