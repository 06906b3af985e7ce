"""NNX modules and their Linen twins, run on the same variables."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from skipinit_jax.nnx import from_linen, to_linen


def _random_variables(twin, *args, **arguments):
  """Variables of a Linen module, none at a value that would hide its place."""
  generator = np.random.default_rng(0)

  def draw(path, leaf):
    values = generator.normal(0.1, 0.2, leaf.shape).astype(np.float32)
    return abs(values) if path[-1].key == "var" else values

  init = functools.partial(twin.init, **arguments)
  return jax.tree.map_with_path(draw, jax.eval_shape(init, jax.random.key(0), *args))


def _both(make, twin, variables, x, **arguments):
  """Returns output, gradients and statistics of an NNX module, and of its twin.

  Args:
    make: function of random streams that makes the module.
    twin: the Linen module.
    arguments: those that only Linen has.
  """
  # Without values: nothing is compiled to initialize it.
  model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
  from_linen(model, variables)
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  stats = {name: tree for name, tree in variables.items() if name != "params"}

  def native(params, x):
    model = nnx.merge(graphdef, params, rest, copy=True)
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
  gradient = to_linen(gradient).get("params", {})
  return (y, updates, gradient, of_x), run(linen, variables.get("params", {}))


@pytest.fixture(scope="session")
def both():
  return _both


@pytest.fixture(scope="session")
def same(both):
  """Checks that a module and its twin are equal, on random variables."""

  def check(make, twin, x, **arguments):
    variables = _random_variables(twin, x, **arguments)
    results = both(make, twin, variables, x, **arguments)
    jax.tree.map(lambda *each: np.testing.assert_allclose(*each, 2e-4, 2e-5), *results)
    return variables

  return check
