"""ImageNet from a folder of class folders of JPEG files."""

import functools
import hashlib
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from skipinit_jax import errors
from skipinit_jax.cores import num_cores
from skipinit_jax.data import decode, image_folder, prepared
from skipinit_jax.data.image_folder import Example, FolderSplit
from skipinit_jax.data.prepare import tfds_files

__all__ = [
  "NAME",
  "prepare",
]

NAME = "imagenet2012"
"""The name of the set."""

# About 110 MB: what each thread does again after an interruption.
_FILE_EXAMPLES = 1024
# libjpeg decodes all of a file to find its damage, but makes few pixels of it.
_CHECK_SIZE = 16
_MOST_NAMED = 3
_TERMINAL_SECONDS, _LOG_SECONDS = 1.0, 60.0


def prepare(source: str | os.PathLike[str], data_dir: str | None = None) -> str:
  """Writes the files that `streaming.load` reads under the name `NAME`.

  Labels are the places of ImageNet's synsets in sorted order. Each file is kept byte
  by byte, and checked: its image is decoded. A second call goes on where a first one
  was interrupted; what that wrote is in a folder beside the prepared one.

  Args:
    source: the folder with train/SYNSET/*.JPEG and val/SYNSET/*.JPEG, or with the
      50,000 files of val in that folder itself, as they are published. The folder may
      also be called validation.
    data_dir: where to write; by default the environment variable TFDS_DATA_DIR or
      ~/tensorflow_datasets.

  Returns:
    One sentence on what was done: prepared, or already prepared.

  Raises:
    UsageError: the folder is another one; images are damaged or cannot be read; or
      `data_dir` cannot be written, or holds other files for this data set.
  """
  with errors.extra("photos"):
    import tensorflow_datasets as tfds

  data_dir = prepared.directory(data_dir)
  builder = tfds.builder(NAME, data_dir=data_dir, file_format="array_record")
  synsets = tuple(builder.info.features["label"].names)
  train_folder, val_folder = image_folder.find(source, "Source")
  splits = {"train": _examples(train_folder, synsets)}
  if any(entry.is_dir() for entry in val_folder.iterdir()):
    splits["validation"] = _examples(val_folder, synsets)
  else:
    labels = _validation_labels()
    paths = [*image_folder.images(val_folder)]
    if len(paths) != len(labels):
      raise errors.UsageError(
        f"{val_folder} has no class folders, and {len(paths)} images instead of the "
        f"{len(labels)} whose classes are known."
      )
    splits["validation"] = tuple(
      Example(path, os.path.basename(path), synsets.index(label))
      for path, label in zip(paths, labels, strict=True)
    )
  sizes = {name: len(examples) for name, examples in splits.items()}
  with tfds_files.writing(data_dir):
    if builder.data_path.exists():
      return tfds_files.already_prepared(builder, sizes)
    _write(builder, splits)
  return f"Prepared {tfds_files.summary(builder, sizes)}."


def _examples(folder: pathlib.Path, synsets: tuple[str, ...]) -> tuple[Example, ...]:
  found = image_folder.class_folders(folder)
  if found != synsets:
    missing = sorted({*synsets} - {*found})
    problem = f"no {missing[0]}" if missing else f"{min({*found} - {*synsets})!r}"
    raise errors.UsageError(
      f"{folder} has {len(found)} class folders and {problem} among them: ImageNet's "
      f"are its {len(synsets)} synsets, such as {synsets[0]}; other sets are of "
      f"--config.dataset={image_folder.NAME} and need no preparation."
    )
  return FolderSplit.of(folder, synsets).examples()


def _validation_labels() -> list[str]:
  """Returns the synsets of the validation images in the order of their names."""
  import tensorflow_datasets as tfds

  path = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
  labels: list[str] = path.read_text().split()
  return labels


