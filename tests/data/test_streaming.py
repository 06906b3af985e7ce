import contextlib
import io
import itertools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from skipinit_jax import data
from skipinit_jax.data import decode, streaming
from skipinit_jax.data.prepare import sample_photos
from skipinit_jax.errors import UsageError

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZES = {"train": 40, "validation": 13}


def flat_examples(split):
  """Gray images, of which each pixel gives the example's number."""
  for number in range(SIZES[split]):
    file = io.BytesIO()
    Image.new("L", (60 + number, 50), 20 + 5 * number).save(file, "JPEG", quality=98)
    yield {
      "image": file.getvalue(),
      "label": number % 10,
      "file_name": f"{split}_{number}.jpg",
    }


def numbers_of(images):
  """The examples' numbers that images show, and -1 where one is blank."""
  values = images.reshape(len(images), -1).astype(float)
  assert (np.ptp(values, axis=1) <= 2).all()
  numbers = np.round((values.mean(axis=1) - 20) / 5).astype(int)
  return np.where(values.mean(axis=1) == 0, -1, numbers)


def prepare(folder, sizes=SIZES, examples=None):
  """Writes a small data set under the name sample_photos; returns its folder."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sample_photos, "SIZES", sizes)
    if examples is not None:
      patch.setattr(sample_photos, "_examples", examples)
    sample_photos.prepare(str(folder))
  return folder


def load(folder, image_size=24):
  return streaming.load("sample_photos", data_dir=str(folder), image_size=image_size)


def take(batches, count):
  with contextlib.closing(batches):
    return list(itertools.islice(batches, count))


def assert_equal(batches, others):
  for batch, other in zip(batches, others, strict=True):
    for part, other_part in zip(batch, other, strict=True):
      np.testing.assert_array_equal(part, other_part)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp("tfds")
  return types.SimpleNamespace(
    photos=prepare(root / "photos"), flat=prepare(root / "flat", examples=flat_examples)
  )


@pytest.fixture(scope="module")
def photos(folders):
  return load(folders.photos)


@pytest.fixture(scope="module")
def flat(folders):
  return load(folders.flat)


@pytest.fixture(scope="module")
def photo_batches(photos):
  """The first seven batches of 12: two epochs and a third's first."""
  return take(streaming.train_batches(photos, batch_size=12, seed=5), 7)


def test_the_sample_has_the_format_of_imagenet(folders):
  (folder,) = (folders.photos / "sample_photos").iterdir()
  read = tfds.builder_from_directory(folder)
  reference = tfds.builder("imagenet2012", data_dir=folders.photos / "none").info
  ours, theirs = read.info.features, reference.features
  assert {name: type(feature) for name, feature in ours.items()} == {
    name: type(feature) for name, feature in theirs.items()
  }
  assert {name: info.num_examples for name, info in read.info.splits.items()} == SIZES


def test_batches_pair_images_with_labels_and_see_no_example_twice(flat):
  batches = take(streaming.train_batches(flat, batch_size=12, seed=0), 30)
  epochs = []
  for epoch in range(10):
    numbers = []
    for images, labels in batches[3 * epoch : 3 * epoch + 3]:
      assert images.shape == (12, 24, 24, 3) and images.dtype == np.uint8
      assert labels.shape == (12,) and labels.dtype == np.int32
      numbers.append(numbers_of(images))
      np.testing.assert_array_equal(labels, numbers[-1] % 10)
    epochs.append(np.concatenate(numbers).tolist())
    assert len(set(epochs[-1])) == 36
  assert len({tuple(order) for order in epochs}) == 10
  # Another four are left out each time: (4 / 40)^10 is the chance that one always is.
  assert set().union(*epochs) == set(range(40))


def test_crops_and_flips_are_drawn_anew_for_each_example_and_epoch(photos):
  every = streaming.train_batches(photos, batch_size=40, seed=1)
  (first, first_labels), (second, second_labels) = take(every, 2)
  for label in range(10):
    images = [*first[first_labels == label], *second[second_labels == label]]
    assert len({image.tobytes() for image in images}) == len(images) == 8


