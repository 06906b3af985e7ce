import gzip
import io
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from skipinit_jax import data
from skipinit_jax.data.prepare import published
from skipinit_jax.errors import UsageError

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
TITLE = {"cifar10": "cifar-10-binary.tar.gz", "cifar100": "cifar-100-binary.tar.gz"}


def make_files(name):
  """The contents of an archive's files, and its examples in order by split."""
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
  return files, examples


def write_archive(path, files, folder):
  with tarfile.open(path, "w:gz") as archive:
    for name, content in files.items():
      member = tarfile.TarInfo(f"{folder}/{name}")
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))
  return path


@pytest.mark.parametrize("name", FILES)
def test_tensorflow_datasets_reads_what_was_prepared(name, tmp_path):
  files, examples = make_files(name)
  # A path that leads out is neither followed nor written.
  path = write_archive(tmp_path / TITLE[name], files | {"../x": b"x"}, FOLDER[name])
  message = published.prepare(name, path, str(tmp_path / "tfds"))
  assert message.startswith(f"Prepared {name} with 20 train and 7 test examples in")
  assert {each.name for each in tmp_path.iterdir()} == {path.name, "tfds"}

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
  dataset = data.load(name, data_dir=str(tmp_path / "tfds"), cache_dir=str(tmp_path))
  found = sorted((i.tobytes(), n) for i, n in _pairs(dataset.train))
  assert found == sorted((i.tobytes(), n[-1]) for i, n in examples["train"])

  # The folder that the archive unpacks to is as good.
  (tmp_path / "folder").mkdir()
  for file, content in files.items():
    (tmp_path / "folder" / file).write_bytes(content)
  message = published.prepare(name, tmp_path / "folder", str(tmp_path / "tfds"))
  assert message.startswith(f"Already prepared: {name} with 20 train and 7 test")


def _pairs(split):
  return zip(split.images, split.labels.tolist(), strict=True)


def without(files, name):
  return {each: files[each] for each in files if each != name}


BATCH = "data_batch_3.bin"


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda files: without(files, BATCH), "has no data_batch_3.bin: it must be cifar-"),
    (lambda _: make_files("cifar100")[0], "has no batches.meta.txt: it must be cifar-"),
    (lambda files: files | {BATCH: files[BATCH][:-1]}, "12291 bytes, .* of 3073 bytes"),
    (lambda files: files | {BATCH: b""}, "has 0 bytes"),
    (lambda files: files | {BATCH: b"\x0a" * 3073}, "train labels .* between 0 and 9"),
    (
      lambda files: files | {"batches.meta.txt": b"a\nb\n" * 5},
      "There are 2 different n",
    ),
  ],
)
def test_other_archive_is_one_sentence_and_writes_nothing(damage, message, tmp_path):
  files = damage(make_files("cifar10")[0])
  path = write_archive(tmp_path / "a.tar.gz", files, "f")
  with pytest.raises(UsageError, match=message) as error:
    published.prepare("cifar10", path, str(tmp_path / "tfds"))
  assert "\n" not in str(error.value)
  assert not (tmp_path / "tfds").exists()


@pytest.mark.parametrize(
  "damage",
  [
    lambda content: content[:-5000],
    lambda content: content[:5000] + bytes(500) + content[5500:],
    lambda content: gzip.compress(gzip.decompress(content)[:20_000]),
    lambda _: b"<html>moved</html>",
    lambda _: None,
  ],
)
def test_damaged_archive_is_one_sentence(damage, tmp_path):
  path = write_archive(tmp_path / "a.tar.gz", make_files("cifar10")[0], "f")
  content = damage(path.read_bytes())
  path.unlink()
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(UsageError, match=r"a\.tar\.gz cannot be read \(.*\): it must be"):
    published.prepare("cifar10", path)
  with pytest.raises(UsageError, match="Unknown published dataset 'cifar11'"):
    published.prepare("cifar11", path)
