"""How training compiles its programs."""

import jax


def compiler_options() -> dict[str, int] | None:
  """Returns XLA's options for the default backend, for `jax.jit`.

  On the CPU, XLA's lowest level of optimization by LLVM but none: it compiles the
  programs of this package in two thirds of the time (a quarter, for initialization),
  and they run as fast, because their time goes into convolutions and matrix products
  that LLVM has no part in.
  """
  on_cpu = jax.default_backend() == "cpu"
  return {"xla_backend_optimization_level": 1} if on_cpu else None
