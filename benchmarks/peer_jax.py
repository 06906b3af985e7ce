"""Steps of this package, as its programs take them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import peer
from skipinit_jax.training import (
  TrainConfig,
  batch_sharding,
  make_init,
  make_mesh,
  make_optimizer,
  make_train_step,
)
from skipinit_jax.training.compilation import compiler_options

_NUM_CLASSES = 10


def make_train(
  *,
  depth: int,
  width: int,
  image_size: int,
  batch_size: int,
  method: str,
  remat: bool,
  shapes: bool = False,
) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
  """Returns the train step of a case, and what to call it with.

  Args:
    depth: as in `side_by_side.Case`, like the following.
    width: as there.
    image_size: as there.
    batch_size: as there.
    method: as there.
    remat: as there.
    shapes: whether to return shapes in place of arrays, to compile for.

  Returns:
    A function of state and batch that returns the next state, and these.
  """
  config = TrainConfig(
    depth=depth,
    width=width,
    method=method,
    batch_size=batch_size,
    remat=remat,
    learning_rate=1e-3,
  )
  mesh = make_mesh()
  model = config.make_model(_NUM_CLASSES)
  optimizer = functools.partial(make_optimizer, config, 1000)
  shape = (image_size, image_size, 3)
  init, state_sharding = make_init(model, optimizer, shape, mesh=mesh)
  start = np.uint32(0), np.float32(config.learning_rate)
  train_step = jax.jit(
    make_train_step(model, optimizer(), mesh=mesh, sharding=state_sharding),
    donate_argnums=0,
    out_shardings=state_sharding,
    compiler_options=compiler_options(),
  )
  sharding = batch_sharding(mesh)
  if shapes:
    images = jax.ShapeDtypeStruct((batch_size, *shape), np.float32, sharding=sharding)
    labels = jax.ShapeDtypeStruct((batch_size,), np.int32, sharding=sharding)
    return train_step, (jax.eval_shape(init, *start), images, labels)
  rng = np.random.default_rng(0)
  batch = jax.device_put(
    (
      rng.normal(size=(batch_size, *shape)).astype(np.float32),
      rng.integers(_NUM_CLASSES, size=batch_size, dtype=np.int32),
    ),
    sharding,
  )
  return train_step, (init(*start), *batch)


def make_step(**case: Any) -> Callable[[], None]:
  """Returns a function that takes one step of a case."""
  train_step, (state, *batch) = make_train(**case)

  def step() -> None:
    nonlocal state
    state = train_step(state, *batch)
    jax.block_until_ready(state)

  return step


if __name__ == "__main__":
  peer.serve(make_step)
