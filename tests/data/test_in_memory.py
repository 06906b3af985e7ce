import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from skipinit_jax.data import Split, in_memory
from skipinit_jax.errors import UsageError
from skipinit_jax.training.mesh import batch_sharding, make_mesh, replicated

MESH = make_mesh()
SINGLE_DEVICE = SingleDeviceSharding(jax.devices()[0])


def numbered_split(num_examples):
  """A split whose images spell their own index, which is also the label."""
  indices = np.arange(num_examples)
  pixels = np.stack([indices // 256, indices % 256], axis=-1).astype(np.uint8)
  images = np.broadcast_to(pixels[:, None, None, :], (num_examples, 3, 4, 2))
  return Split(np.ascontiguousarray(images), indices.astype(np.int32))


def read_index(images):
  """Returns the index that each of some numbered images spells."""
  images = np.asarray(images).astype(np.int64)
  assert (images == images[..., :1, :1, :]).all()
  return images[..., 0, 0, 0] * 256 + images[..., 0, 0, 1]


@functools.partial(jax.jit, static_argnames="batch_size")
def scan_epoch(split, key, epoch, batch_size):
  num_examples = len(split.labels)
  order = in_memory.epoch_permutation(key, epoch, num_examples)

  def step(carry, index):
    return carry, in_memory.train_batch(split, order, index, batch_size)

  steps = jnp.arange(in_memory.steps_per_epoch(num_examples, batch_size))
  return jax.lax.scan(step, None, steps)[1]


def run_epoch(split, key, epoch, batch_size):
  """Returns the examples of an epoch's batches: int32 [steps, batch]."""
  device_split = in_memory.put(split, SINGLE_DEVICE)
  images, labels = scan_epoch(device_split, key, epoch, batch_size)
  assert (images.dtype, labels.dtype) == (jnp.uint8, jnp.int32)
  np.testing.assert_array_equal(read_index(images), labels)
  return np.asarray(labels)


@pytest.mark.parametrize(("num_examples", "batch_size"), [(640, 64), (700, 64), (9, 9)])
def test_an_epoch_visits_distinct_examples(num_examples, batch_size):
  batches = run_epoch(numbered_split(num_examples), jax.random.key(0), 5, batch_size)
  assert batches.shape == (num_examples // batch_size, batch_size)
  assert len(np.unique(batches)) == batches.size
  if num_examples % batch_size == 0:
    np.testing.assert_array_equal(np.sort(batches.ravel()), np.arange(num_examples))


def test_order_depends_on_key_and_epoch_only():
  split, key = numbered_split(256), jax.random.key(7)
  first = run_epoch(split, key, 3, 32)
  np.testing.assert_array_equal(run_epoch(split, key, 3, 32), first)
  assert not np.array_equal(run_epoch(split, key, 4, 32), first)
  assert not np.array_equal(run_epoch(split, jax.random.key(8), 3, 32), first)
  # The batch size cuts the same order elsewhere.
  assert run_epoch(split, key, 3, 64).ravel().tolist() == first.ravel().tolist()


def test_batch_is_cut_over_devices():
  split = numbered_split(200)
  device_split = in_memory.put(split, replicated(MESH))
  batch = batch_sharding(MESH)

  @jax.jit
  def draw(device_split, index):
    order = in_memory.epoch_permutation(jax.random.key(1), 2, 200)
    images, labels = in_memory.train_batch(device_split, order, index, 16)
    return jax.lax.with_sharding_constraint((images, labels), batch)

  images, labels = draw(device_split, 3)
  assert images.sharding.is_equivalent_to(batch, images.ndim)
  expected = in_memory.epoch_permutation(jax.random.key(1), 2, 200)[48:64]
  np.testing.assert_array_equal(labels, expected)
  np.testing.assert_array_equal(read_index(images), expected)


def test_steps_per_epoch_counts_whole_batches():
  assert in_memory.steps_per_epoch(1471, 64) == 22
  assert in_memory.steps_per_epoch(5, 5) == 1
  for batch_size in (0, 101):
    with pytest.raises(UsageError, match=f"Batch size {batch_size} .* 1 and 100"):
      in_memory.steps_per_epoch(100, batch_size)
  with pytest.raises(UsageError, match="batch size 0"):
    in_memory.eval_batches(numbered_split(5), 0, SINGLE_DEVICE)


@pytest.mark.parametrize(
  ("batch_size", "sharding"),
  [(325, SINGLE_DEVICE), (1000, SINGLE_DEVICE), (16, batch_sharding(MESH, axis=1))],
)
def test_evaluation_counts_every_example_once(batch_size, sharding):
  batches = in_memory.eval_batches(numbered_split(325), batch_size, sharding)
  assert batches.images.sharding == batches.mask.sharding == sharding
  assert batches.labels.shape == (-(-325 // batch_size), batch_size)
  mask = np.asarray(batches.mask)
  assert read_index(batches.images)[mask].tolist() == list(range(325))
  assert np.asarray(batches.labels)[mask].tolist() == list(range(325))
