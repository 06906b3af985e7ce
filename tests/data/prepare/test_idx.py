import gzip
import pathlib
from unittest import mock

import numpy as np
import pytest
import tensorflow_datasets as tfds

from skipinit_jax.data.prepare import published
from skipinit_jax.errors import UsageError
from tests.data import idx

DEBIAN_FILES = pathlib.Path("/usr/share/datasets/fashion-mnist")
IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


@pytest.fixture
def source(tmp_path):
  idx.write(tmp_path / "source")
  return tmp_path / "source"


def prepare(source):
  return published.prepare("fashion_mnist", source, str(source.parent / "tfds"))


def test_tensorflow_datasets_reads_what_was_prepared(tmp_path):
  arrays = idx.write(tmp_path / "source")
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
  splits, _ = published._read_idx_folder(DEBIAN_FILES)
  assert splits["test"]["image"].shape == (10000, 28, 28, 1)
  assert np.bincount(splits["test"]["label"]).tolist() == [1000] * 10


def test_what_is_prepared_is_left_as_it_is(source):
  def times():
    paths = (source.parent / "tfds").rglob("*")
    return {path: path.stat().st_mtime_ns for path in paths}

  prepare(source)
  before = times()
  assert prepare(source).startswith("Already prepared: fashion_mnist with 60 train")
  for stem, shape in (("images-idx3", (5, 28, 28)), ("labels-idx1", (5,))):
    (source / f"t10k-{stem}-ubyte.gz").write_bytes(zipped_array(*shape))
  with pytest.raises(UsageError, match=r"exists .*'test': 23.*'test': 5.*delete"):
    prepare(source)
  assert times() == before


def zipped_array(*shape, value=0):
  return idx.zipped(np.full(shape, value, np.uint8))


@pytest.mark.parametrize(
  ("name", "damage", "message"),
  [
    (IMAGES, lambda _: zipped_array(60), "is not an IDX file .* 3 dimensions"),
    (LABELS, lambda _: gzip.compress(bytes([0, 0, 8, 1, 0])), "not an IDX file .* 1 d"),
    (
      LABELS,
      lambda content: gzip.compress(gzip.decompress(content)[:-1]),
      "holds 59 bytes of data where its header says 60",
    ),
    (LABELS, lambda _: zipped_array(59), "60 images but 59 labels"),
    (LABELS, lambda _: zipped_array(60, value=10), "labels .* not between 0 and 9"),
    (IMAGES, lambda _: zipped_array(60, 28, 27), r"shape \(28, 27, 1\), not \(28, 28"),
    (IMAGES, lambda _: None, r"neither .*train-images-idx3-ubyte\.gz nor"),
    (IMAGES, lambda content: content[:5000], r"Cannot read .*idx3-ubyte\.gz: .*end"),
    (IMAGES, lambda content: content[:500] + bytes(99) + content[599:], "Cannot read"),
    (IMAGES, gzip.decompress, r"Cannot read .*\.gz: Not a gzipped file"),
  ],
)
def test_bad_source_is_one_sentence_and_writes_nothing(name, damage, message, source):
  path = source / name
  content = damage(path.read_bytes())
  path.unlink()
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(UsageError, match=message) as error:
    prepare(source)
  assert "\n" not in str(error.value)
  assert not (source.parent / "tfds").exists()


def test_bad_arguments(source, tmp_path):
  with pytest.raises(UsageError, match="none' is not a folder"):
    published.prepare("fashion_mnist", tmp_path / "none")
  with pytest.raises(UsageError, match="Unknown published dataset 'mnist'"):
    published.prepare("mnist", source)


def test_data_dir_that_cannot_be_used(source, monkeypatch):
  tfds_dir = source.parent / "tfds"
  # A file where the folder should be: unlike a mode, it also stops root.
  tfds_dir.write_text("")
  with pytest.raises(UsageError, match=r"Cannot write to data_dir '.*tfds'"):
    prepare(source)
  tfds_dir.unlink()
  # A full disk leaves nothing.
  with monkeypatch.context() as patch:
    error = OSError(28, "No space left on device")
    patch.setattr("PIL.Image.Image.save", mock.Mock(side_effect=error))
    with pytest.raises(UsageError, match="No space left on device"):
      prepare(source)
  assert list(tfds_dir.rglob("*.array_record*")) == []
  # An incomplete folder is not taken for a prepared one.
  version = str(tfds.builder_cls("fashion_mnist").VERSION)
  (tfds_dir / "fashion_mnist" / version).mkdir(parents=True, exist_ok=True)
  with pytest.raises(UsageError, match=r"already exists and holds no examples.*delete"):
    prepare(source)
