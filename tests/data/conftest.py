"""Small IDX files and meshes for the tests of this folder."""

import gzip
import types

import jax
import numpy as np
import pytest

SIZES = {"train": 60, "t10k": 23}


def encode(array):
  """Returns an array of bytes in the IDX format."""
  sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
  return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def replace(folder, stem, content, *, zipped=True):
  """Writes one file, such as that of stem train-images-idx3."""
  path = folder / f"{stem}-ubyte{'.gz' if zipped else ''}"
  path.write_bytes(gzip.compress(content) if zipped else content)


def write(folder, *, zipped=True, seed=0):
  """Writes a random Fashion-MNIST of `SIZES` and returns its arrays by prefix."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  arrays = {}
  for prefix, size in SIZES.items():
    images = rng.integers(0, 256, (size, 28, 28), np.uint8)
    labels = rng.integers(0, 10, size, np.uint8)
    arrays[prefix] = images, labels
    replace(folder, f"{prefix}-images-idx3", encode(images), zipped=zipped)
    replace(folder, f"{prefix}-labels-idx1", encode(labels), zipped=zipped)
  return arrays


@pytest.fixture(scope="session")
def idx_files():
  """The functions above."""
  return types.SimpleNamespace(encode=encode, replace=replace, write=write)


@pytest.fixture(scope="session")
def make_mesh():
  """Makes a mesh of the first `num_devices` devices, with the axis `data`."""

  def make(num_devices):
    return jax.make_mesh(
      (num_devices,),
      ("data",),
      axis_types=(jax.sharding.AxisType.Auto,),
      devices=jax.devices()[:num_devices],
    )

  return make
