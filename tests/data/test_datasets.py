import logging
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from skipinit_jax import data
from skipinit_jax.data.prepare import idx
from skipinit_jax.errors import UsageError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, idx_files):
  """A small Fashion-MNIST, prepared, and the arrays it was made of."""
  folder = tmp_path_factory.mktemp("fashion")
  arrays = idx_files.write(folder / "source")
  idx.prepare("fashion_mnist", folder / "source", str(folder / "tfds"))
  return folder / "tfds", arrays


@pytest.fixture
def cache(tmp_path):
  return str(tmp_path / "cache")


def as_multiset(images, labels):
  return sorted(
    (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
  )


def test_digits_are_scikit_learns_in_their_order(cache):
  digits = data.load("digits", cache_dir=cache)
  reference = load_digits()
  assert digits.train.images.shape == (1472, 8, 8, 1)
  assert digits.test.images.shape == (325, 8, 8, 1)
  images = np.concatenate([digits.train.images, digits.test.images])[..., 0]
  assert images.dtype == np.uint8
  np.testing.assert_allclose(images * (16 / 255), reference.images, atol=0.5 * 16 / 255)
  labels = np.concatenate([digits.train.labels, digits.test.labels])
  assert labels.dtype == np.int32
  np.testing.assert_array_equal(labels, reference.target)
  assert (digits.num_classes, digits.image_shape) == (10, (8, 8, 1))


def test_prepared_set_holds_the_source_examples(prepared, cache):
  data_dir, arrays = prepared
  fashion = data.load("fashion_mnist", data_dir=str(data_dir), cache_dir=cache)
  for split, prefix in ((fashion.train, "train"), (fashion.test, "t10k")):
    assert split.images.dtype == np.uint8
    assert split.labels.dtype == np.int32
    assert as_multiset(split.images, split.labels) == as_multiset(*arrays[prefix])
  assert (fashion.num_classes, fashion.image_shape) == (10, (28, 28, 1))


def test_statistics_are_those_of_the_training_images():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 200, (1100, 4, 5, 3), np.uint8) * np.array(
    [1, 0, 1], np.uint8
  )
  images[..., 2] //= 3
  train = data.Split(images, np.zeros(1100, np.int32))
  test = data.Split(images[:1] + 50, np.zeros(1, np.int32))
  dataset = data.Dataset("made", 10, train, test)
  scaled = images.astype(np.float64) / 255
  np.testing.assert_allclose(dataset.mean, scaled.mean((0, 1, 2)), rtol=1e-6)
  expected = scaled.std((0, 1, 2))
  assert expected[1] == 0
  expected[1] = 1
  np.testing.assert_allclose(dataset.std, expected, rtol=1e-6)
  assert dataset.mean.dtype == dataset.std.dtype == np.float32


def make_set(name="made", **changes):
  """A data set of two classes whose images tell them apart, with changed arrays."""
  labels = np.arange(40, dtype=np.int32) % 2
  images = np.where(labels[:, None, None, None], 200, 50) * np.ones((40, 4, 6, 1))
  arrays = {"images": images.astype(np.uint8), "labels": labels} | changes
  split = data.Split(arrays["images"], arrays["labels"])
  return data.Dataset(name, 2, split, split)


@pytest.fixture
def registered(monkeypatch):
  """Forgets after the test what it registers."""
  monkeypatch.setattr(data.datasets, "_registered", {})
  return data.register


def test_registered_set_is_known_by_its_name_and_made_once(registered):
  calls = []
  registered("made", lambda: calls.append(1) or make_set())
  assert data.known_names() == (*data.NAMES, "made")
  assert data.load("made") is data.load("made")
  assert calls == [1]
  for name in ("made", "digits", "imagenet2012"):
    with pytest.raises(UsageError, match=f"{name!r}, which is that of another"):
      registered(name, make_set)
  with pytest.raises(UsageError, match=r"'mode'.*did you mean 'made'"):
    data.load("mode")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"images": np.zeros((40, 4, 6, 1), np.float32)}, "images are float32"),
    ({"images": np.zeros((40, 24), np.uint8)}, r"shape \(40, 24\)"),
    ({"labels": np.zeros(40, np.int64)}, "labels are int64"),
    ({"labels": np.zeros(39, np.int32)}, r"must be int32 \[40\]"),
    ({"labels": np.full(40, 2, np.int32)}, "2 to 2, but num_classes is 2"),
    ({"labels": np.full(40, -1, np.int32)}, "-1 to -1"),
    (
      {"images": np.zeros((0, 4, 6, 1), np.uint8), "labels": np.zeros(0, np.int32)},
      "no examples",
    ),
  ],
)
def test_arrays_that_are_no_data_set_are_refused(registered, changes, message):
  registered("made", lambda: make_set(**changes))
  with pytest.raises(UsageError, match=f"'made', train: .*{message}"):
    data.load("made")


def test_splits_of_different_shapes_are_refused(registered):
  made = make_set()
  other = data.Split(made.test.images[:, :3], made.test.labels)
  registered("made", lambda: data.Dataset("made", 2, made.train, other))
  with pytest.raises(UsageError, match=r"'made', test: images have shape \(3, 6, 1\)"):
    data.load("made")


