import gzip
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from skipinit_jax.data.prepare import idx
from skipinit_jax.errors import UsageError

DEBIAN_FILES = pathlib.Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture
def source(tmp_path, idx_files):
  idx_files.write(tmp_path / "source")
  return tmp_path / "source"


def prepare(source):
  return idx.prepare("fashion_mnist", source, str(source.parent / "tfds"))


def times(folder):
  return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("zipped", [True, False])
def test_tensorflow_datasets_reads_what_was_prepared(zipped, tmp_path, idx_files):
  arrays = idx_files.write(tmp_path / "source", zipped=zipped)
  message = prepare(tmp_path / "source")
  assert message.startswith("Prepared fashion_mnist with 60 train and 23 test examples")
  builder = tfds.builder("fashion_mnist", data_dir=tmp_path / "tfds")
  reference = tfds.builder_cls("fashion_mnist")(data_dir=tmp_path / "none").info
  assert builder.info.features.to_json() == reference.features.to_json()
  for split, prefix in (("train", "train"), ("test", "t10k")):
    records = builder.as_data_source(split)
    found = sorted((r["image"].tobytes(), int(r["label"])) for r in records)
    expected = zip(*arrays[prefix], strict=True)
    assert found == sorted((image.tobytes(), int(label)) for image, label in expected)


@pytest.mark.skipif(not DEBIAN_FILES.exists(), reason="needs dataset-fashion-mnist")
def test_reads_debians_files():
  for prefix, size in (("train", 60000), ("t10k", 10000)):
    split = idx._read_split(DEBIAN_FILES, prefix)
    assert split.images.shape == (size, 28, 28, 1)
    assert np.bincount(split.labels).tolist() == [size // 10] * 10


def test_what_is_prepared_is_left_as_it_is(source, idx_files):
  prepare(source)
  before = times(source.parent / "tfds")
  assert prepare(source).startswith("Already prepared: fashion_mnist with 60 train")
  idx_files.replace(
    source, "t10k-images-idx3", idx_files.encode(np.zeros((5, 28, 28), np.uint8))
  )
  idx_files.replace(source, "t10k-labels-idx1", idx_files.encode(np.zeros(5, np.uint8)))
  with pytest.raises(UsageError, match=r"exists .*'test': 23.*'test': 5.*delete"):
    prepare(source)
  assert times(source.parent / "tfds") == before


def test_incomplete_folder_is_not_taken_for_a_prepared_one(source):
  version = tfds.builder_cls("fashion_mnist").VERSION
  (source.parent / "tfds" / "fashion_mnist" / str(version)).mkdir(parents=True)
  with pytest.raises(UsageError, match=r"already exists and holds no examples.*delete"):
    prepare(source)


IMAGES, LABELS = "train-images-idx3", "train-labels-idx1"


def bytes_array(*shape, value=0):
  """Returns an array of one value as an IDX file has it."""
  sizes = b"".join(size.to_bytes(4, "big") for size in shape)
  return bytes([0, 0, 8, len(shape)]) + sizes + np.full(shape, value, "u1").tobytes()


@pytest.mark.parametrize(
  ("files", "message"),
  [
    ({IMAGES: bytes_array(60)}, r"train-images.* is not an IDX file .* 3 dimensions"),
    ({LABELS: bytes([0, 0, 8, 1, 0])}, r"train-labels.* is not an IDX file .* 1 dime"),
    ({LABELS: bytes_array(60)[:-1]}, "holds 59 bytes of data where its header says 60"),
    ({LABELS: bytes_array(59)}, "60 images but 59 labels"),
    ({LABELS: bytes_array(60, value=10)}, "train labels .* not between 0 and 9"),
    ({IMAGES: bytes_array(60, 28, 27)}, r"shape \(28, 27, 1\), not \(28, 28, 1\)"),
    ({IMAGES: bytes_array(0, 28, 28), LABELS: bytes_array(0)}, "train labels .* none"),
  ],
)
def test_bad_source_is_one_sentence_and_writes_nothing(
  files, message, source, idx_files
):
  for stem, content in files.items():
    idx_files.replace(source, stem, content)
  with pytest.raises(UsageError, match=message):
    prepare(source)
  assert not (source.parent / "tfds").exists()


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda zipped: None, r"neither .*train-images-idx3-ubyte\.gz nor"),
    (lambda zipped: zipped[:5000], r"Cannot read .*idx3-ubyte\.gz: .*end"),
    (lambda zipped: zipped[:500] + bytes(99) + zipped[599:], r"Cannot read .*\.gz: "),
    (gzip.decompress, r"Cannot read .*\.gz: Not a gzipped file"),
  ],
)
def test_damaged_file_is_one_sentence(damage, message, source):
  path = source / f"{IMAGES}-ubyte.gz"
  content = damage(path.read_bytes())
  path.unlink()
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(UsageError, match=message) as error:
    prepare(source)
  assert "\n" not in str(error.value)


def test_source_that_is_not_there(source, tmp_path):
  with pytest.raises(UsageError, match="none' is not a folder"):
    idx.prepare("fashion_mnist", tmp_path / "none")
  with pytest.raises(UsageError, match="Unknown dataset of IDX files 'cifar10'"):
    idx.prepare("cifar10", source)


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
