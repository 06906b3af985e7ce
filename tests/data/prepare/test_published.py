import gzip
import pathlib
import tarfile
from unittest import mock

import numpy as np
import pytest
import tensorflow_datasets as tfds

from skipinit_jax import data
from skipinit_jax.data.prepare import published
from skipinit_jax.errors import UsageError
from tests.data import idx

DEBIAN_FILES = pathlib.Path("/usr/share/datasets/fashion-mnist")
# The published layouts: https://www.cs.toronto.edu/~kriz/cifar.html.
FILES = {
  "cifar10": {f"data_batch_{n}.bin": 4 for n in range(1, 6)} | {"test_batch.bin": 7},
  "cifar100": {"train.bin": 20, "test.bin": 7},
}
FOLDER = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}
CLASSES = {
  "cifar10": {"batches.meta.txt": 10},
  "cifar100": {"coarse_label_names.txt": 20, "fine_label_names.txt": 100},
}
LABELS = {"cifar10": ["label"], "cifar100": ["coarse_label", "label"]}
ARCHIVE = "a.tar.gz"


def write_cifar(folder, name):
  """Writes an archive and its files; returns the examples in order by split."""
  rng = np.random.default_rng(0)
  files, examples = {}, {"train": [], "test": []}
  for file, size in FILES[name].items():
    labels = np.stack([rng.integers(0, n, size) for n in CLASSES[name].values()])
    images = rng.integers(0, 256, (size, 3, 32, 32), np.uint8)
    files[file] = b"".join(
      bytes(labels[:, n].tolist()) + images[n].tobytes() for n in range(size)
    )
    split = "test" if file.startswith("test") else "train"
    examples[split] += zip(images.transpose(0, 2, 3, 1), labels.T.tolist(), strict=True)
  for file, size in CLASSES[name].items():
    files[file] = "".join(f"class_{n}\n" for n in range(size)).encode() + b"\n"
  folder.mkdir()
  with tarfile.open(folder / ARCHIVE, "w:gz") as archive:
    for file, content in files.items():
      (folder / file).write_bytes(content)
      archive.add(folder / file, f"{FOLDER[name]}/{file}")
    # A path that leads out is neither followed nor written.
    archive.addfile(tarfile.TarInfo(f"{FOLDER[name]}/../x"))
  return examples


@pytest.fixture
def source(tmp_path):
  idx.write(tmp_path / "source")
  return tmp_path / "source"


def prepare(source, name="fashion_mnist"):
  return published.prepare(name, source, str(source.parent / "tfds"))


@pytest.mark.parametrize("name", FILES)
def test_cifar_is_read_by_tensorflow_datasets(name, tmp_path):
  examples = write_cifar(tmp_path / "source", name)
  message = published.prepare(
    name, tmp_path / "source" / ARCHIVE, str(tmp_path / "tfds")
  )
  assert message.startswith(f"Prepared {name} with 20 train and 7 test examples in")
  assert not [*tmp_path.rglob("x")]

  builder = tfds.builder(name, data_dir=tmp_path / "tfds")
  assert builder.info.features["label"].names[1] == "class_1"
  for split, expected in examples.items():
    records = {
      r["id"].decode(): (r["image"], [int(r[each]) for each in LABELS[name]])
      for r in builder.as_data_source(split)
    }
    for number, (image, labels) in enumerate(expected):
      found = records.pop(f"{split}_{number:05d}")
      np.testing.assert_array_equal(found[0], image)
      assert found[1] == labels
    assert records == {}
  train = data.load(
    name, data_dir=str(tmp_path / "tfds"), cache_dir=str(tmp_path)
  ).train
  pairs = zip(train.images, train.labels.tolist(), strict=True)
  found = sorted((image.tobytes(), label) for image, label in pairs)
  assert found == sorted((i.tobytes(), labels[-1]) for i, labels in examples["train"])

  # The folder that the archive unpacks to is as good.
  message = prepare(tmp_path / "source", name)
  assert message.startswith(f"Already prepared: {name} with 20 train and 7 test")


def test_idx_is_read_by_tensorflow_datasets(tmp_path):
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


def zipped_array(*shape, value=0):
  return idx.zipped(np.full(shape, value, np.uint8))


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


IMAGES, LABELS_FILE = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
BATCH, NAMES = "data_batch_3.bin", "batches.meta.txt"
DAMAGED = r"a\.tar\.gz cannot be read \(.*\): it must be"


@pytest.mark.parametrize(
  ("file", "damage", "message"),
  [
    (IMAGES, lambda _: zipped_array(60), "is not an IDX file .* 3 dimensions"),
    (LABELS_FILE, lambda _: gzip.compress(bytes([0, 0, 8, 1, 0])), "not an IDX .* 1 d"),
    (
      LABELS_FILE,
      lambda content: gzip.compress(gzip.decompress(content)[:-1]),
      "holds 59 bytes of data where its header says 60",
    ),
    (LABELS_FILE, lambda _: zipped_array(59), "60 images but 59 labels"),
    (LABELS_FILE, lambda _: zipped_array(60, value=10), "labels .* not between 0 and"),
    (IMAGES, lambda _: zipped_array(60, 28, 27), r"shape \(28, 27, 1\), not \(28, 28"),
    (IMAGES, lambda _: None, r"neither .*train-images-idx3-ubyte\.gz nor"),
    (IMAGES, lambda content: content[:5000], r"Cannot read .*idx3-ubyte\.gz: .*end"),
    (IMAGES, lambda content: content[:500] + bytes(99) + content[599:], "Cannot read"),
    (IMAGES, gzip.decompress, r"Cannot read .*\.gz: Not a gzipped file"),
    (BATCH, lambda _: None, "has no data_batch_3.bin: it must be cifar-"),
    (NAMES, lambda _: None, "has no batches.meta.txt: it must be cifar-"),
    (BATCH, lambda content: content[:-1], "12291 bytes, .* of 3073 bytes"),
    (BATCH, lambda _: b"", "has 0 bytes"),
    (BATCH, lambda _: b"\x0a" * 3073, "train labels .* between 0 and 9"),
    (NAMES, lambda _: b"a\nb\n" * 5, "There are 2 different names"),
    (ARCHIVE, lambda content: content[:-5000], DAMAGED),
    (ARCHIVE, lambda content: content[:5000] + bytes(500) + content[5500:], DAMAGED),
    (
      ARCHIVE,
      lambda content: gzip.compress(gzip.decompress(content)[:20_000]),
      DAMAGED,
    ),
    (ARCHIVE, lambda _: b"<html>moved</html>", DAMAGED),
    (ARCHIVE, lambda _: None, DAMAGED),
  ],
)
def test_bad_source_is_one_sentence_and_writes_nothing(file, damage, message, tmp_path):
  folder = tmp_path / "source"
  if is_idx := file in (IMAGES, LABELS_FILE):
    idx.write(folder)
  else:
    write_cifar(folder, "cifar10")
  path = folder / file
  content = damage(path.read_bytes())
  path.unlink()
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(UsageError, match=message) as error:
    published.prepare(
      "fashion_mnist" if is_idx else "cifar10",
      path if file == ARCHIVE else folder,
      str(tmp_path / "tfds"),
    )
  assert "\n" not in str(error.value)
  assert not (tmp_path / "tfds").exists()


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
