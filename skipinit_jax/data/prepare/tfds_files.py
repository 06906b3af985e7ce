"""Writes a data set as tensorflow-datasets files, without TensorFlow."""

import contextlib
import io
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

from skipinit_jax import errors
from skipinit_jax.data.prepared import is_random_access

Splits: TypeAlias = dict[str, dict[str, Any]]
"""Features of all examples by split and name: uint8 "image" [N, H, W, C], "label"."""


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
  with errors.extra("train"):
    import tensorflow_datasets as tfds

  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  with writing(data_dir):
    builder = make_builder()
    if builder.data_path.exists():
      return already_prepared(builder, sizes)
    # It prints that it downloads, and makes a folder for that.
    silence = contextlib.redirect_stdout(io.StringIO())
    with silence, tempfile.TemporaryDirectory() as downloads:
      builder.download_and_prepare(download_dir=downloads, file_format="array_record")
  return f"Prepared {summary(builder, sizes)}."


def write_arrays(
  name: str,
  splits: Splits,
  class_names: Mapping[str, list[str]],
  *,
  data_dir: str | None,
  where: str,
) -> str:
  """Writes arrays as the files of a data set that tensorflow-datasets knows.

  Args:
    name: the data set.
    splits: its examples.
    class_names: the names of the classes, by each feature that is a label.
    data_dir: where to write; None: the default of tensorflow-datasets.
    where: where the examples are from, such as "in FOLDER"; only named in messages.

  Returns:
    One sentence on what was done: prepared, or already prepared.

  Raises:
    UsageError: the examples have not the data set's features; `data_dir` cannot be
      written, or holds other files for the data set.
  """
  with errors.extra("train"):
    import tensorflow_datasets as tfds
    from PIL import Image

  registered: Any = tfds.builder_cls(name)

  # The builder that tensorflow-datasets has, but of the examples here.
  class Builder(registered, skip_registration=True):  # type: ignore[call-arg]
    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
      del dl_manager  # Nothing is downloaded.
      return {split: self._generate_examples(split) for split in splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
      features = splits[split]
      # The order in the files depends on the keys. These are those of the original.
      for key, values in enumerate(zip(*features.values(), strict=True)):
        example = dict(zip(features, values, strict=True))
        # An encoded image: to encode an array, it would import TensorFlow.
        yield key, example | {"image": Image.fromarray(np.squeeze(example["image"]))}

  Builder.name = name

  def make_builder() -> Any:
    builder = Builder(data_dir=data_dir)
    features = builder.info.features
    _check(splits, features, where)
    for label, names in class_names.items():
      if len({*names}) != features[label].num_classes:
        raise errors.UsageError(
          f"There are {len({*names})} different names of classes {where}, not "
          f"{features[label].num_classes}."
        )
      features[label].names = names
    return builder

  sizes = {split: len(examples["label"]) for split, examples in splits.items()}
  return write(make_builder, sizes, data_dir)


@contextlib.contextmanager
def writing(data_dir: str | None) -> Iterator[None]:
  """Makes an error of the system in the block a `UsageError`."""
  try:
    yield
  except OSError as error:
    where = "the default data_dir" if data_dir is None else f"data_dir {data_dir!r}"
    raise errors.UsageError(f"Cannot write to {where}: {error}.") from error


def _check(splits: Splits, features: Any, where: str) -> None:
  """Raises a UsageError unless the examples have the data set's features."""
  shape, num_classes = features["image"].shape, features["label"].num_classes
  for name, split in splits.items():
    images, labels = split["image"], split["label"]
    if images.shape[1:] != shape:
      raise errors.UsageError(
        f"The {name} images {where} have shape {images.shape[1:]}, not {shape}."
      )
    if len(images) != len(labels):
      raise errors.UsageError(
        f"The {name} files {where} hold {len(images)} images but {len(labels)} labels."
      )
    if len(labels) == 0 or labels.max() >= num_classes:
      raise errors.UsageError(
        f"The {name} labels {where} are not between 0 and {num_classes - 1}, or there "
        "are none."
      )


def already_prepared(builder: Any, sizes: Mapping[str, int]) -> str:
  """Returns the sentence for what is there, or raises a UsageError if that differs."""
  prepared = {name: info.num_examples for name, info in builder.info.splits.items()}
  if prepared != sizes or not is_random_access(builder):
    found = (
      f"{prepared} as {builder.info.file_format.value}" if prepared else "no examples"
    )
    raise errors.UsageError(
      f"{builder.data_path} already exists and holds {found}, not {dict(sizes)} in "
      "ArrayRecord format: delete it or choose another data_dir."
    )
  return f"Already prepared: {summary(builder, sizes)}."


def summary(builder: Any, sizes: Mapping[str, int]) -> str:
  """Returns what a builder has prepared, in words."""
  counts = " and ".join(f"{size} {split}" for split, size in sizes.items())
  return f"{builder.name} with {counts} examples in {builder.data_path}"