@pytest.mark.parametrize(
  ("name", "command"),
  [
    (
      "fashion_mnist",
      "python -m experiments.prepare_data --dataset=fashion_mnist --source=DIR "
      "--data_dir={}",
    ),
    ("cifar10", "tfds.builder('cifar10', data_dir='{}', file_format='array_record')"),
    (
      "imagenet2012",
      "tfds.builder('imagenet2012', data_dir='{}', file_format='array_record')",
    ),
    ("imagenet2012", "{}/downloads/manual"),
    (
      "sample_photos",
      "python -m experiments.prepare_data --dataset=sample_photos --data_dir={}",
    ),
  ],
)
def test_missing_set_says_how_to_get_it(name, command, tmp_path):
  load = data.streaming.load if name in data.STREAMED_NAMES else data.load
  with pytest.raises(UsageError) as error:
    load(name, data_dir=str(tmp_path / "none"))
  message = str(error.value)
  assert f"{name!r} is not prepared in {tmp_path / 'none'}" in message
  assert command.format(tmp_path / "none") in message
  assert not (tmp_path / "none").exists()


def test_new_process_reads_the_default_directories_without_tensorflow(
  prepared, tmp_path
):
  environment = os.environ | {
    "TFDS_DATA_DIR": str(prepared[0]),
    "XDG_CACHE_HOME": str(tmp_path / "xdg"),
  }
  program = (
    "import sys; from skipinit_jax import data; "
    "print(data.load('fashion_mnist').train.num_examples); "
    "print('tensorflow_datasets' in sys.modules, 'tensorflow' in sys.modules)"
  )
  done = subprocess.run(
    [sys.executable, "-c", program],
    check=True,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.stdout == "60\nTrue False\n"
  cached = list((tmp_path / "xdg" / "skipinit_jax" / "data").iterdir())
  assert [path.name for path in cached] == ["fashion_mnist.npz"]


def test_second_load_comes_from_the_cache(prepared, cache, monkeypatch):
  first = data.load("fashion_mnist", data_dir=str(prepared[0]), cache_dir=cache)
  monkeypatch.setattr(
    data.datasets, "_decode_prepared", lambda builder: pytest.fail("decoded")
  )
  second = data.load("fashion_mnist", data_dir=str(prepared[0]), cache_dir=cache)
  for split in ("train", "test"):
    for field in ("images", "labels"):
      a, b = (getattr(getattr(d, split), field) for d in (first, second))
      np.testing.assert_array_equal(a, b)
      assert a.dtype == b.dtype


def test_set_prepared_anew_is_not_served_from_the_old_cache(tmp_path, cache, idx_files):
  for seed in (1, 2):
    arrays = idx_files.write(tmp_path / "source", seed=seed)
    shutil.rmtree(tmp_path / "tfds", ignore_errors=True)
    idx.prepare("fashion_mnist", tmp_path / "source", str(tmp_path / "tfds"))
    fashion = data.load(
      "fashion_mnist", data_dir=str(tmp_path / "tfds"), cache_dir=cache
    )
    test = fashion.test
    assert as_multiset(test.images, test.labels) == as_multiset(*arrays["t10k"])


def _flip_a_bit_of_an_image(content):
  at = content.index(b"train_images") + 5000
  return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
  "damage",
  [lambda content: content[:9999], _flip_a_bit_of_an_image, lambda content: b"text"],
)
def test_damaged_cache_is_an_error_that_names_the_file(damage, cache):
  data.load("digits", cache_dir=cache)
  path = pathlib.Path(cache) / "digits.npz"
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(UsageError, match=r"digits\.npz is damaged: delete it"):
    data.load("digits", cache_dir=cache)
  path.unlink()
  data.load("digits", cache_dir=cache)
  assert path.exists()


def test_unwritable_cache_only_warns(tmp_path, caplog):
  # A file where the folder should be: unlike a mode, it also stops root.
  (tmp_path / "file").write_text("")
  with caplog.at_level(logging.WARNING, logger="absl"):
    digits = data.load("digits", cache_dir=str(tmp_path / "file" / "cache"))
  assert digits.train.num_examples == 1472
  assert "Cannot write the data cache" in caplog.text


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_prepared_files_are_an_error_that_names_them(
  damage, prepared, tmp_path, cache
):
  shutil.copytree(prepared[0], tmp_path / "tfds")
  (record,) = (tmp_path / "tfds").glob("fashion_mnist/*/*test.array_record*")
  if damage == "truncated":
    record.write_bytes(record.read_bytes()[:9000])
  else:
    record.unlink()
  with pytest.raises(UsageError) as error:
    data.load("fashion_mnist", data_dir=str(tmp_path / "tfds"), cache_dir=cache)
  assert f"{record.parent} are damaged" in str(error.value)
  assert "\n" not in str(error.value)


def test_prepared_files_in_another_format_are_an_error(prepared, tmp_path):
  shutil.copytree(prepared[0], tmp_path / "tfds")
  (info,) = (tmp_path / "tfds").glob("fashion_mnist/*/dataset_info.json")
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  for path in info.parent.glob("*.array_record*"):
    path.rename(path.with_name(path.name.replace("array_record", "tfrecord")))
  with pytest.raises(UsageError, match="not in ArrayRecord format"):
    data.load("fashion_mnist", data_dir=str(tmp_path / "tfds"))


def test_data_dir_that_is_a_file_is_an_error(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UsageError, match="file"):
    data.load("cifar10", data_dir=str(tmp_path / "file"))
