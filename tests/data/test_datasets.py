import logging
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from skipinit_jax import data
from skipinit_jax.data.prepare import published
from skipinit_jax.errors import UsageError
from tests.data import idx


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """The folder of a small Fashion-MNIST, prepared."""
  folder = tmp_path_factory.mktemp("fashion")
  idx.write(folder / "source")
  published.prepare("fashion_mnist", folder / "source", str(folder / "tfds"))
  return folder / "tfds"


@pytest.fixture
def cache(tmp_path):
  return str(tmp_path / "cache")


def assert_holds(dataset, arrays):
  """Asserts that a set has the examples of IDX files, in whatever order."""
  for split, prefix in ((dataset.train, "train"), (dataset.test, "t10k")):
    assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
    found, expected = (
      sorted((image.tobytes(), int(label)) for image, label in zip(*pair, strict=True))
      for pair in ((split.images, split.labels), arrays[prefix])
    )
    assert found == expected


def test_digits_are_scikit_learns_in_their_order(cache):
  from sklearn.datasets import load_digits  # It takes seconds to import.

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


def test_statistics_are_those_of_the_training_images():
  images = np.random.default_rng(0).integers(0, 200, (1100, 4, 5, 3), np.uint8)
  images[..., 1] = 0
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


def make_set(**changes):
  """A data set of two classes whose images tell them apart, with changed arrays."""
  labels = np.arange(40, dtype=np.int32) % 2
  images = np.where(labels[:, None, None, None], 200, 50) * np.ones((40, 4, 6, 1))
  arrays = {"images": images.astype(np.uint8), "labels": labels} | changes
  split = data.Split(arrays["images"], arrays["labels"])
  return data.Dataset("made", 2, split, split)


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


def test_arrays_of_jax_become_those_of_numpy(registered):
  images = jnp.asarray(make_set().train.images)
  registered("made", lambda: make_set(images=images, labels=np.arange(40) % 2))
  made = data.load("made")
  # What NumPy made of integers is narrowed.
  assert made.train.labels.dtype == made.test.labels.dtype == np.int32
  assert type(made.train.images) is np.ndarray
  np.testing.assert_array_equal(made.train.images, images)


def test_names_that_no_folder_can_have_are_refused(registered):
  with pytest.raises(UsageError, match=r"name of a data set is '../outside'"):
    registered("../outside", make_set)


def other_test_shape():
  made = make_set()
  other = data.Split(made.test.images[:, :3], made.test.labels)
  return data.Dataset("made", 2, made.train, other)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: None, " cannot be made"),
    (lambda: 1 / 0, " cannot be made"),
    (lambda: make_set, " cannot be made"),
    (
      lambda: make_set(images=np.zeros((40, 4, 6, 1), np.float32)),
      ", train: images are float32",
    ),
    (
      lambda: make_set(images=np.zeros((40, 24), np.uint8)),
      r", train: .*shape \(40, 24\)",
    ),
    (lambda: make_set(labels=np.zeros(40)), ", train: labels are float64"),
    (
      lambda: make_set(labels=np.full(40, 2**40)),
      r", train: labels are \d+ to 1099511627776",
    ),
    (
      lambda: make_set(labels=np.zeros(39, np.int32)),
      r", train: .*must be integers of shape \(40,\)",
    ),
    (
      lambda: make_set(labels=np.full(40, 2, np.int32)),
      ", train: .*2 to 2, but num_classes is 2",
    ),
    (
      lambda: make_set(images=np.zeros((0, 4, 6, 1), "u1"), labels=np.zeros(0, int)),
      ", train: .*no examples",
    ),
    (other_test_shape, r", test: images have shape \(3, 6, 1\)"),
  ],
)
def test_what_makes_no_data_set_is_one_sentence(registered, make, message):
  registered("made", make)
  with pytest.raises(UsageError, match=f"'made'{message}") as error:
    data.load("made")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("name", "source"),
  [
    ("fashion_mnist", " --source=DIR"),
    ("cifar10", " --source=cifar-10-binary.tar.gz"),
    ("imagenet2012", " --source=DIR"),
    ("sample_photos", ""),
  ],
)
def test_missing_set_says_how_to_get_it(name, source, tmp_path):
  load = data.streaming.load if name in data.STREAMED_NAMES else data.load
  folder = tmp_path / "none"
  with pytest.raises(UsageError) as error:
    load(name, data_dir=str(folder))
  assert f"{name!r} is not prepared in {folder}" in str(error.value)
  command = f"prepare_data --dataset={name}{source} --data_dir={folder}"
  assert command in str(error.value)
  assert not folder.exists()


