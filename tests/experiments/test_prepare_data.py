import numpy as np
import pytest

from skipinit_jax import data


def write_idx(path, array):
  sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
  path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


def test_prepares_what_load_reads(run_program, tmp_path):
  labels = np.arange(30, dtype=np.uint8) % 10
  # Every image is filled with its own number.
  images = np.repeat(np.arange(30, dtype=np.uint8), 28 * 28).reshape(30, 28, 28)
  for prefix, size in (("train", 30), ("t10k", 20)):
    write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", images[:size])
    write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", labels[:size])
  flags = [f"--source={tmp_path}", f"--data_dir={tmp_path / 'tfds'}"]
  done = run_program(
    ["experiments.prepare_data", "--dataset=fashion_mnist", *flags], status=0
  )
  assert done.stdout.startswith("Prepared fashion_mnist with 30 train and 20 test")
  dataset = data.load(
    "fashion_mnist", data_dir=str(tmp_path / "tfds"), cache_dir=str(tmp_path)
  )
  for split, size in ((dataset.train, 30), (dataset.test, 20)):
    numbers = split.images[:, 0, 0, 0]
    assert sorted(numbers.tolist()) == list(range(size))
    np.testing.assert_array_equal(split.labels, numbers % 10)


def test_prepares_the_photographs_without_a_source(run_program, tmp_path):
  flags = ["--dataset=sample_photos", f"--data_dir={tmp_path}"]
  done = run_program(["experiments.prepare_data", *flags], status=0)
  assert done.stdout.startswith("Prepared sample_photos with 250 train and 50 valid")
  dataset = data.streaming.load("sample_photos", data_dir=str(tmp_path))
  assert (dataset.train.num_examples, dataset.test.num_examples) == (250, 50)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--source=."], "error: The flag --dataset is missing"),
    (["--dataset=cifar10"], "error: Unknown dataset 'cifar10': choose one of fashion"),
    (["--dataset=fashion_mnist"], "error: --source is missing"),
    (["--dataset=fashion_mnist", "--source=/none"], "error: Source '/none' is not a"),
  ],
)
def test_bad_flags_are_one_sentence(flags, message, run_program):
  done = run_program(["experiments.prepare_data", *flags], status=1)
  assert done.stdout == ""
  assert done.stderr.startswith(message)
  assert done.stderr.count("\n") == 1
