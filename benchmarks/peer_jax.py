"""Steps of this package, as its programs take them."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import compiled_step, peer
from benchmarks.peer import Case
from skipinit_jax.training import TrainConfig

_NUM_CLASSES = 10


def jitted_step(case: Case) -> compiled_step.Step:
  """Returns the train step of a case."""
  config = TrainConfig(
    depth=case.depth,
    width=case.width,
    method=case.method,
    batch_size=case.batch_size,
    remat=case.remat,
    learning_rate=1e-3,
  )
  shape = (case.image_size, case.image_size, 3)
  return compiled_step.make_step(config, shape, _NUM_CLASSES, jax.devices())


class CompiledStep(NamedTuple):
  """A train step that was compiled and not run.

  Attributes:
    seconds: how long it compiled, without tracing.
    activation_megabytes: what its memory grows by from one batch to twice the batch.
      Parameters, gradients and momentum do not depend on the batch.
  """

  seconds: float
  activation_megabytes: float


def compile_step(case: Case) -> CompiledStep:
  """Compiles the step of a case, and that of twice its batch."""
  seconds, sizes = [], []
  for batch_size in (case.batch_size, 2 * case.batch_size):
    step = jitted_step(dataclasses.replace(case, batch_size=batch_size))
    lowered = step.apply.lower(*step.shapes)
    begin = time.perf_counter()
    # JAX's types allow that a backend has no analysis.
    compiled: Any = lowered.compile()
    seconds.append(time.perf_counter() - begin)
    sizes.append(compiled.memory_analysis().temp_size_in_bytes)
  return CompiledStep(seconds[0], float(f"{(sizes[1] - sizes[0]) / 1e6:.3g}"))


def make_step(case: Case) -> Callable[[], None]:
  """Returns a function that takes one step of a case."""
  jitted = jitted_step(case)
  rng = np.random.default_rng(0)
  shape = (case.batch_size, case.image_size, case.image_size, 3)
  batch = jax.device_put(
    (
      rng.normal(size=shape).astype(np.float32),
      rng.integers(_NUM_CLASSES, size=case.batch_size, dtype=np.int32),
    ),
    jitted.batch_sharding,
  )
  state = jitted.init()

  def step() -> None:
    nonlocal state
    state = jitted.apply(state, *batch)
    jax.block_until_ready(state)

  return step


if __name__ == "__main__":
  peer.serve(make_step)
