"""The Hessian's largest eigenvalue, against dense Hessians and gradient descent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.flatten_util import ravel_pytree

from skipinit_jax import methods
from skipinit_jax.analysis import sharpness
from skipinit_jax.errors import UsageError
from skipinit_jax.models import ResidualMLP

INPUTS = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)


@pytest.mark.parametrize("name", ["batch_norm", "skipinit_one"])
def test_dense_hessian(name):
  model = ResidualMLP(2, 4, 3, methods.get(name), layers_per_block=2)
  variables = model.init(jax.random.key(0), INPUTS, train=True)
  loss = lambda logits: jnp.mean(jnp.sin(logits) ** 2)  # noqa: E731
  params, unravel = ravel_pytree(variables["params"])

  @jax.jit
  def hessian(params):
    def loss_of(params):
      changed = variables | {"params": unravel(params)}
      return loss(model.apply(changed, INPUTS, train=True, mutable=["batch_stats"])[0])

    return jax.hessian(loss_of)(params)

  eigenvalues = np.linalg.eigvalsh(hessian(params))
  result = sharpness(model, variables, INPUTS, loss, tolerance=1e-4)
  np.testing.assert_allclose(result.eigenvalue, eigenvalues[-1], rtol=1e-3)
  if name == "skipinit_one":
    # The largest one in size is another.
    assert -eigenvalues[0] > 2 * eigenvalues[-1]
  assert result.largest_rate == 2 / result.eigenvalue
  coarse = sharpness(model, variables, INPUTS, loss, max_products=3)
  nearest = np.abs(eigenvalues - coarse.eigenvalue).min()
  assert nearest <= coarse.error * 1.001
  assert result.error < coarse.error


def test_descent_diverges_above_the_largest_rate():
  model = nn.Dense(1, use_bias=False)
  variables = {"params": {"kernel": np.ones((5, 1), np.float32)}}
  run = functools.partial(sharpness, model, variables, INPUTS)
  result = run(lambda outputs: jnp.mean(outputs**2))
  # The Hessian of a mean of squares is 2 X^T X / N.
  covariance = 2 * INPUTS.T @ INPUTS / len(INPUTS)
  for factor, shrinks in ((0.98, True), (1.02, False)):
    x = np.linalg.eigh(covariance)[1][:, -1]
    step = x - factor * result.largest_rate * covariance @ x
    assert (np.linalg.norm(step) < 1) == shrinks
  # Nothing curves upward.
  assert run(lambda outputs: -jnp.mean(outputs**2)).eigenvalue < 0
  assert run(jnp.sum).largest_rate == np.inf
  with pytest.raises(UsageError, match="not finite"):
    run(lambda outputs: jnp.log(jnp.sum(outputs) * 0))
  with pytest.raises(UsageError, match="max_products is 0"):
    run(jnp.sum, max_products=0)
