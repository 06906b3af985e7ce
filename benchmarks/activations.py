"""The memory of a compiled step's activations."""

import dataclasses
import time
from typing import Any, NamedTuple

from benchmarks import peer_jax
from benchmarks.side_by_side import Case


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
  """Compiles this package's step of a case, and that of twice its batch."""
  seconds, sizes = [], []
  for batch_size in (case.batch_size, 2 * case.batch_size):
    twice = dataclasses.replace(case, batch_size=batch_size)
    step, arguments = peer_jax.make_train(**dataclasses.asdict(twice), shapes=True)
    lowered = step.lower(*arguments)
    begin = time.perf_counter()
    compiled = lowered.compile()
    seconds.append(time.perf_counter() - begin)
    # JAX's types allow that a backend has no analysis.
    memory: Any = compiled.memory_analysis()
    sizes.append(memory.temp_size_in_bytes)
  return CompiledStep(seconds[0], float(f"{(sizes[1] - sizes[0]) / 1e6:.3g}"))
