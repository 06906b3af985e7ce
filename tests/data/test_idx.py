import gzip
import json
import os

import numpy as np
import pytest
import tensorflow_datasets as tfds

from skipinit_jax.data import idx
from skipinit_jax.errors import UsageError


@pytest.fixture
def source(tmp_path, idx_files):
  idx_files.write(tmp_path / "source")
  return tmp_path / "source"


def prepare(source):
  return idx.prepare("fashion_mnist", source, str(source.parent / "tfds"))


@pytest.mark.parametrize("zipped", [True, False])
def test_tensorflow_datasets_reads_what_was_prepared(zipped, tmp_path, idx_files):
  arrays = idx_files.write(tmp_path / "source", zipped=zipped)
  message = prepare(tmp_path / "source")
  assert message.startswith("Prepared fashion_mnist with 60 train and 23 test examples")
  for split, prefix in (("train", "train"), ("test", "t10k")):
    records = tfds.data_source(
      "fashion_mnist", split=split, data_dir=tmp_path / "tfds", download=False
    )
    found = sorted((r["image"].tobytes(), int(r["label"])) for r in records)
    images, labels = arrays[prefix]
    expected = sorted(
      (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )
    assert found == expected


def test_metadata_is_that_of_tensorflow_datasets(source):
  prepare(source)
  registered = tfds.builder_cls("fashion_mnist")
  folder = source.parent / "tfds" / "fashion_mnist" / str(registered.VERSION)
  read = tfds.builder_from_directory(folder)
  assert read.info.name == "fashion_mnist"
  reference = registered(data_dir=source.parent / "none").info
  assert read.info.features.to_json() == reference.features.to_json()
  assert read.info.features["label"].names == reference.features["label"].names
  assert read.info.supervised_keys == ("image", "label")
  sizes = {name: info.num_examples for name, info in read.info.splits.items()}
  assert sizes == {"train": 60, "test": 23}
  info = json.loads((folder / "dataset_info.json").read_text())
  assert info["fileFormat"] == "array_record"
  assert os.listdir(source.parent / "tfds") == ["fashion_mnist"]
  assert os.listdir(source.parent / "tfds" / "fashion_mnist") == [folder.name]


def test_second_time_says_already_prepared_and_leaves_the_files(source):
  prepare(source)
  files = {
    path: path.stat().st_mtime_ns for path in (source.parent / "tfds").rglob("*")
  }
  assert prepare(source).startswith("Already prepared: fashion_mnist with 60 train")
  assert files == {
    path: path.stat().st_mtime_ns for path in (source.parent / "tfds").rglob("*")
  }


def test_other_prepared_files_are_not_overwritten(source, idx_files):
  prepare(source)
  idx_files.replace(
    source, "t10k-images-idx3", idx_files.encode(np.zeros((5, 28, 28), np.uint8))
  )
  idx_files.replace(source, "t10k-labels-idx1", idx_files.encode(np.zeros(5, np.uint8)))
  with pytest.raises(
    UsageError, match=r"already exists .*'test': 23.*'test': 5.*delete"
  ):
    prepare(source)


def test_incomplete_folder_is_not_taken_for_a_prepared_one(source):
  version = tfds.builder_cls("fashion_mnist").VERSION
  (source.parent / "tfds" / "fashion_mnist" / str(version)).mkdir(parents=True)
  with pytest.raises(UsageError, match=r"already exists and holds no examples.*delete"):
    prepare(source)


def _remove_labels(source, idx_files):
  (source / "t10k-labels-idx1-ubyte.gz").unlink()


def _truncate_gzip(source, idx_files):
  path = source / "train-images-idx3-ubyte.gz"
  path.write_bytes(path.read_bytes()[:5000])


def _corrupt_gzip(source, idx_files):
  path = source / "train-images-idx3-ubyte.gz"
  content = bytearray(path.read_bytes())
  content[5000:5100] = bytes(100)
  path.write_bytes(content)


def _no_gzip(source, idx_files):
  (source / "train-images-idx3-ubyte.gz").write_bytes(b"plain text")


def _wrong_magic(source, idx_files):
  idx_files.replace(source, "train-images-idx3", idx_files.encode(np.zeros(9, "u1")))


def _short_header(source, idx_files):
  idx_files.replace(source, "train-labels-idx1", bytes([0, 0, 8, 1, 0]))


def _short_data(source, idx_files):
  labels = gzip.decompress((source / "train-labels-idx1-ubyte.gz").read_bytes())
  idx_files.replace(source, "train-labels-idx1", labels[:-1])


def _fewer_labels(source, idx_files):
  idx_files.replace(source, "train-labels-idx1", idx_files.encode(np.zeros(59, "u1")))


def _other_shape(source, idx_files):
  images = np.zeros((60, 28, 27), np.uint8)
  idx_files.replace(source, "train-images-idx3", idx_files.encode(images))


def _label_out_of_range(source, idx_files):
  labels = np.full(60, 10, np.uint8)
  idx_files.replace(source, "train-labels-idx1", idx_files.encode(labels))


def _no_examples(source, idx_files):
  for stem, shape in (("t10k-images-idx3", (0, 28, 28)), ("t10k-labels-idx1", (0,))):
    idx_files.replace(source, stem, idx_files.encode(np.zeros(shape, np.uint8)))


@pytest.mark.parametrize(
  ("spoil", "message"),
  [
    (_remove_labels, r"neither .*t10k-labels-idx1-ubyte\.gz nor"),
    (_truncate_gzip, r"Cannot read .*train-images-idx3-ubyte\.gz: .*end"),
    (_corrupt_gzip, r"Cannot read .*train-images-idx3-ubyte\.gz: "),
    (_no_gzip, r"Cannot read .*train-images-idx3-ubyte\.gz: Not a gzipped file"),
    (_wrong_magic, r"train-images.* is not an IDX file .* 3 dimensions"),
    (_short_header, r"train-labels.* is not an IDX file .* 1 dimension"),
    (_short_data, r"holds 59 bytes of data where its header says 60"),
    (_fewer_labels, r"60 images but 59 labels"),
    (_other_shape, r"shape \(28, 27, 1\), not \(28, 28, 1\)"),
    (_label_out_of_range, r"train labels .* not between 0 and 9"),
    (_no_examples, r"test labels .* none"),
  ],
)
def test_bad_source_is_one_sentence_and_writes_nothing(
  spoil, message, source, idx_files
):
  spoil(source, idx_files)
  with pytest.raises(UsageError, match=message) as error:
    prepare(source)
  assert "\n" not in str(error.value)
  assert not (source.parent / "tfds").exists()


def test_missing_source_folder(tmp_path):
  with pytest.raises(UsageError, match="none' is not a folder"):
    idx.prepare("fashion_mnist", tmp_path / "none", str(tmp_path / "tfds"))


def test_data_dir_that_cannot_be_written(source):
  # A file where the folder should be: unlike a mode, it also stops root.
  (source.parent / "tfds").write_text("")
  with pytest.raises(UsageError, match=r"Cannot write to data_dir '.*tfds'"):
    prepare(source)


def test_failure_while_writing_leaves_nothing(source, monkeypatch):
  def fail(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("PIL.Image.Image.save", fail)
  with pytest.raises(UsageError, match="No space left on device"):
    prepare(source)
  assert list((source.parent / "tfds").rglob("*.array_record*")) == []
  monkeypatch.undo()
  assert prepare(source).startswith("Prepared")


def test_data_sets_that_are_not_idx_files(source):
  with pytest.raises(UsageError, match="'cifar10' is not published as IDX files"):
    idx.prepare("cifar10", source)
  with pytest.raises(UsageError, match="Unknown dataset 'fashion'"):
    idx.prepare("fashion", source)
