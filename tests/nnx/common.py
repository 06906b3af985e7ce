"""NNX modules and their Linen twins, run on the same variables."""

import chex
import jax
import numpy as np
from flax import nnx

from skipinit_jax.nnx import from_linen, to_linen
from tests.models.common import random_variables


def check_same(make, twin, x, **arguments):
  """Checks output, gradients and statistics of a module, on random variables.

  Args:
    make: function of random streams that makes the NNX module.
    twin: the Linen module.
    arguments: those that only Linen has.
  """
  variables = random_variables(twin, x, **arguments)
  # Without values: nothing is compiled to initialize it.
  model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
  from_linen(model, variables)
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  stats = {name: tree for name, tree in variables.items() if name != "params"}

  def native(params, x):
    parts = jax.tree.map(lambda leaf: leaf, (params, rest))
    model = nnx.merge(graphdef, *parts)
    return model(x), to_linen(model).get("batch_stats", {})

  def linen(params, x):
    y, updates = twin.apply(
      {"params": params, **stats}, x, mutable=[*stats], **arguments
    )
    return y, updates.get("batch_stats", {})

  def run(function, params):
    y, vjp, updates = jax.vjp(function, params, x, has_aux=True)
    return y, updates, *vjp(np.cos(np.arange(y.size, dtype=y.dtype)).reshape(y.shape))

  y, updates, gradient, of_x = run(native, params)
  actual = y, updates, to_linen(gradient).get("params", {}), of_x
  expected = run(linen, variables.get("params", {}))
  chex.assert_trees_all_close(actual, expected, rtol=2e-4, atol=2e-5)
