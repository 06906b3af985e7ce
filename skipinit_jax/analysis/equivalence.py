"""Trainings that look different and are the same, and runs that show it.

Reparameterization. Let w_t be the iterates of gradient descent with momentum on L(w)
at rate eta. Those on L(w / c), from c w_0 at rate c^2 eta, are c w_t: the gradient is
1 / c times as large at c w as that of L at w, so an update is c^2 / c times as large.
L2 is part of L: the coefficient of its gradient at c w is l2 / c^2.

Weight decay (Li & Arora, ICLR 2020, arXiv:1910.07454). Let L(k w) = L(w) for any
k > 0, as in batch-normalized networks. With momentum gamma, a constant rate eta and
weight decay lambda,

    w_{t+1} = (1 + gamma - eta lambda) w_t - gamma w_{t-1} - eta grad L(w_t).

Without decay, at the rate eta rho^(-2t-1) in step t, with the same momentum,

    u_{t+1} = u_t + gamma rho^-2 (u_t - u_{t-1}) - eta rho^(-2t-1) grad L(u_t).

Let u_t = rho^-t w_t. The gradient of a scale-invariant function is inverse to the scale
of its argument: grad L(u_t) = rho^t grad L(w_t). Times rho^(t+1), the second equation
is

    w_{t+1} = (rho + gamma / rho) w_t - gamma w_{t-1} - eta grad L(w_t),

the first one if rho + gamma / rho = 1 + gamma - eta lambda. The first step agrees too
if the run without decay starts with the velocity -(1 - rho) / (eta rho) w_0, where the
velocity sums gradients. So both runs are the same function at every step, and the rate
grows without bound.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from skipinit_jax.errors import UsageError
from skipinit_jax.methods import bind_normalizer
from skipinit_jax.models import ResidualMLP, WideResNet
from skipinit_jax.models.head import Head

__all__ = [
  "LARGEST_VARIANCE",
  "AnyPrecision",
  "Loss",
  "Params",
  "Reparameterization",
  "Run",
  "StatefulLoss",
  "Trajectories",
  "decay_root",
  "function_difference",
  "growing_rates",
  "initial_velocity",
  "nudge",
  "observed_runs",
  "relative_distance",
  "reparameterize",
  "scale_invariant",
  "sgd",
  "trajectories",
]

Params = Any
"""A tree of parameters."""

Loss = Callable[[Params, Any], jax.Array]
"""A scalar function of parameters and a batch."""

LARGEST_VARIANCE = 2.0 ** (2 / 3 * 125)
"""The largest variance whose batch normalization has a gradient in float32.

Half of the variance's power -3/2 is a factor of it, and here 2^-126: below this
smallest normal number XLA:CPU has zero.
"""


class AnyPrecision(nn.Module):
  """A network that computes in one dtype, float64 too, from its input to its logits.

  The network would do so too. The recorded results begin with the parameters of the
  head that it has here, under other names than its own.

  Attributes:
    body: the network; its own head is left out.
  """

  body: ResidualMLP | WideResNet

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    """Maps images [N, ...] to logits [N, num_classes]."""

    def leave_out_head(
      run: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
    ) -> Any:
      is_head = isinstance(context.module, Head)
      return args[0] if is_head else run(*args, **kwargs)

    with nn.intercept_methods(leave_out_head):
      x = self.body(images, train)
    body = self.body
    dtypes: dict[str, Any] = {"dtype": body.dtype, "param_dtype": body.param_dtype}
    norm = bind_normalizer(body.method.normalizer, train=train, **dtypes)
    x = nn.relu(x if norm is None else norm(name="norm")(x))
    x = x.mean(axis=tuple(range(1, x.ndim - 1)))
    return nn.Dense(body.num_classes, **dtypes, name="classifier")(x)


def sgd(
  learning_rate: optax.ScalarOrSchedule,
  momentum: float,
  l2: jax.typing.ArrayLike = 0.0,
  velocity: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformation:
  """Returns SGD with heavy-ball momentum and L2, which is added to the gradient.

  Args:
    learning_rate: the rate, or a schedule of it.
    momentum: share of the velocity that is kept; the velocity sums gradients.
    l2: coefficient lambda of the penalty `lambda / 2 |w|^2`.
    velocity: the velocity before the first step, over the initial parameters.
  """
  trace = optax.trace(momentum)

  def init(params: Params) -> optax.TraceState:
    return optax.TraceState(trace=_scale(params, velocity))

  return optax.chain(
    optax.add_decayed_weights(l2),
    optax.GradientTransformation(init, trace.update),
    optax.scale_by_learning_rate(learning_rate),
  )


def reparameterize(loss: Loss, c: jax.typing.ArrayLike) -> Loss:
  """Returns the loss L(w / c) of a loss L(w).

  Args:
    loss: L.
    c: what all parameters are divided by.
  """

  def reparameterized(params: Params, batch: Any) -> jax.Array:
    return loss(_divide(params, c), batch)

  return reparameterized


StatefulLoss = Callable[[Params, Any, Any], tuple[jax.Array, Any]]
"""A scalar function of parameters, other variables and a batch, which also returns the
other variables' next values."""


