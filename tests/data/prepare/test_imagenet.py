"""ImageNet's folders, as tests write them: each synset has one tiny image."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from skipinit_jax.data import streaming
from skipinit_jax.data.prepare import imagenet
from skipinit_jax.errors import UsageError

SYNSETS = tuple(tfds.builder("imagenet2012").info.features["label"].names)


def encode(number, mode="RGB", kind="JPEG"):
  """An image file whose size gives a number."""
  file = io.BytesIO()
  Image.new("RGB", (8 + number % 32, 8 + number // 32)).convert(mode).save(file, kind)
  return file.getvalue()


# ImageNet has both: 22 files in CMYK, and a PNG file that is called JPEG.
CONTENTS = {
  number: encode(number, *{3: ["CMYK"], 4: ["RGB", "PNG"]}.get(number, []))
  for number in range(len(SYNSETS))
}


@pytest.fixture
def source(tmp_path, monkeypatch):
  monkeypatch.setattr(imagenet, "_FILE_EXAMPLES", 100)
  for split in ("train", "val"):
    for number, name in enumerate(SYNSETS):
      path = tmp_path / "images" / split / name / f"{name}_{split}.JPEG"
      path.parent.mkdir(parents=True)
      path.write_bytes(CONTENTS[number])
  return tmp_path / "images"


def prepare(source):
  return imagenet.prepare(source, str(source.parent / "tfds"))


def flatten(source):
  """Moves the validation images into one folder, sorted backwards."""
  for number, name in enumerate(SYNSETS):
    file = source / "val" / f"ILSVRC2012_val_{999 - number:08}.JPEG"
    (source / "val" / name / f"{name}_val.JPEG").rename(file)
    (source / "val" / name).rmdir()


def test_goes_on_after_damage_and_is_read_as_the_set(source, monkeypatch, capsys):
  damaged = source / "train" / SYNSETS[7] / f"{SYNSETS[7]}_train.JPEG"
  damaged.write_bytes(CONTENTS[7][:-9])
  flatten(source)
  # tensorflow-datasets has the classes of the 50,000 images.
  assert len(imagenet._validation_labels()) == 50_000
  with pytest.raises(UsageError, match="and 1000 images instead of the 50000 whose"):
    prepare(source)
  monkeypatch.setattr(imagenet, "_validation_labels", lambda: SYNSETS[::-1])
  with pytest.raises(UsageError, match=rf"1 of the .* decoded: {damaged} \(.*go.s on"):
    prepare(source)
  damaged.write_bytes(CONTENTS[7])
  (folder,) = (source.parent / "tfds" / "imagenet2012").iterdir()
  before = {
    path.name[:-17]: path.stat().st_ino
    for path in folder.iterdir()
    if path.suffix != ".tmp"
  }
  assert len(before) == 19
  message = prepare(source)
  assert message.startswith("Prepared imagenet2012 with 1000 train and 1000 validation")
  assert prepare(source).startswith("Already prepared: imagenet2012 with 1000 train")
  assert "20 of 20 files" in capsys.readouterr().err

  (folder,) = (source.parent / "tfds" / "imagenet2012").iterdir()
  after = {path.name: path.stat().st_ino for path in folder.glob("*array_record*")}
  assert len(after) == 20
  assert before.items() <= after.items()
  dataset = streaming.load(
    "imagenet2012", data_dir=str(source.parent / "tfds"), image_size=8
  )
  assert dataset.num_classes == 1000
  builder = tfds.builder("imagenet2012", data_dir=source.parent / "tfds")
  for split, name in (
    (dataset.train, "{}_train.JPEG"),
    (dataset.test, "ILSVRC2012_val_{:08}.JPEG"),
  ):
    assert builder.info.splits[split.name].num_examples == split.num_examples == 1000
    records = split.open()
    labels = [int(records[number]["label"]) for number in range(1000)]
    assert sorted(labels) == [*range(1000)]
    # Mixed, so that a part of the files has all kinds of classes.
    assert np.std(labels[:100]) > 200
    for record in (records[number] for number in range(0, 1000, 7)):
      label = record["label"]
      assert record["image"] == CONTENTS[label]
      key = SYNSETS[label] if split is dataset.train else 999 - label
      assert record["file_name"].decode() == name.format(key)
  (batch,) = streaming.eval_batches(dataset, batch_size=1000)
  assert sorted(batch[1].tolist()) == [*range(1000)]


def test_other_folder_is_one_sentence_and_writes_nothing(source):
  synset = source / "val" / SYNSETS[1]
  # Each is found before those above it.
  for change, message in (
    ((synset / f"{SYNSETS[1]}_val.JPEG").unlink, "no images in .*val/n01443537"),
    (
      lambda: synset.rename(source / SYNSETS[1]),
      "val has 999 class folders and no n01443537 among .*=image_folder",
    ),
    ((source / "train" / "cat").mkdir, "1001 class folders and 'cat' among"),
    (lambda: (source / "val").rename(source / "test2"), "Source .* needs the folders"),
  ):
    change()
    with pytest.raises(UsageError, match=message):
      prepare(source)
    assert not (source.parent / "tfds").exists()