def _write(builder: Any, splits: Mapping[str, Sequence[Example]]) -> None:
  """Writes all files in parallel, and then what tensorflow-datasets says of them."""
  import tensorflow_datasets as tfds

  folder = builder.data_path.with_name(f"{builder.data_path.name}.unfinished")
  folder.mkdir(parents=True, exist_ok=True)
  infos, names, parts = [], [], []
  for split, examples in splits.items():
    template = tfds.core.ShardedFileTemplate(
      dataset_name=builder.name,
      data_dir=builder.data_path,
      split=split,
      filetype_suffix="array_record",
    )
    # Classes are mixed, for who reads the files from the beginning.
    order = np.random.default_rng(0).permutation(len(examples))
    shards = np.array_split(order, -(-len(order) // _FILE_EXAMPLES))
    for index, numbers in enumerate(shards):
      path = template.sharded_filepath(shard_index=index, num_shards=len(shards))
      names.append(path.name)
      parts.append([examples[number] for number in numbers])
    info = functools.partial(
      tfds.core.SplitInfo, name=split, filename_template=template
    )
    infos.append((info, [len(numbers) for numbers in shards]))
  write = functools.partial(_write_file, str(folder), builder.info.features)
  paths: list[str] = []
  damaged: list[str] = []
  with futures.ThreadPoolExecutor(num_cores()) as pool:
    try:
      for path, bad in _shown(pool.map(write, names, parts), len(parts)):
        paths.append(path)
        damaged += bad
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise
  if damaged:
    raise errors.UsageError(
      f"{len(damaged)} of the images cannot be decoded: "
      f"{'; '.join(damaged[:_MOST_NAMED])}{'; ...' * (len(damaged) > _MOST_NAMED)}. "
      "Replace them, and the same command goes on."
    )
  for left in folder.iterdir():
    # It is from a source that has changed since, or from a killed process.
    if str(left) not in paths:
      left.unlink()
  sizes = iter([os.path.getsize(path) for path in paths])
  for path, name in zip(paths, names, strict=True):
    os.replace(path, folder / name)
  builder.info.set_splits(
    tfds.core.splits.SplitDict(
      [
        info(shard_lengths=lengths, num_bytes=sum(next(sizes) for _ in lengths))
        for info, lengths in infos
      ]
    )
  )
  builder.info.write_to_directory(str(folder))
  folder.rename(builder.data_path)


def _write_file(
  folder: str, features: Any, name: str, examples: Sequence[Example]
) -> tuple[str, list[str]]:
  """Writes a file of records unless it is there.

  Returns:
    Its path, which depends on what it holds, and the damaged images, in words.
  """
  from array_record.python import array_record_module

  digest = hashlib.sha256()
  for path, _, label in examples:
    status = image_folder.status(path)
    line = f"{path} {label} {status.st_size} {status.st_mtime_ns}\n"
    digest.update(line.encode(errors="surrogateescape"))
  file = os.path.join(folder, f"{name}.{digest.hexdigest()[:16]}")
  if os.path.exists(file):
    return file, []
  damaged = []
  # One record a group, as tensorflow-datasets does, for reading in any order.
  writer = array_record_module.ArrayRecordWriter(f"{file}.tmp", "group_size:1")
  for path, _, label in examples:
    encoded = image_folder.read(path)
    try:
      decode.decode(encoded, decode.center_window, _CHECK_SIZE)
    except ValueError as error:
      damaged.append(f"{path} ({error})")
    file_name = os.fsencode(os.path.basename(path))
    record = {"image": encoded, "label": label, "file_name": file_name}
    writer.write(features.serialize_example(record))
  writer.close()
  if not damaged:
    os.replace(f"{file}.tmp", file)
  return file, damaged


def _shown(results: Iterator[Any], total: int) -> Iterator[Any]:
  """Yields the results, and says on standard error how many there were."""
  is_live = sys.stderr.isatty()
  shown_at = time.monotonic()
  for number, result in enumerate(results, start=1):
    yield result
    seconds = time.monotonic() - shown_at
    if seconds >= (_TERMINAL_SECONDS if is_live else _LOG_SECONDS) or number == total:
      end = "\r" if is_live and number < total else "\n"
      print(f"{number} of {total} files", end=end, file=sys.stderr, flush=True)
      shown_at = time.monotonic()