class Run(NamedTuple):
  """What one training did.

  Attributes:
    loss: before each step, without L2, [steps].
    observed: what was observed before each step, with a leading axis over the steps.
    params: the parameters behind the last step.
  """

  loss: np.ndarray
  observed: Any
  params: Params


class Reparameterization(NamedTuple):
  """One run of gradient descent on L(w / c).

  Attributes:
    params: w_0; the run starts at c w_0.
    c: the constant.
    learning_rate: its own rate, c^2 eta to equal a run of L(w) at eta.
  """

  params: Params
  c: float
  learning_rate: float


class Trajectories(NamedTuple):
  """What runs beside each other do, step by step.

  Attributes:
    loss: before the step, without L2, [steps, runs].
    distance: `|w' / c - w| / |w|` behind the step, where w' are the run's parameters
      and w those of the first run, [steps, runs].
  """

  loss: np.ndarray
  distance: np.ndarray

  def while_finite(self) -> "Trajectories":
    """Returns the steps behind which the first run is finite; NaN becomes infinite."""
    finite = np.isfinite(self.distance[:, 0])
    return Trajectories(*(np.nan_to_num(each[finite], nan=np.inf) for each in self))

  @property
  def loss_difference(self) -> np.ndarray:
    """`|L' - L| / L` of each run and the first, [steps, runs]."""
    with np.errstate(divide="ignore", invalid="ignore"):
      return np.abs(self.loss - self.loss[:, :1]) / self.loss[:, :1]


def trajectories(
  loss: Loss,
  runs: Sequence[Reparameterization],
  batches: Any,
  *,
  momentum: float,
  l2: float,
) -> Trajectories:
  """Trains reparameterized copies of one network beside each other.

  One compiled step trains each run in its turn, so that two runs differ only in what
  their numbers make different.

  Args:
    loss: L, without L2.
    runs: the runs; their w_0 have the same shapes and dtypes. The first one should
      have c = 1, since distances are to it.
    batches: a tree of arrays with a leading axis over the steps.
    momentum: as in `sgd`.
    l2: coefficient of the penalty on w = w' / c.

  Returns:
    The trajectories.
  """
  params = jax.tree.map(
    lambda *leaves: jnp.stack(leaves), *(run.params for run in runs)
  )
  dtype = jax.tree.leaves(params)[0].dtype
  constants = jnp.asarray([run.c for run in runs], dtype)
  rates = jnp.asarray([run.learning_rate for run in runs], dtype)
  done = _train_beside(params, constants, rates, batches, loss, momentum, l2)
  return Trajectories(*map(np.asarray, done))


@functools.partial(jax.jit, static_argnames=("loss", "momentum", "l2"))
def _train_beside(
  params: Params,
  constants: jax.Array,
  rates: jax.Array,
  batches: Any,
  loss: Loss,
  momentum: float,
  l2: float,
) -> tuple[jax.Array, jax.Array]:
  """Returns losses and distances of runs that are the leading axis of `params`."""

  def train(run: Any, batch: Any) -> Any:
    params, opt_state, c, rate = run
    value, grads = jax.value_and_grad(reparameterize(loss, c))(params, batch)
    optimizer = sgd(rate, momentum, l2 / c**2)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value

  def step(state: Any, batch: Any) -> tuple[Any, Any]:
    params, opt_state, losses = jax.lax.map(
      lambda run: train(run, batch), (*state, constants, rates)
    )
    original = jax.vmap(_divide)(params, constants)
    first = jax.tree.map(lambda leaf: leaf[0], original)
    distances = jax.vmap(lambda params: relative_distance(params, first))(original)
    return (params, opt_state), (losses, distances)

  params = jax.vmap(_scale)(params, constants)
  opt_state = jax.vmap(sgd(0.0, momentum).init)(params)
  losses, distances = jax.lax.scan(step, (params, opt_state), batches)[1]
  return losses, distances


def _divide(params: Params, c: jax.typing.ArrayLike) -> Params:
  return jax.tree.map(lambda param: param / c, params)


def _scale(params: Params, factor: jax.typing.ArrayLike) -> Params:
  return jax.tree.map(lambda param: factor * param, params)


def relative_distance(params: Params, reference: Params) -> jax.Array:
  """Returns `|params - reference| / |reference|`, norms over all parameters."""
  difference = jax.tree.map(jnp.subtract, params, reference)
  return optax.tree.norm(difference) / optax.tree.norm(reference)


def nudge(params: Params) -> Params:
  """Returns the parameters with every one moved up to the next number of its dtype.

  How far a run from there gets away shows what rounding does to the run.
  """
  return jax.tree.map(lambda param: jnp.nextafter(param, jnp.inf), params)


