"""The programs of a run: compiled once, and fed with its data."""

import concurrent.futures
import functools
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from skipinit_jax import data
from skipinit_jax.analysis import Signal
from skipinit_jax.data import augmentation, in_memory
from skipinit_jax.training.batches import make_batch_source
from skipinit_jax.training.config import TrainConfig
from skipinit_jax.training.optimizer import (
  OptimizerFactory,
  make_optimizer,
  make_schedule,
)
from skipinit_jax.training.signal_log import make_measure_signal
from skipinit_jax.training.state import TrainState, make_init
from skipinit_jax.training.step import (
  EvalMetrics,
  make_evaluate,
  make_train_step,
  make_train_steps,
)


class Trainer:
  """Trains and evaluates one network on a mesh.

  Example::

    with Trainer(config, dataset, model, make_mesh()) as trainer:
      state, is_finite = trainer.train_steps(trainer.initial_state, 10)
      print(trainer.evaluate(state))

  Attributes:
    initial_state: the initialized state.
    steps_per_epoch: optimizer steps of an epoch.
  """

  def __init__(
    self,
    config: TrainConfig,
    dataset: data.Dataset | data.StreamedDataset,
    model: nn.Module,
    mesh: Mesh,
    weights: Mapping[str, Any] | None = None,
    optimizer: OptimizerFactory | None = None,
  ) -> None:
    """Compiles the programs of a configuration, and initializes the state meanwhile.

    Args:
      weights: variables to begin with in place of their initial values, as
        `weights.load_weights` reads them.
      optimizer: in place of the configuration's: see `make_optimizer`.

    Raises:
      UsageError: the data set has fewer examples than a batch.
    """
    self.steps_per_epoch = in_memory.steps_per_epoch(
      dataset.train.num_examples, config.batch_size
    )
    self._peak_rate = config.learning_rate
    self._schedule = make_schedule(config, self.steps_per_epoch)
    make = functools.partial(
      make_optimizer, config, self.steps_per_epoch, optimizer=optimizer
    )
    init, sharding = make_init(
      model,
      make,
      dataset.image_shape,
      mesh=mesh,
      shard_params=config.shard_params,
    )
    seed, rate = np.uint32(config.seed), np.float32(config.learning_rate)
    layout: dict[str, Any] = {"mesh": mesh, "sharding": sharding}
    parts = config.accumulation_steps
    with jax.transfer_guard_host_to_device("allow"):
      self._source = make_batch_source(config, dataset, mesh)
    batches = self._source.batches
    train_steps = make_train_steps(
      make_train_step(
        model,
        make(),
        **layout,
        accumulation_steps=parts,
        label_smoothing=config.label_smoothing,
        mixup=config.mixup,
      ),
      batches,
      **layout,
      steps_per_epoch=self.steps_per_epoch,
    )
    measure = make_measure_signal(model, batches, **layout, accumulation_steps=parts)
    self._evaluate = make_evaluate(
      model,
      lambda images: augmentation.normalize(images, dataset.mean, dataset.std),
      **layout,
    )
    # The programs of a deep network take seconds to compile, each on one core.
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as beside:
      arguments = jax.eval_shape(init, seed, rate), self._source.data_shapes()
      compiled_steps = _compile(beside, train_steps, *arguments, 1)
      if config.signal_every_steps:
        compiled_measure = _compile(beside, measure, *arguments)
      with jax.transfer_guard_host_to_device("allow"):
        self.initial_state: TrainState = init(seed, rate, weights)
    self._train_steps = compiled_steps()
    self._measure = compiled_measure() if config.signal_every_steps else measure

  def train_steps(
    self, state: TrainState, num_steps: int
  ) -> tuple[TrainState, jax.Array]:
    """Takes steps of one epoch, up to the first after which the state is not finite.

    Args:
      state: the state, which is donated.
      num_steps: how many; they must not pass the end of the epoch.

    Returns:
      The next state, and whether it is finite.
    """
    # Dispatches are not waited for: the devices work while the next batch is read.
    for batch_data, count in self._source.dispatches(int(state.step), num_steps):
      with jax.transfer_guard_host_to_device("allow"):
        state, is_finite = self._train_steps(state, batch_data, count)
    return state, is_finite

  def evaluate(self, state: TrainState) -> dict[str, float]:
    """Returns loss, accuracy and top-5 accuracy on the whole test set.

    Where the state has a moving average of the parameters, its own follow, as
    "ema_loss" and the like.
    """
    states = {"": state} | ({"ema_": ema} if (ema := state.averaged()) else {})
    parts: list[dict[str, EvalMetrics]] = [
      {prefix: self._evaluate(each, part) for prefix, each in states.items()}
      for part in self._source.eval_batches()
    ]
    totals = functools.reduce(functools.partial(jax.tree.map, jnp.add), parts)
    return {
      prefix + name: mean
      for prefix, total in totals.items()
      for name, mean in total.means().items()
    }

  def learning_rate(self, step: int) -> float:
    """Returns the rate of a step."""
    return self._peak_rate * float(self._schedule(step))

  def measure_signal(self, state: TrainState) -> Signal:
    """Measures the signal on the batch of a state's next step."""
    ((batch_data, _),) = self._source.dispatches(int(state.step), 1)
    signal: Signal = self._measure(state, batch_data)
    return signal

  def close(self) -> None:
    """Ends what feeds the programs."""
    self._source.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


def _compile(
  beside: concurrent.futures.Executor, function: jax.stages.Wrapped, *arguments: Any
) -> Callable[[], Callable[..., Any]]:
  """Compiles a function for its arguments, unless JAX is told to compile nothing.

  Returns:
    A function that waits for the compiled one.
  """
  # Both are for this thread: JAX's context managers, in which a caller may be, hold for
  # theirs alone.
  if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
    return lambda: function
  return beside.submit(function.lower(*arguments).compile).result
