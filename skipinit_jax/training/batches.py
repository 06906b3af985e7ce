"""The batches of a run: of a data set on the devices, or streamed from the host."""

import abc
import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from skipinit_jax import data
from skipinit_jax.data import augmentation, in_memory, streaming
from skipinit_jax.fields import call
from skipinit_jax.training.config import TrainConfig
from skipinit_jax.training.mesh import batch_sharding, replicated
from skipinit_jax.training.state import TrainState
from skipinit_jax.training.step import Batch

_EVAL_BATCH_SIZE = 512


class BatchSource(abc.ABC):
  """Where the batches of a run come from.

  A dispatch to the devices is given data. Within it, `batches` makes the batches of
  its steps from that.
  """

  @abc.abstractmethod
  def dispatches(self, step: int, num_steps: int) -> Iterator[tuple[Any, int]]:
    """Yields the data and the number of steps of each dispatch.

    Args:
      num_steps: number of steps in all; they are in one epoch.
    """

  @abc.abstractmethod
  def batches(self, state: TrainState, data: Any) -> Callable[[jax.Array], Batch]:
    """Returns a function of a step that gives its batch; see `step.Batches`."""

  @abc.abstractmethod
  def data_shapes(self) -> Any:
    """Returns the data of a dispatch, or what has its shapes and shardings."""

  @abc.abstractmethod
  def eval_batches(self) -> Iterator[in_memory.EvalBatches]:
    """Yields the test set, in one or more parts."""

  @abc.abstractmethod
  def close(self) -> None:
    """Ends what makes the batches."""


def make_batch_source(
  config: TrainConfig, dataset: data.Dataset | data.StreamedDataset, mesh: Mesh
) -> BatchSource:
  """Returns the source of a run's batches."""
  if isinstance(dataset, data.StreamedDataset):
    return _Streamed(config, dataset, mesh)
  return _InMemory(config, dataset, mesh)


class _InMemory(BatchSource):
  """A data set that lies on the devices: a dispatch takes any number of steps."""

  def __init__(self, config: TrainConfig, dataset: data.Dataset, mesh: Mesh):
    self._config = config
    self._dataset = dataset
    self._mesh = mesh
    self._train = in_memory.put(dataset.train, replicated(mesh))
    self._test = in_memory.eval_batches(
      dataset.test, _eval_batch_size(dataset, mesh), batch_sharding(mesh, axis=1)
    )

  def dispatches(self, step: int, num_steps: int) -> Iterator[tuple[Any, int]]:
    yield self._train, num_steps

  def batches(
    self, state: TrainState, data: in_memory.DeviceSplit
  ) -> Callable[[jax.Array], Batch]:
    num_examples, batch_size = len(data.labels), self._config.batch_size
    steps_per_epoch = in_memory.steps_per_epoch(num_examples, batch_size)
    keys = state.random_keys()
    permutation = in_memory.epoch_permutation(
      keys.order, state.step // steps_per_epoch, num_examples
    )

    def batch_of(step: jax.Array) -> Batch:
      images, labels = jax.lax.with_sharding_constraint(
        in_memory.train_batch(data, permutation, step % steps_per_epoch, batch_size),
        batch_sharding(self._mesh),
      )
      key = jax.random.fold_in(keys.augment, step)
      images = call(augmentation.augment, self._config, key, images)
      images = augmentation.normalize(images, self._dataset.mean, self._dataset.std)
      return images, labels

    return batch_of

  def data_shapes(self) -> in_memory.DeviceSplit:
    return self._train

  def eval_batches(self) -> Iterator[in_memory.EvalBatches]:
    yield self._test

  def close(self) -> None:
    """Does nothing: arrays end by themselves."""


class _Streamed(BatchSource):
  """Batches that worker processes of this host decode and augment: one a dispatch."""

  def __init__(self, config: TrainConfig, dataset: data.StreamedDataset, mesh: Mesh):
    self._config = config
    self._dataset = dataset
    self._mesh = mesh
    processes = sorted({device.process_index for device in mesh.devices.flat})
    self._reading: dict[str, int] = {
      "process_index": processes.index(jax.process_index()),
      "process_count": len(processes),
      "num_workers": call(streaming.num_workers, config),
    }
    self._stream: Generator[Any, None, None] | None = None
    # The batch that was read last, and the step that it is for.
    self._batch: Batch | None = None
    self._batch_step = 0

  def dispatches(self, step: int, num_steps: int) -> Iterator[tuple[Any, int]]:
    for each in range(step, step + num_steps):
      yield self._read(each), 1

  def _read(self, step: int) -> Batch:
    """Returns the batch of a step: the one that was read last, or a later one."""
    if self._stream is None:
      self._stream = streaming.train_batches(
        self._dataset,
        batch_size=self._config.batch_size,
        seed=self._config.seed,
        first_step=step,
        **self._reading,
      )
      self._batch_step = step - 1
    while self._batch is None or self._batch_step < step:
      images, labels = next(self._stream)
      self._batch = self._place(images), self._place(labels)
      self._batch_step += 1
    return self._batch

  def _place(self, rows: np.ndarray, axis: int = 0) -> jax.Array:
    """Makes a global array of this process's rows."""
    sharding = batch_sharding(self._mesh, axis)
    return jax.make_array_from_process_local_data(sharding, rows)

  def batches(self, state: TrainState, data: Batch) -> Callable[[jax.Array], Batch]:
    images, labels = data
    images = augmentation.normalize(images, self._dataset.mean, self._dataset.std)
    return lambda step: (images, labels)

  def data_shapes(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    size, sharding = self._config.batch_size, batch_sharding(self._mesh)
    shape = (size, *self._dataset.image_shape)
    images = jax.ShapeDtypeStruct(shape, np.uint8, sharding=sharding)
    return images, jax.ShapeDtypeStruct((size,), np.int32, sharding=sharding)

  def eval_batches(self) -> Iterator[in_memory.EvalBatches]:
    batch_size = _eval_batch_size(self._dataset, self._mesh)
    with contextlib.closing(
      streaming.eval_batches(self._dataset, batch_size=batch_size, **self._reading)
    ) as batches:
      for batch in batches:
        yield in_memory.EvalBatches(*(self._place(part[None], 1) for part in batch))

  def close(self) -> None:
    """Ends the worker processes."""
    if self._stream is not None:
      self._stream.close()


def _eval_batch_size(dataset: data.Dataset | data.StreamedDataset, mesh: Mesh) -> int:
  """Returns the batch size of evaluation, which the devices divide."""
  size = min(dataset.test.num_examples, _EVAL_BATCH_SIZE)
  return -(-size // mesh.size) * mesh.size