def function_difference(outputs: np.ndarray, reference: np.ndarray) -> np.ndarray:
  """Compares two networks by their outputs for the same examples, step by step.

  Args:
    outputs: [steps, N, classes].
    reference: of the network to compare with, of the same shape.

  Returns:
    The largest difference over the largest output of the reference; infinite where
    outputs are not finite, [steps].
  """
  with np.errstate(invalid="ignore"):
    difference = np.abs(outputs - reference).max((1, 2))
    return np.nan_to_num(difference / np.abs(reference).max((1, 2)), nan=np.inf)


def decay_root(learning_rate: float, momentum: float, l2: float) -> float:
  """Returns Li & Arora's rho, the larger root of what the module derives.

  Args:
    learning_rate: the constant rate eta of the run with weight decay.
    momentum: gamma, in [0, 1).
    l2: the weight decay lambda, not negative.

  Returns:
    The root rho of rho^2 - (1 + gamma - eta lambda) rho + gamma, in (0, 1].

  Raises:
    UsageError: the roots are not real and different, so that no growth is equivalent.
  """
  limit = (1 - math.sqrt(momentum)) ** 2
  decay = learning_rate * l2
  if decay >= limit:
    raise UsageError(
      f"l2 is {l2:g}: with learning_rate {learning_rate:g} and momentum {momentum:g} a "
      f"growing rate is equivalent to it only below {limit / learning_rate:.3g}."
    )
  # The discriminant as a product keeps its digits where the two roots are close.
  discriminant = (limit - decay) * ((1 + math.sqrt(momentum)) ** 2 - decay)
  return (1 + momentum - decay + math.sqrt(discriminant)) / 2


def growing_rates(learning_rate: float, rho: float, num_steps: int) -> np.ndarray:
  """Returns the rates eta rho^(-2t-1) of steps t = 0 to num_steps - 1, float64.

  Args:
    learning_rate: the constant rate eta of the run with weight decay.
    rho: see `decay_root`.
    num_steps: length of the run.
  """
  # A table, because a float32 exponential of large exponents has few digits.
  with np.errstate(over="ignore"):
    return learning_rate * rho ** -(2.0 * np.arange(num_steps) + 1)


def initial_velocity(learning_rate: float, rho: float) -> float:
  """Returns the factor on w_0 that gives the growing run's velocity before step 0.

  Args:
    learning_rate: the constant rate eta of the run with weight decay.
    rho: see `decay_root`.
  """
  return -(1 - rho) / (learning_rate * rho)


def scale_invariant(params: Params) -> Any:
  """Tells which parameters may be scaled, all by one factor, with no effect.

  In this package's pre-activation networks with batch normalization and epsilon zero,
  they are all kernels but the classifier's: normalizers stand before each activation
  and the classifier, and the stream that they see is a sum of what these kernels make.
  One kernel alone may not be scaled, because the others' part of the sum would stay.

  Args:
    params: parameters of such a network.

  Returns:
    A tree of the same structure, of booleans.
  """

  def invariant(path: tuple[Any, ...], _: jax.Array) -> bool:
    names = [key.key for key in path]
    return names[-1] == "kernel" and "classifier" not in names

  return jax.tree_util.tree_map_with_path(invariant, params)


def observed_runs(
  loss: StatefulLoss,
  make_optimizer: Callable[[Any], optax.GradientTransformation],
  runs: Mapping[str, tuple[Params, Any]],
  model_state: Any,
  batches: Any,
  observe: Callable[[Params, Any], Any],
) -> dict[str, Run]:
  """Trains a network in several ways and observes each before every step.

  One compiled program trains all runs, one after the other.

  Args:
    loss: the loss.
    make_optimizer: returns the optimizer for a run's settings, which it may not look
      at, since they are traced.
    runs: initial parameters and settings, a tree of arrays, of each run by its name.
    model_state: the network's other initial variables, such as moving averages.
    batches: a tree of arrays with a leading axis over the steps.
    observe: returns a tree of arrays from parameters and other variables.

  Returns:
    What each run did.
  """

  @jax.jit
  def train(params: Params, settings: Any, model_state: Any, batches: Any) -> Run:
    optimizer = make_optimizer(settings)

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
      params, model_state, opt_state = state
      observed = observe(params, model_state)
      (value, model_state), grads = jax.value_and_grad(loss, has_aux=True)(
        params, model_state, batch
      )
      updates, opt_state = optimizer.update(grads, opt_state, params)
      params = optax.apply_updates(params, updates)
      return (params, model_state, opt_state), (value, observed)

    state: Any = (params, model_state, optimizer.init(params))
    (params, *_), (losses, observed) = jax.lax.scan(step, state, batches)
    return Run(losses, observed, params)

  return {
    name: Run(*jax.device_get(train(params, settings, model_state, batches)))
    for name, (params, settings) in runs.items()
  }