def test_half_of_the_images_are_mirrored(flat, monkeypatch):
  def ramp(encoded, choose_window, size):
    assert choose_window.func is decode.random_window
    image = np.zeros((size, size, 3), np.uint8)
    image[:, : size // 2] = 200
    # None is upside down.
    image[0] = 255
    return image

  monkeypatch.setattr(decode, "decode", ramp)
  batches = take(streaming.train_batches(flat, batch_size=40, seed=0), 10)
  images = np.concatenate([images for images, _ in batches])
  assert (images[:, 0] == 255).all()
  mirrored = images[:, 1, -1, 0] == 200
  np.testing.assert_array_equal(mirrored, images[:, 1, 0, 0] == 0)
  # Five deviations of a fair coin thrown 400 times.
  assert abs(mirrored.sum() - 200) < 50


def test_processes_share_the_batches_of_one(photos, photo_batches):
  for index in range(4):
    part = streaming.train_batches(
      photos, batch_size=12, seed=5, process_index=index, process_count=4
    )
    rows = slice(3 * index, 3 * index + 3)
    assert_equal(take(part, 4), [(i[rows], y[rows]) for i, y in photo_batches[:4]])


def test_resumes_at_any_batch_and_replays_nothing(photos, photo_batches):
  for step in (1, 5):
    resumed = streaming.train_batches(photos, batch_size=12, seed=5, first_step=step)
    assert_equal(take(resumed, 7 - step), photo_batches[step:])
  late, other = (
    take(streaming.train_batches(photos, batch_size=12, seed=s, first_step=10**9), 1)
    for s in (5, 6)
  )
  # The seed decides the order, and not the crops alone.
  assert not np.array_equal(late[0][1], other[0][1])


def test_pieces_and_worker_processes_change_nothing(photos, photo_batches, monkeypatch):
  # The largest divisor of 6 up to 5 is 3.
  monkeypatch.setattr(streaming, "_MAX_PIECE_ROWS", 5)
  part = {"first_step": 2, "process_index": 1, "process_count": 2, "num_workers": 2}
  batches = streaming.train_batches(photos, batch_size=12, seed=5, **part)
  assert_equal(take(batches, 5), [(i[6:], y[6:]) for i, y in photo_batches[2:]])


@pytest.mark.parametrize(("batch_size", "process_count"), [(4, 1), (12, 2), (52, 4)])
def test_evaluation_counts_each_example_once(batch_size, process_count, flat):
  parts = [
    take(
      streaming.eval_batches(
        flat, batch_size=batch_size, process_index=index, process_count=process_count
      ),
      None,
    )
    for index in range(process_count)
  ]
  assert {len(part) for part in parts} == {-(-13 // batch_size)}
  seen = []
  for images, labels, mask in itertools.chain(*parts):
    assert len(images) == len(labels) == len(mask) == batch_size // process_count
    numbers = numbers_of(images)
    np.testing.assert_array_equal(mask, numbers >= 0)
    np.testing.assert_array_equal(labels[mask], numbers[mask] % 10)
    seen += numbers[mask].tolist()
  assert sorted(seen) == list(range(13))


def test_evaluation_sees_the_center(flat, monkeypatch):
  def blank(encoded, choose_window, size):
    assert choose_window is decode.center_window
    return np.full((size, size, 3), 7, np.uint8)

  monkeypatch.setattr(decode, "decode", blank)
  ((images, _, mask),) = take(streaming.eval_batches(flat, batch_size=13), None)
  assert mask.all() and (images == 7).all()


def test_corrupt_record_is_an_error_that_names_it(tmp_path):
  def examples(split):
    for number, example in enumerate(flat_examples(split)):
      if split == "validation" and number == 12:
        example["image"] = example["image"][:300]
      yield example

  damaged = load(prepare(tmp_path, examples=examples))
  pattern = r"Record \d+ of the validation split of 'sample_photos' in .*validation_12"
  batches = streaming.eval_batches(damaged, batch_size=4, num_workers=1)
  seen = []
  with contextlib.closing(batches), pytest.raises(UsageError, match=pattern) as error:
    seen.extend(number for images, _, _ in batches for number in numbers_of(images))
  assert "\n" not in str(error.value)
  assert 12 not in seen


def test_record_finds_a_file_of_the_same_size(folders, tmp_path):
  shutil.copytree(folders.flat, tmp_path / "tfds")
  first = load(folders.flat).record()
  assert load(tmp_path / "tfds").record() == first
  (path,) = tmp_path.glob("tfds/sample_photos/*/*train.array_record*")
  content = bytearray(path.read_bytes())
  # The last of the blocks that are read, but one.
  content[(len(content) - 2**12) * 2 // 3] ^= 1
  path.write_bytes(content)
  changed = load(tmp_path / "tfds").record()
  assert changed.pop("train") != first.pop("train") and changed == first


def test_damaged_and_missing_files_are_errors(folders, tmp_path):
  shutil.copytree(folders.flat, tmp_path / "tfds")
  (path,) = tmp_path.glob("tfds/sample_photos/*/*validation.array_record*")
  content = path.read_bytes()
  # At the second length array_record opens the file, and returns None for a record.
  for length in (5000, 65536):
    streaming._open.cache_clear()
    path.write_bytes(content[:length])
    with pytest.raises(UsageError, match=r"Record \d+ of the validation split .* read"):
      take(streaming.eval_batches(load(tmp_path / "tfds"), batch_size=4), None)
  prepare(tmp_path / "half", sizes={"train": 10})
  with pytest.raises(UsageError, match=r"'sample_photos' in .* has no validation"):
    load(tmp_path / "half")


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda _: data.load("imagenet2012"), "'imagenet2012' is streamed.*digits"),
    (lambda _: streaming.load("cifar10"), "'cifar10' is in memory.*imagenet2012"),
    (lambda _: streaming.load("imagenet"), "did you mean 'imagenet2012'"),
    (
      lambda photos: streaming.train_batches(photos, batch_size=41, seed=0),
      "41 is not between 1 and 40",
    ),
    (lambda photos: streaming.eval_batches(photos, batch_size=0), "batch size 0"),
    (
      lambda photos: streaming.eval_batches(photos, batch_size=10, process_count=4),
      "10 is not a multiple of 4",
    ),
    (
      lambda photos: streaming.eval_batches(photos, batch_size=10, num_workers=-1),
      "num_workers is -1",
    ),
    (
      lambda photos: streaming.eval_batches(photos, batch_size=10, num_workers=2),
      "/dev/shm has 0 MiB free.*--shm-size",
    ),
  ],
)
def test_bad_arguments_are_errors_at_once(call, message, photos, monkeypatch):
  usage = types.SimpleNamespace(free=2**12)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  with pytest.raises(UsageError, match=message):
    call(photos)


PROGRAM = """
import multiprocessing, sys
from absl import app
from skipinit_jax.data import streaming

def main(argv):
  dataset = streaming.load("sample_photos", data_dir=argv[1], image_size=24)
  for _ in streaming.train_batches(dataset, batch_size=8, seed=0, num_workers=2):
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)

if __name__ == "__main__":
  app.run(main)
"""


def is_running(pid):
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except (FileNotFoundError, ProcessLookupError):
    return False
  return stat.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_program(sent, folders, tmp_path, child_environment):
  script = tmp_path / "program.py"
  script.write_text(PROGRAM)
  program = subprocess.Popen(
    [sys.executable, str(script), str(folders.photos)],
    # A process that touched JAX's devices would fail.
    env=child_environment({"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "none"}),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  workers = [int(pid) for pid in program.stdout.readline().split()]
  try:
    assert len(workers) == 2 and all(map(is_running, workers))
    # Ctrl-C goes to all processes.
    (os.killpg if sent == signal.SIGINT else os.kill)(program.pid, sent)
    _, messages = program.communicate(timeout=200)
    deadline = time.monotonic() + 30
    while any(map(is_running, workers)) and time.monotonic() < deadline:
      time.sleep(0.05)
    assert not any(map(is_running, workers))
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(program.pid, signal.SIGKILL)
  # One traceback, the program's own.
  assert messages.count("Traceback") == (sent == signal.SIGINT)
