"""The curvature of a loss, which bounds the stable rates of gradient descent."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.flatten_util import ravel_pytree

from skipinit_jax.analysis.signal import in_training
from skipinit_jax.errors import UsageError, require_positive


@dataclasses.dataclass(frozen=True)
class Sharpness:
  """The largest curvature of a loss over the parameters.

  Attributes:
    eigenvalue: lambda, the Hessian's largest eigenvalue. It is the largest, not the
      largest in size: it is negative only where the loss curves downward everywhere.
    error: how far from it the nearest eigenvalue may be.
  """

  eigenvalue: float
  error: float

  @property
  def largest_rate(self) -> float:
    """The rate 2 / lambda, above which plain gradient descent on this loss diverges.

    Infinity where no direction curves upward. Momentum m allows 1 + m times as much.
    """
    return 2 / self.eigenvalue if self.eigenvalue > 0 else float("inf")


def sharpness(
  model: nn.Module,
  variables: Mapping[str, Any],
  batch: jax.Array,
  loss: Callable[[Any], jax.Array],
  *,
  tolerance: float = 1e-3,
  max_products: int = 200,
  key: jax.Array | None = None,
  **arguments: Any,
) -> Sharpness:
  """Measures the largest eigenvalue of a loss's Hessian by the parameters.

  Gradient descent is stable along an eigenvector as long as its rate is below
  2 / lambda. Lanczos's iteration (Golub & Van Loan, Matrix Computations, section 10.1)
  takes only products of the Hessian with vectors, each the price of a few gradients and
  the memory of one.

  Args:
    model: the network, called as `model.apply(variables, batch, **arguments)`.
    variables: its variables. Updates of those that are not parameters are dropped.
    batch: inputs, [N, ...].
    loss: scalar function of the network's output.
    tolerance: the error at which to stop, over the eigenvalue.
    max_products: the number of products after which to stop with whatever error.
    key: for the start and the model's own random numbers; None: `jax.random.key(0)`.
    **arguments: the model's other arguments. A model's argument `train` is True unless
      given.

  Raises:
    UsageError: the curvature is not finite, or `max_products` is below 1.
  """
  require_positive(max_products=max_products)
  model, arguments = in_training(model, arguments)
  model_key, start_key = jax.random.split(jax.random.key(0) if key is None else key)
  others = {name: value for name, value in variables.items() if name != "params"}
  # Sums over all parameters need more than bfloat16's 8 bits.
  wide = jax.tree.map(
    lambda leaf: jnp.asarray(leaf, jnp.promote_types(leaf.dtype, jnp.float32)),
    variables["params"],
  )
  params, unravel = ravel_pytree(wide)

  @jax.jit
  def step(
    params: jax.Array,
    others: Mapping[str, Any],
    batch: jax.Array,
    vectors: tuple[jax.Array, jax.Array],
    off_diagonal: jax.Array,
  ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    def loss_of(params: jax.Array) -> jax.Array:
      outputs, _ = model.apply(
        {"params": unravel(params), **others},
        batch,
        rngs=model_key,
        mutable=list(others),
        **arguments,
      )
      return loss(outputs)

    previous, vector = vectors
    _, product = jax.jvp(jax.grad(loss_of), (params,), (vector,))
    diagonal = product @ vector
    rest = product - diagonal * vector - off_diagonal * previous
    norm = jnp.linalg.norm(rest)
    return diagonal, norm, (vector, rest / jnp.where(norm > 0, norm, 1))

  start = jax.random.normal(start_key, params.shape, params.dtype)
  vectors = jnp.zeros_like(start), start / jnp.linalg.norm(start)
  diagonals: list[float] = []
  norms = [0.0]
  for _ in range(min(max_products, params.size)):
    # Rounding makes copies of eigenvalues, which do not harm the largest one.
    off_diagonal = np.asarray(norms[-1], params.dtype)
    diagonal, norm, vectors = step(params, others, batch, vectors, off_diagonal)
    diagonals.append(float(diagonal))
    norms.append(float(norm))
    if not np.isfinite((diagonals[-1], norms[-1])).all():
      raise UsageError("The curvature of the loss is not finite at these variables.")
    inner = norms[1:-1]
    values, eigenvectors = np.linalg.eigh(
      np.diag(diagonals) + np.diag(inner, 1) + np.diag(inner, -1)
    )
    result = Sharpness(float(values[-1]), float(norms[-1] * abs(eigenvectors[-1, -1])))
    if result.error <= tolerance * abs(result.eigenvalue):
      break
  return result
