"""What a run does on its devices: the same for data in memory and for streamed data."""

import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from skipinit_jax import data
from skipinit_jax.cores import num_cores
from skipinit_jax.data import augmentation, in_memory, streaming
from skipinit_jax.training.config import TrainConfig
from skipinit_jax.training.mesh import batch_sharding, replicated
from skipinit_jax.training.optimizer import make_optimizer
from skipinit_jax.training.schedules import make_schedule
from skipinit_jax.training.signal_log import BlockSignal, make_measure_signal
from skipinit_jax.training.state import TrainState, make_init
from skipinit_jax.training.step import (
  EvalSums,
  make_evaluate,
  make_next_batch,
  make_streamed_step,
  make_train_step,
  make_train_steps,
)

_EVAL_BATCH_SIZE = 512
# Each worker process decodes with two threads.
_CORES_PER_WORKER = 2


class Programs(NamedTuple):
  """What a run does on its devices, with its data and its first state.

  Attributes:
    state: the initialized state.
    train_steps: takes a number of steps, up to the first after which the state is not
      finite; returns the state and whether it is finite. The state is donated.
    evaluate: returns loss, accuracy and top-5 accuracy on the whole test set.
    learning_rate: returns the rate of a step.
    measure_signal: measures the signal on the batch of a state's next step.
  """

  state: TrainState
  train_steps: Callable[[TrainState, int], tuple[TrainState, jax.Array]]
  evaluate: Callable[[TrainState], dict[str, float]]
  learning_rate: Callable[[int], float]
  measure_signal: Callable[[TrainState], BlockSignal]


@contextlib.contextmanager
def make_programs(
  config: TrainConfig,
  dataset: data.Dataset | data.StreamedDataset,
  model: nn.Module,
  mesh: Mesh,
) -> Iterator[Programs]:
  """Makes the programs of a run, compiled, and ends what feeds them with the context.

  Args:
    config: the configuration.
    dataset: its data set.
    model: its network.
    mesh: the mesh.
  """
  num_examples = dataset.train.num_examples
  steps_per_epoch = in_memory.steps_per_epoch(num_examples, config.batch_size)
  optimizer = make_optimizer(config, steps_per_epoch)
  schedule = make_schedule(config, steps_per_epoch)
  # The rate would be a constant of the compiled program, which the trials of a search
  # would each compile anew.
  init = make_init(
    model,
    make_optimizer(dataclasses.replace(config, learning_rate=0.0), steps_per_epoch),
    dataset.image_shape,
    mesh=mesh,
    shard_params=config.shard_params,
  )
  seed = np.uint32(config.seed)
  shapes = init.trace(seed).out_info
  sharding = (
    jax.tree.map(lambda leaf: leaf.sharding, shapes) if config.shard_params else None
  )
  train_step = make_train_step(
    model,
    optimizer,
    mesh=mesh,
    accumulation_steps=config.accumulation_steps,
    sharding=sharding,
  )

  def preprocess(images: jax.Array) -> jax.Array:
    return augmentation.normalize(images, dataset.mean, dataset.std)

  def make_measure(next_batch: Any) -> Any:
    return make_measure_signal(
      model,
      next_batch,
      mesh=mesh,
      accumulation_steps=config.accumulation_steps,
      sharding=sharding,
    )

  evaluate = make_evaluate(model, preprocess, mesh=mesh, sharding=sharding)
  source: _InMemory | _Streamed
  if isinstance(dataset, data.StreamedDataset):
    step = make_streamed_step(
      train_step,
      preprocess,
      steps_per_epoch=steps_per_epoch,
      mesh=mesh,
      sharding=sharding,
    )
    measure = make_measure(lambda _, batch: (preprocess(batch[0]), batch[1]))
    source = _Streamed(config, dataset, mesh, step, measure, evaluate)
  else:

    def augment(key: jax.Array, images: jax.Array) -> jax.Array:
      crop_key, flip_key = jax.random.split(key)
      if config.crop_padding:
        images = augmentation.pad_and_crop(crop_key, images, config.crop_padding)
      if config.flip:
        images = augmentation.random_flip(flip_key, images)
      return preprocess(images)

    sizes = {"num_examples": num_examples, "batch_size": config.batch_size}
    steps = make_train_steps(train_step, augment, **sizes, mesh=mesh, sharding=sharding)
    measure = make_measure(make_next_batch(augment, **sizes))
    source = _InMemory(dataset, mesh, steps, measure, evaluate)
  with contextlib.closing(source):
    # The programs of a deep network take seconds to compile, each on one core.
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as beside:
      compiling = [beside.submit(source.compile_steps, shapes)]
      if config.signal_every_steps:
        compiling.append(beside.submit(source.compile_measure, shapes))
      state = _with_learning_rate(init(seed), config.learning_rate, mesh)
    for each in compiling:
      each.result()
    yield Programs(
      state=state,
      train_steps=source.train_steps,
      evaluate=source.evaluate,
      learning_rate=lambda step: config.learning_rate * float(schedule(step)),
      measure_signal=source.measure_signal,
    )


def _with_learning_rate(
  state: TrainState, learning_rate: float, mesh: Mesh
) -> TrainState:
  dtype = optax.tree.get(state.opt_state, "learning_rate").dtype
  rate = _on_all_devices(np.array(learning_rate, dtype), mesh)
  return state.replace(opt_state=optax.tree.set(state.opt_state, learning_rate=rate))


def _on_all_devices(scalar: np.ndarray, mesh: Mesh) -> jax.Array:
  # Unlike `device_put`, this asks nothing of the other processes.
  return jax.make_array_from_callback((), replicated(mesh), lambda _: scalar)