def test_reads_the_default_directories(prepared, tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert data.load("fashion_mnist").train.num_examples == 60
  assert (tmp_path / "skipinit_jax" / "data" / "fashion_mnist.npz").exists()


def test_halved_images_are_means_of_four_pixels(prepared, cache):
  def load(name):
    return data.load(name, data_dir=str(prepared), cache_dir=cache)

  full, half = load("fashion_mnist"), load("fashion_mnist_half")
  for split, whole in ((half.train, full.train), (half.test, full.test)):
    means = whole.images.reshape(-1, 14, 2, 14, 2, 1).mean((2, 4))
    np.testing.assert_allclose(split.images, means, atol=0.5)
    np.testing.assert_array_equal(split.labels, whole.labels)
  small = load("fashion_mnist_half_4096")
  np.testing.assert_array_equal(small.train.images, half.train.images[:4096])
  quarter = load("fashion_mnist_quarter_2048")
  means = full.train.images[:2048].reshape(-1, 7, 4, 7, 4, 1).mean((2, 4))
  # Rounded twice.
  np.testing.assert_allclose(quarter.train.images, means, atol=1)


def test_cache_serves_one_preparation_and_no_other(tmp_path, cache, monkeypatch):
  def load():
    return data.load("fashion_mnist", data_dir=data_dir, cache_dir=cache)

  data_dir = str(tmp_path / "tfds")
  for seed in (1, 2):
    arrays = idx.write(tmp_path / "source", seed=seed)
    shutil.rmtree(data_dir, ignore_errors=True)
    published.prepare("fashion_mnist", tmp_path / "source", data_dir)
    fresh = load()
    assert_holds(fresh, arrays)
  monkeypatch.setattr(
    data.datasets, "_decode_prepared", lambda builder: pytest.fail("decoded")
  )
  again = load()
  assert_holds(again, arrays)
  np.testing.assert_array_equal(again.train.images, fresh.train.images)
  assert (again.num_classes, again.image_shape) == (10, (28, 28, 1))


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


def test_file_where_a_folder_should_be(tmp_path, caplog):
  # Unlike a mode, it also stops root.
  file = tmp_path / "file"
  file.write_text("")
  with caplog.at_level(logging.WARNING, logger="absl"):
    digits = data.load("digits", cache_dir=str(file / "cache"))
  assert digits.train.num_examples == 1472
  assert "Cannot write the data cache" in caplog.text
  with pytest.raises(UsageError, match="file"):
    data.load("cifar10", data_dir=str(file))


def truncate(record):
  record.write_bytes(record.read_bytes()[:9000])


def store_as_tfrecord(record):
  info = record.parent / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  for path in record.parent.glob("*.array_record*"):
    path.rename(path.with_name(path.name.replace("array_record", "tfrecord")))


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (truncate, r"fashion_mnist/\S+ cannot be read .* prepare it again"),
    (pathlib.Path.unlink, r"fashion_mnist/\S+ cannot be read .* prepare it again"),
    (
      lambda record: (record.parent / "dataset_info.json").write_bytes(b""),
      "fashion_mnist cannot be read .* prepare it again",
    ),
    (store_as_tfrecord, "not in ArrayRecord format"),
  ],
)
def test_bad_prepared_files_are_one_sentence(
  damage, message, prepared, tmp_path, cache
):
  shutil.copytree(prepared, tmp_path / "tfds")
  (record,) = (tmp_path / "tfds").glob("fashion_mnist/*/*test.array_record*")
  damage(record)
  with pytest.raises(UsageError, match=message) as error:
    data.load("fashion_mnist", data_dir=str(tmp_path / "tfds"), cache_dir=cache)
  assert "\n" not in str(error.value)
