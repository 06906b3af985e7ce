import numpy as np
import pytest

from skipinit_jax import data


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["cifar10"], "--source is missing: the archive of the binary version."),
    (["imagenet2012", "--source=/none"], "Source /none needs the folders train and v"),
    (["cifar100", "--source=/none"], "Source /none cannot be read (No such file"),
  ],
)
def test_bad_flags_are_one_sentence(run_program, flags, message):
  done = run_program(
    ["experiments.prepare_data", f"--dataset={flags[0]}", *flags[1:]], status=1
  )
  assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_prepares_what_load_reads(run_program, tmp_path):
  # Every image is filled with its own number.
  numbers = np.arange(30, dtype=np.uint8)
  images = np.repeat(numbers, 28 * 28).reshape(30, 28, 28)
  for prefix, size in (("train", 30), ("t10k", 20)):
    for stem, array in (("images-idx3", images), ("labels-idx1", numbers % 10)):
      sizes = b"".join(n.to_bytes(4, "big") for n in (size, *array.shape[1:]))
      content = bytes([0, 0, 8, array.ndim]) + sizes + array[:size].tobytes()
      (tmp_path / f"{prefix}-{stem}-ubyte").write_bytes(content)
  flags = [f"--source={tmp_path}", f"--data_dir={tmp_path / 'tfds'}"]
  done = run_program(
    ["experiments.prepare_data", "--dataset=fashion_mnist", *flags], status=0
  )
  assert done.stdout.startswith("Prepared fashion_mnist with 30 train and 20 test")
  dataset = data.load(
    "fashion_mnist", data_dir=str(tmp_path / "tfds"), cache_dir=str(tmp_path)
  )
  for split, size in ((dataset.train, 30), (dataset.test, 20)):
    found = split.images[:, 0, 0, 0]
    assert sorted(found.tolist()) == list(range(size))
    np.testing.assert_array_equal(split.labels, found % 10)
