"""Steps of this package, as its programs take them."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn

from benchmarks import compiled_step
from benchmarks.peer import L2, LEARNING_RATE, MOMENTUM, Case, Step
from benchmarks.peer_flax import device_peak_bytes, take_steps
from skipinit_jax import layers, methods
from skipinit_jax.training import TrainConfig, batch_sharding, make_mesh

__all__ = [
  "BEHIND",
  "FAST_VARIANCE",
  "compile_step",
  "device_peak_bytes",
  "jitted_step",
  "make_step",
]


class _OwnScale(nn.Module):
  """SkipInit in a module that `layers.scaled` leaves behind the layer."""

  initial_value: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return layers.SkipInit(self.initial_value, name="scalar")(x)


BEHIND = dataclasses.replace(
  methods.get("skipinit"),
  name="skipinit_behind",
  title="SkipInit behind the last layer",
  branch_scale=_OwnScale,
)
FAST_VARIANCE = dataclasses.replace(
  methods.get("batch_norm"),
  name="batch_norm_fast_variance",
  title="Batch norm with Flax's fast variance",
  normalizer=functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5),
)
_OWN_METHODS = {method.name: method for method in (BEHIND, FAST_VARIANCE)}


def jitted_step(
  case: Case, devices: Sequence[Any] | None = None, *, options: bool = True
) -> Step:
  """Returns the train step of a case.

  Args:
    devices: None: all of this machine.
    options: whether a CPU compiles it with this package's options.
  """
  if case.method in _OWN_METHODS and case.method not in methods.NAMES:
    methods.register(_OWN_METHODS[case.method])
  network: dict[str, Any] = {"model": "resnet", "version": case.version}
  if case.width:
    network = {"width": case.width}
  config = TrainConfig(
    depth=case.depth,
    method=case.method,
    batch_size=case.batch_size,
    dtype=case.dtype,
    scan=case.scan,
    remat=case.remat,
    learning_rate=LEARNING_RATE,
    momentum=MOMENTUM,
    l2=L2,
    **network,
  )
  return compiled_step.make_step(
    config,
    case.batch_shape[1:],
    case.num_classes,
    devices or jax.devices(),
    options=options,
  )


def compile_step(case: Case) -> tuple[float, float]:
  """Compiles the step of a case, and that of twice its batch.

  Returns:
    How many seconds it compiled, without tracing, and the megabytes of its
    activations: what its memory grows by from one batch to twice the batch. Parameters,
    gradients and momentum do not depend on the batch.
  """
  seconds, sizes = [], []
  for batch_size in (case.batch_size, 2 * case.batch_size):
    step = jitted_step(dataclasses.replace(case, batch_size=batch_size))
    lowered = step.apply.lower(*step.shapes)
    begin = time.perf_counter()
    # JAX's types allow that a backend has no analysis.
    compiled: Any = lowered.compile()
    seconds.append(time.perf_counter() - begin)
    sizes.append(compiled.memory_analysis().temp_size_in_bytes)
  return seconds[0], (sizes[1] - sizes[0]) / 1e6


def make_step(case: Case, *, options: bool = True) -> Callable[[], None]:
  """Returns a function that takes one step of a case; see `jitted_step`."""
  batch = jax.device_put(case.batch(), batch_sharding(make_mesh()))
  return take_steps(jitted_step(case, options=options), *batch)
