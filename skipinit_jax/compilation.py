"""How programs of these networks are compiled fast, and to be fast, on a CPU.

Training does so by itself. In a step of one's own::

  step = jax.jit(step, compiler_options=compilation.compiler_options())
"""

import functools

import jax

__all__ = [
  "compiler_options",
]


def compiler_options() -> dict[str, int | str] | None:
  """Returns XLA's options for the default backend, for `jax.jit`.

  On the CPU, as far as this jaxlib knows them:

  - XLA's lowest level of optimization by LLVM but none: it compiles the programs of
    this package in two thirds of the time (a quarter, for initialization), and they run
    as fast, because their time goes into convolutions and matrix products that LLVM has
    no part in.
  - YNNPACK, XLA's default library, sums and multiplies matrices, but leaves
    convolutions to Eigen, whose are faster.
  """
  if jax.default_backend() != "cpu":
    return None
  wanted: dict[str, int | str] = {
    "xla_backend_optimization_level": 1,
    "xla_cpu_experimental_ynn_fusion_type": (
      "LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
    ),
  }
  return {name: value for name, value in wanted.items() if _is_known(name, value)}


@functools.cache
def _is_known(name: str, value: int | str) -> bool:
  """Tells whether jaxlib, asked with an empty program, takes an option."""
  try:
    jax.jit(lambda: None, compiler_options={name: value}).lower().compile()
  except jax.errors.JaxRuntimeError:
    return False
  return True
