"""Folders of class folders of images, as people have them."""

import contextlib
import io

import numpy as np
import pytest
from PIL import Image

from skipinit_jax import data
from skipinit_jax.data import datasets, image_folder, streaming
from skipinit_jax.errors import UsageError
from skipinit_jax.training import TrainConfig


def encode(value, kind="JPEG", mode="L"):
  """An image file of one gray."""
  file = io.BytesIO()
  Image.new("L", (40, 30), value).convert(mode).save(file, kind)
  return file.getvalue()


# By path: the gray. A suffix is no promise, and folders may lie in class folders.
FILES = {
  "train/cat/1.jpg": (10, encode(10)),
  "train/cat/2.JPEG": (60, encode(60, "PNG", "RGB")),
  "train/cat/more/3.png": (110, encode(110, "PNG")),
  "train/ape/4.jpg": (160, encode(160, "JPEG", "CMYK")),
  "val/cat/5.jpg": (210, encode(210)),
}


@pytest.fixture
def folder(tmp_path):
  for name, (_, content) in FILES.items():
    path = tmp_path / "pets" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  for name in ("train/cat/Thumbs.db", "train/.DS_Store", "train/cat/.hidden.jpg"):
    (tmp_path / "pets" / name).write_bytes(b"none")
  return tmp_path / "pets"


@pytest.fixture
def registered(monkeypatch, folder):
  monkeypatch.setattr(datasets, "_folders", {})
  data.register("pets", folder)


def shown(batch):
  """The grays of images, and their labels."""
  return sorted(
    zip(batch[0].mean((1, 2, 3)).round().tolist(), batch[1].tolist(), strict=True)
  )


def test_batches_have_the_images_with_the_places_of_their_classes(folder, registered):
  for dataset in (
    streaming.load("image_folder", data_dir=str(folder), image_size=16),
    TrainConfig(dataset="pets", image_size=16).load_dataset(),
  ):
    assert (dataset.num_classes, dataset.image_shape) == (2, (16, 16, 3))
    with contextlib.closing(
      streaming.train_batches(dataset, batch_size=4, seed=0)
    ) as batches:
      # ape before cat. The gray that CMYK becomes is near.
      expected = [(10, 1), (60, 1), (110, 1), (160, 0)]
      np.testing.assert_allclose(shown(next(batches)), expected, atol=1)
    (batch,) = streaming.eval_batches(dataset, batch_size=2)
    assert shown(batch) == [(0, 0), (210, 1)]
    assert batch[2].tolist() == [True, False]


def test_record_tells_folders_apart(folder):
  def record():
    return image_folder.load(folder)[0].record()

  first = record()
  assert first["num_examples"] == 4
  assert first == record()
  path = folder / "train/cat/1.jpg"
  content = path.read_bytes()
  for other in (content + b"more", content[:-9] + b"other" + content[-4:]):
    path.write_bytes(other)
    assert record() != first
  path.write_bytes(content)
  assert record() == first


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda f: (f / "train").rename(f / "tain"), "needs the folders train and val"),
    (lambda f: (f / "val").rename(f / "eval"), "needs the folders train and val"),
    (lambda f: (f / "train/eel").mkdir(), r"no images in .*train/eel: fill .*\.jpg"),
    (lambda f: (f / "val/cat").rename(f / "val/dog"), "val has the class 'dog', which"),
    (lambda f: (f / "val/cat/up").symlink_to(f / "val"), "leads back to .*val/cat:"),
    (
      lambda f: (
        (f / "val/cat/5.jpg").rename(f / "val/5.jpg"),
        (f / "val/cat").rmdir(),
      ),
      "val has no class folders: put each image into",
    ),
  ],
)
def test_other_folder_is_one_sentence(folder, change, message):
  change(folder)
  with pytest.raises(UsageError, match=message):
    streaming.load("image_folder", data_dir=str(folder))


def test_a_folder_that_is_filled_is_read_again(folder):
  (folder / "train/eel").mkdir()
  with pytest.raises(UsageError, match="no images in"):
    image_folder.load(folder)
  (folder / "train/eel/6.jpg").write_bytes(encode(6))
  assert image_folder.load(folder)[0].num_examples == 5


def test_what_cannot_be_read_later_names_the_file_and_spares_the_folder(folder):
  for damage, message in (
    (lambda path: path.write_bytes(encode(10)[:-20]), r"\(file 'cat/1.jpg'\) is no im"),
    (lambda path: path.unlink(), r"cat/1.jpg cannot be read \(No such file"),
  ):
    dataset = streaming.load("image_folder", data_dir=str(folder), image_size=8)
    batches = streaming.train_batches(dataset, batch_size=4, seed=0)
    damage(folder / "train/cat/1.jpg")
    with pytest.raises(UsageError, match=message) as error:
      next(batches)
    assert "delete" not in str(error.value)
  with pytest.raises(UsageError, match=r"cat/1.jpg cannot be read \(No such file"):
    dataset.record()


def test_names_and_paths(registered, tmp_path):
  assert "pets" in data.known_names() and data.is_streamed("pets")
  with pytest.raises(UsageError, match="'pets' is streamed, but is needed in memory"):
    data.load("pets")
  with pytest.raises(UsageError, match="data_dir is missing: dataset 'image_folder'"):
    streaming.load("image_folder")
  with pytest.raises(UsageError, match="'pets', which is that of another data set"):
    data.register("pets", tmp_path)
  with pytest.raises(UsageError, match="s3://pets is an address"):
    data.register("others", "s3://pets")
  with pytest.raises(UsageError, match="crop_padding is 4: it is for "):
    TrainConfig(dataset="pets", crop_padding=4).validate()
