import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skipinit_jax.data import augmentation
from skipinit_jax.training.mesh import batch_sharding, make_mesh


def random_images(shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_normalize_matches_numpy():
  images = random_images((4, 5, 6, 3))
  mean, std = np.array([0.1, 0.5, 0.7]), np.array([0.3, 0.2, 1.0])
  expected = (images.astype(np.float64) / 255 - mean) / std
  result = augmentation.normalize(images, mean, std)
  assert result.dtype == jnp.float32
  np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_crop_is_a_window_of_the_padded_image(dtype):
  padding, (height, width) = 2, (5, 7)
  images = (random_images((600, height, width, 3)) | 1).astype(dtype)
  crops = np.asarray(augmentation.pad_and_crop(jax.random.key(1), images, padding))
  assert crops.dtype == dtype
  edges = ((0, 0), (padding, padding), (padding, padding), (0, 0))
  windows = np.lib.stride_tricks.sliding_window_view(
    np.pad(images, edges), (height, width), axis=(1, 2)
  )  # [batch, row, column, channels, height, width]
  windows = windows.transpose(0, 1, 2, 4, 5, 3)
  hits = (windows == crops[:, None, None]).all((3, 4, 5))
  # Every crop is exactly one window, and every offset is used about equally.
  assert (hits.sum((1, 2)) == 1).all()
  counts = hits.sum(0)
  expected = len(images) / counts.size
  assert ((counts - expected) ** 2 / expected).sum() < 52  # chi2(24), p = 0.001


def test_flip_mirrors_about_half_of_the_images():
  images = random_images((1000, 2, 3, 1))
  flipped = np.asarray(augmentation.random_flip(jax.random.key(2), images))
  mirrored = (flipped == np.flip(images, axis=2)).all((1, 2, 3))
  kept = (flipped == images).all((1, 2, 3))
  assert (mirrored | kept).all()
  assert 420 < (mirrored & ~kept).sum() < 580  # Five standard deviations.


def test_devices_compute_the_same_and_exchange_no_images():
  def augment(key, images):
    images = augmentation.augment(key, images, crop_padding=4, flip=True)
    return augmentation.normalize(images, [0.4, 0.5, 0.6], [0.2, 0.2, 0.3])

  images = random_images((16, 8, 8, 3))
  key, other = jax.random.split(jax.random.key(3))
  expected = jax.jit(augment)(key, images)
  assert not np.array_equal(jax.jit(augment)(other, images), expected)
  batch = batch_sharding(make_mesh())
  sharded = jax.device_put(images, batch)
  jitted = jax.jit(augment, in_shardings=(None, batch), out_shardings=batch)
  program = jitted.lower(key, sharded).compile()
  np.testing.assert_array_equal(program(key, sharded), expected)
  for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
    assert collective not in program.as_text()


def test_mixup_is_a_mean_with_another_image():
  images = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2, 2, 1)), "float32")
  mix = jax.jit(jax.vmap(lambda key: augmentation.mixup(key, images, 0.4)))
  mixed, others, weights = mix(jax.random.split(jax.random.key(0), 2000))
  assert (np.sort(others, axis=-1) == np.arange(6)).all()
  w = np.asarray(weights)[:, None, None, None, None]
  expected = w * images + (1 - w) * images[others]
  np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-5)
  # Beta(a, a) has mean 1/2 and variance 1 / (8 a + 4).
  assert abs(np.mean(weights) - 0.5) < 4 * (1 / 7.2 / 2000) ** 0.5
  np.testing.assert_allclose(np.var(weights), 1 / 7.2, rtol=0.1)