class _InMemory:
  """Training on a data set that lies on the devices, many steps in a dispatch."""

  def __init__(
    self, dataset: data.Dataset, mesh: Mesh, steps: Any, measure: Any, evaluate: Any
  ):
    self._steps = steps
    self._measure = measure
    self._evaluate = evaluate
    self._train = in_memory.put(dataset.train, replicated(mesh))
    self._test = in_memory.eval_batches(
      dataset.test,
      _eval_batch_size(dataset.test.num_examples, mesh.size),
      batch_sharding(mesh, axis=1),
    )

  def compile_steps(self, shapes: TrainState) -> None:
    self._steps = self._steps.lower(shapes, self._train, 1).compile()

  def compile_measure(self, shapes: TrainState) -> None:
    self._measure = self._measure.lower(shapes, self._train).compile()

  def train_steps(
    self, state: TrainState, num_steps: int
  ) -> tuple[TrainState, jax.Array]:
    return self._steps(state, self._train, num_steps)

  def measure_signal(self, state: TrainState) -> BlockSignal:
    return self._measure(state, self._train)

  def evaluate(self, state: TrainState) -> dict[str, float]:
    return _means(self._evaluate(state, self._test))

  def close(self) -> None:
    """Does nothing: arrays end by themselves."""


class _Streamed:
  """Training on batches that worker processes of this host decode, one a dispatch."""

  def __init__(
    self,
    config: TrainConfig,
    dataset: data.StreamedDataset,
    mesh: Mesh,
    step: Any,
    measure: Any,
    evaluate: Any,
  ):
    self._config = config
    self._dataset = dataset
    self._mesh = mesh
    self._step = step
    self._measure = measure
    self._evaluate = evaluate
    processes = sorted({device.process_index for device in mesh.devices.flat})
    workers = config.data_workers
    self._reading: dict[str, int] = {
      "process_index": processes.index(jax.process_index()),
      "process_count": len(processes),
      "num_workers": max(1, num_cores() // _CORES_PER_WORKER)
      if workers is None
      else workers,
    }
    self._finite = _on_all_devices(np.array(True), mesh)
    self._batches: Generator[Any, None, None] | None = None
    # The batch that was read last, and the step that it is for.
    self._batch: tuple[jax.Array, ...] | None = None
    self._batch_step = 0

  def compile_steps(self, shapes: TrainState) -> None:
    images, labels = self._batch_shapes()
    finite = jax.ShapeDtypeStruct((), np.bool_)
    self._step = self._step.lower(shapes, finite, images, labels).compile()

  def compile_measure(self, shapes: TrainState) -> None:
    self._measure = self._measure.lower(shapes, self._batch_shapes()).compile()

  def _batch_shapes(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    size, sharding = self._config.batch_size, batch_sharding(self._mesh)
    shape = (size, *self._dataset.image_shape)
    images = jax.ShapeDtypeStruct(shape, np.uint8, sharding=sharding)
    return images, jax.ShapeDtypeStruct((size,), np.int32, sharding=sharding)

  def _batch_of(self, step: int) -> tuple[jax.Array, ...]:
    """Returns the batch of a step: that of the call before, or a later one."""
    if self._batches is None:
      self._batches = streaming.train_batches(
        self._dataset,
        batch_size=self._config.batch_size,
        seed=self._config.seed,
        first_step=step,
        **self._reading,
      )
      self._batch_step = step - 1
    while self._batch is None or self._batch_step < step:
      self._batch = _place(next(self._batches), batch_sharding(self._mesh))
      self._batch_step += 1
    return self._batch

  def train_steps(
    self, state: TrainState, num_steps: int
  ) -> tuple[TrainState, jax.Array]:
    first, finite = int(state.step), self._finite
    # Steps are not waited for: the devices take one while the next batch is put there.
    for step in range(first, first + num_steps):
      state, finite = self._step(state, finite, *self._batch_of(step))
    return state, finite

  def measure_signal(self, state: TrainState) -> BlockSignal:
    return self._measure(state, self._batch_of(int(state.step)))

  def evaluate(self, state: TrainState) -> dict[str, float]:
    batches = streaming.eval_batches(
      self._dataset,
      batch_size=_eval_batch_size(self._dataset.test.num_examples, self._mesh.size),
      **self._reading,
    )
    total: Any = None
    with contextlib.closing(batches):
      for batch in batches:
        one = tuple(part[None] for part in batch)
        placed = in_memory.EvalBatches(*_place(one, batch_sharding(self._mesh, 1)))
        sums = self._evaluate(state, placed)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    return _means(total)

  def close(self) -> None:
    """Ends the worker processes."""
    if self._batches is not None:
      self._batches.close()


def _place(
  arrays: tuple[np.ndarray, ...], sharding: jax.sharding.Sharding
) -> tuple[jax.Array, ...]:
  """Makes global arrays of this process's rows."""
  return tuple(jax.make_array_from_process_local_data(sharding, a) for a in arrays)


def _means(sums: EvalSums) -> dict[str, float]:
  examples, loss, correct, top5_correct = map(float, jax.device_get(sums))
  return {
    "loss": loss / examples,
    "accuracy": correct / examples,
    "top5_accuracy": top5_correct / examples,
  }


def _eval_batch_size(num_examples: int, num_devices: int) -> int:
  """Returns the batch size of evaluation: it divides by the devices."""
  return -(-min(num_examples, _EVAL_BATCH_SIZE) // num_devices) * num_devices
