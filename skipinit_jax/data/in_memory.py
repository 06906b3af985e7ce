"""Batches of a data set that lives on the device as uint8.

A training batch is a function of the seed's key, the epoch and the batch's index in the
epoch alone, so a resumed run sees the same batches. Everything but `put` and
`eval_batches` may be traced, so that a whole epoch can run in one dispatch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from skipinit_jax.data.datasets import Split
from skipinit_jax.errors import UsageError

__all__ = [
  "DeviceSplit",
  "EvalBatches",
  "epoch_permutation",
  "eval_batches",
  "put",
  "steps_per_epoch",
  "train_batch",
]


class DeviceSplit(NamedTuple):
  """Examples on the device.

  Attributes:
    images: uint8 [num_examples, height, width, channels].
    labels: int32 [num_examples].
  """

  images: jax.Array
  labels: jax.Array


class EvalBatches(NamedTuple):
  """A split cut into equal batches, the last one filled up.

  Attributes:
    images: uint8 [num_batches, batch, height, width, channels].
    labels: int32 [num_batches, batch].
    mask: bool [num_batches, batch], false where an example only fills up.
  """

  images: jax.Array
  labels: jax.Array
  mask: jax.Array


def put(split: Split, sharding: jax.sharding.Sharding) -> DeviceSplit:
  """Places a split on devices, of other processes too.

  Args:
    split: the same on every process.
    sharding: replicated on the mesh, so that any device can gather its part of any
      batch.
  """
  return DeviceSplit(_place(split.images, sharding), _place(split.labels, sharding))


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
  """Returns the number of whole batches in an epoch; the rest is left out.

  Raises:
    UsageError: the batch size is below 1 or above the number of examples.
  """
  if not 1 <= batch_size <= num_examples:
    raise UsageError(
      f"Batch size {batch_size} is not between 1 and {num_examples}, the number of "
      "training examples."
    )
  return num_examples // batch_size


def epoch_permutation(
  key: jax.Array, epoch: jax.typing.ArrayLike, num_examples: int
) -> jax.Array:
  """Returns the order in which an epoch visits the examples.

  Args:
    key: the PRNG key of the whole run's shuffling.
    epoch: from 0; may be traced.

  Returns:
    A permutation of the examples' indices: int32 [num_examples].
  """
  order = jnp.arange(num_examples, dtype=jnp.int32)
  return jax.random.permutation(jax.random.fold_in(key, epoch), order)


def train_batch(
  split: DeviceSplit,
  permutation: jax.Array,
  index: jax.typing.ArrayLike,
  batch_size: int,
) -> tuple[jax.Array, jax.Array]:
  """Gathers one batch of an epoch.

  Args:
    index: number of the batch in the epoch, below `steps_per_epoch`; may be traced.

  Returns:
    Images, uint8 [batch_size, height, width, channels], and their labels, int32
    [batch_size].
  """
  rows = jax.lax.dynamic_slice_in_dim(permutation, index * batch_size, batch_size)
  images = split.images.at[rows].get(mode="promise_in_bounds")
  labels = split.labels.at[rows].get(mode="promise_in_bounds")
  return images, labels


def eval_batches(
  split: Split, batch_size: int, sharding: jax.sharding.Sharding
) -> EvalBatches:
  """Cuts a split, in order, into equal batches to be scanned over on the device.

  The last batch is filled up with blank examples, so that a sum weighted by
  `mask` counts every example exactly once.

  Args:
    split: the same on every process.
    batch_size: number of examples in a batch; need not divide the split.
    sharding: has axis 1, the batch, over the mesh's `data` axis.

  Raises:
    UsageError: the batch size is below 1.
  """
  if batch_size < 1:
    raise UsageError(f"Evaluation batch size {batch_size} is not at least 1.")
  num_batches = -(-split.num_examples // batch_size)
  blank = num_batches * batch_size - split.num_examples

  def cut(examples: np.ndarray) -> jax.Array:
    filled = np.pad(examples, [(0, blank)] + [(0, 0)] * (examples.ndim - 1))
    return _place(
      filled.reshape(num_batches, batch_size, *examples.shape[1:]), sharding
    )

  mask = np.ones(split.num_examples, np.bool_)
  return EvalBatches(cut(split.images), cut(split.labels), cut(mask))


def _place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
  # Unlike `device_put`, this does not send the array to the other processes to
  # compare it with theirs.
  return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
