"""Small IDX files, for the tests of data sets."""

import gzip

import numpy as np

SIZES = {"train": 60, "t10k": 23}


def zipped(array):
  """Returns an array of bytes as a zipped file has it."""
  sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
  return gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


def write(folder, seed=0):
  """Writes a random Fashion-MNIST of `SIZES` and returns its arrays by prefix."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  arrays = {}
  for prefix, size in SIZES.items():
    images = rng.integers(0, 256, (size, 28, 28), np.uint8)
    labels = rng.integers(0, 10, size, np.uint8)
    arrays[prefix] = images, labels
    (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(zipped(images))
    (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(zipped(labels))
  return arrays
