"""The equivalences, against closed forms and loops in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from skipinit_jax import methods
from skipinit_jax.analysis import equivalence, figures
from skipinit_jax.errors import UsageError
from skipinit_jax.models import ResidualMLP, WideResNet

CURVATURES = np.array([1.0, 0.3, 0.1])
RATE, MOMENTUM, L2 = 0.1, 0.8, 0.05


@pytest.mark.parametrize(
  ("rate", "momentum", "l2"), [(0.125, 0.9, 0.02), (0.1, 0.5, 1e-3), (2.0, 0.0, 0.1)]
)
def test_decay_root_solves_the_equation(rate, momentum, l2):
  rho = equivalence.decay_root(rate, momentum, l2)
  roots = np.roots([1, -(1 + momentum - rate * l2), momentum])
  assert rho == pytest.approx(max(roots), rel=1e-12)
  assert 0 < rho < 1


def test_decay_root_without_decay_or_growth():
  assert equivalence.decay_root(0.1, 0.9, 0.0) == pytest.approx(1, abs=1e-15)
  assert equivalence.decay_root(0.5, 0.0, 0.2) == pytest.approx(0.9, abs=1e-15)
  with pytest.raises(UsageError, match=r"l2 is 0\.03: .* only below 0\.0263"):
    equivalence.decay_root(0.1, 0.9, 0.03)


def test_growing_rates():
  np.testing.assert_allclose(
    equivalence.growing_rates(3.0, 0.5, 3), [3 * 2, 3 * 2**3, 3 * 2**5]
  )
  # Beyond float64 too: the run then has no rate, and no error.
  assert equivalence.growing_rates(1.0, 0.5, 600)[-1] == np.inf


def _angular_loss(params, state, batch):
  """A function of the direction of w only, and of another parameter."""
  direction = params["w"] / jnp.linalg.norm(params["w"])
  fit = jnp.sum((direction - batch) ** 2 * (1 + params["v"] ** 2))
  return fit + params["v"] ** 2, state


def _angular_runs(velocity_factor=1.0):
  steps = 60
  batches = np.random.default_rng(0).normal(size=(steps, 3))
  rho = equivalence.decay_root(RATE, MOMENTUM, L2)
  velocity = velocity_factor * equivalence.initial_velocity(RATE, rho)
  rates = equivalence.growing_rates(RATE, rho, steps)
  with jax.enable_x64(True):
    initial = {"w": jnp.array([1.0, 2.0, -1.0]), "v": jnp.array(0.5)}

    def make_optimizer(settings):
      schedule, l2, velocity = settings
      moving = equivalence.sgd(lambda step: schedule[step], MOMENTUM, l2, velocity)
      parts = {"w": moving, "v": equivalence.sgd(RATE, MOMENTUM, L2)}
      return optax.partition(parts, {"w": "w", "v": "v"})

    runs = equivalence.observed_runs(
      _angular_loss,
      make_optimizer,
      {
        "decay": (initial, (np.full(steps, RATE), L2, 0.0)),
        "growth": (initial, (rates, 0.0, velocity)),
      },
      {},
      batches,
      lambda params, _: params["w"],
    )
    return rho ** np.arange(steps), runs["decay"], runs["growth"]


def test_growing_rate_equals_weight_decay():
  scale, decay, growth = _angular_runs()
  assert 1 / scale[-1] > 3
  np.testing.assert_allclose(
    scale[:, None] * growth.observed, decay.observed, rtol=1e-11
  )
  np.testing.assert_allclose(growth.loss, decay.loss, rtol=1e-11)
  np.testing.assert_allclose(growth.params["v"], decay.params["v"], rtol=1e-11)


def test_growing_rate_needs_its_velocity():
  scale, decay, growth = _angular_runs(velocity_factor=0.5)
  assert np.abs(growth.loss / decay.loss - 1).max() > 1e-3
  assert np.abs(scale[:, None] * growth.observed - decay.observed).max() > 0.05


def _quadratic_loss(params, batch):
  return jnp.sum(jnp.asarray(CURVATURES, params.dtype) * (params - batch) ** 2) / 2


def _quadratic_path(w, batches, rate):
  """Heavy-ball gradient descent with L2, as a loop."""
  velocity, losses = np.zeros_like(w), []
  for batch in batches:
    losses.append((CURVATURES * (w - batch) ** 2).sum() / 2)
    velocity = MOMENTUM * velocity + CURVATURES * (w - batch) + L2 * w
    w = w - rate * velocity
  return losses, w


def _quadratic_runs(runs, steps=40):
  batches = np.random.default_rng(1).normal(size=(steps, 3))
  with jax.enable_x64(True):
    w = jnp.array([1.0, 2.0, -1.0])
    return batches, equivalence.trajectories(
      _quadratic_loss,
      [equivalence.Reparameterization(w, c, rate) for c, rate in runs],
      batches,
      momentum=MOMENTUM,
      l2=L2,
    )


def test_trajectories_are_those_of_a_loop():
  # The last run has the rate of L(w): over c^2, it is a ninth of it.
  runs = [(1.0, RATE), (4.0, 16 * RATE), (3.0, 9 * RATE), (3.0, RATE)]
  batches, done = _quadratic_runs(runs)
  losses, last = _quadratic_path(np.array([1.0, 2.0, -1.0]), batches, RATE)
  wrong, astray = _quadratic_path(np.array([1.0, 2.0, -1.0]), batches, RATE / 9)
  for index, expected in enumerate((losses, losses, losses, wrong)):
    np.testing.assert_allclose(done.loss[:, index], expected, rtol=1e-12)
  assert not done.distance[:, :2].any()
  assert 0 < done.distance[:, 2].max() < 1e-14
  distance = np.linalg.norm(astray - last) / np.linalg.norm(last)
  assert done.distance[-1, 3] == pytest.approx(distance, rel=1e-11)
  difference = np.abs(np.array(wrong) / losses - 1)
  np.testing.assert_allclose(done.loss_difference[:, 3], difference, rtol=1e-9)


def test_trajectories_end_where_the_first_diverges():
  _, done = _quadratic_runs([(1.0, 1e30), (1.0, RATE), (2.0, 1e60)])
  finite = done.while_finite()
  assert 0 < len(finite.loss) < len(done.loss) == 40
  assert np.isfinite(finite.distance[:, 0]).all()
  assert not np.isnan(finite.distance).any()


def test_reparameterize():
  loss = equivalence.reparameterize(lambda params, batch: params["w"] * batch, 4.0)
  assert loss({"w": 8.0}, 3.0) == 6.0


def test_nudge():
  values = np.array([1.0, -2.0, 1e-3], np.float32)
  (nudged,) = equivalence.nudge((jnp.asarray(values),))
  assert (np.asarray(nudged) == np.nextafter(values, np.float32(np.inf))).all()


def test_rounding_of_a_smooth_network_grows_slowly():
  """What makes runs part is ReLU: with softplus, errors stay near those of float32."""
  rng = np.random.default_rng(2)
  images = jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)
  labels = jnp.asarray(rng.integers(4, size=16))

  def loss(params, rows):
    hidden = jax.nn.softplus(images[rows] @ params["in"])
    log_probabilities = jax.nn.log_softmax(hidden @ params["out"])
    return -log_probabilities[jnp.arange(len(rows)), labels[rows]].mean()

  params = {
    name: jnp.asarray(rng.normal(size=shape) / 3, jnp.float32)
    for name, shape in {"in": (8, 32), "out": (32, 4)}.items()
  }
  done = equivalence.trajectories(
    loss,
    [equivalence.Reparameterization(params, c, c**2 * 0.1) for c in (1.0, 3.0)],
    np.stack([rng.permutation(16)[:8] for _ in range(300)]),
    momentum=0.9,
    l2=0.0,
  )
  assert done.loss[-20:, 0].mean() < 0.5 * done.loss[0, 0]
  assert 0 < done.distance[:, 1].max() < 1e-5


def test_function_difference():
  reference = np.array([[[1.0, -4.0]], [[2.0, 1.0]], [[1.0, 1.0]]])
  outputs = np.array([[[2.0, -4.0]], [[2.0, 0.5]], [[np.nan, 1.0]]])
  np.testing.assert_array_equal(
    equivalence.function_difference(outputs, reference), [0.25, 0.25, np.inf]
  )


@pytest.mark.parametrize("model", [WideResNet, ResidualMLP])
def test_scale_invariant_parameters_have_no_scale(model):
  normalizer = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-30)
  method = dataclasses.replace(methods.get("batch_norm"), normalizer=normalizer)
  sizes = {WideResNet: (10, 1), ResidualMLP: (3, 16)}[model]
  network = model(*sizes, 10, method)
  images = jax.random.normal(jax.random.key(0), (8, 8, 8, 1))
  init = jax.jit(lambda key: network.init(key, images, train=False))
  variables = init(jax.random.key(1))
  invariant = equivalence.scale_invariant(variables["params"])

  @jax.jit
  def logits(scales):
    params = jax.tree.map(jnp.multiply, variables["params"], scales)
    variables_ = {**variables, "params": params}
    return network.apply(variables_, images, train=True, mutable=["batch_stats"])[0]

  def scaled(chosen):
    return logits(jax.tree.map(lambda use: 3.0 if use else 1.0, chosen))

  original = scaled(jax.tree.map(lambda _: False, invariant))
  np.testing.assert_allclose(scaled(invariant), original, rtol=1e-3, atol=1e-4)
  # Neither one summand of the stream alone, nor any other parameter.
  others = jax.tree.map(lambda use: not use, invariant)
  stem = jax.tree.map(lambda _: False, invariant) | {"stem": invariant["stem"]}
  for changed in (others, stem):
    assert np.abs(scaled(changed) - original).max() > 0.1
  names = {path[-1].key for path, use in _leaves(invariant) if use}
  assert names == {"kernel"}
  kept = {path[-2].key for path, use in _leaves(invariant) if not use}
  assert "classifier" in kept


@pytest.mark.parametrize("name", ["batch_norm", "skipinit"])
def test_any_precision_is_the_network_itself(name):
  method = methods.get(name)
  images = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))

  def network(dtype):
    return ResidualMLP(3, 8, 10, method, dtype=dtype, param_dtype=dtype)

  def apply(model, variables, images):
    return jax.jit(lambda tree: model.apply(tree, images, train=False))(variables)

  variables = equivalence.AnyPrecision(network("float32")).init(
    jax.random.key(1), images, train=False
  )

  def with_head(tree):
    head = {name: part for name, part in tree.items() if name != "body"}
    return {**tree["body"], "head": head}

  moved = {name: with_head(tree) for name, tree in variables.items()}
  expected = apply(network("float32"), moved, images)
  narrow = apply(equivalence.AnyPrecision(network("float32")), variables, images)
  np.testing.assert_allclose(narrow, expected, rtol=1e-6, atol=1e-6)
  with jax.enable_x64(True):
    variables, images = jax.tree.map(np.float64, jax.device_get((variables, images)))
    wide = apply(equivalence.AnyPrecision(network("float64")), variables, images)
    wide = np.asarray(wide)
  assert wide.dtype == np.float64
  assert 0 < np.abs(wide - expected).max() < 1e-4


@pytest.mark.parametrize(("factor", "vanishes"), [(0.9, False), (1.1, True)])
def test_gradient_of_batch_norm_needs_a_variance_in_range(factor, vanishes):
  """Beyond it, the gradient lacks what makes it orthogonal to the parameters."""
  images, weights = np.random.default_rng(0).normal(size=(2, 64, 8)).astype("float32")
  images /= images.std(0)
  norm = nn.BatchNorm(use_running_average=False, epsilon=1e-30)
  variables = norm.init(jax.random.key(0), images)

  @jax.jit
  @jax.grad
  def gradient(x):
    return (weights * norm.apply(variables, x, mutable=["batch_stats"])[0]).sum()

  scale = np.float32((factor * equivalence.LARGEST_VARIANCE) ** 0.5)
  grads = np.asarray(gradient(images * scale)) * scale
  radial = (grads * images).sum(0) / np.linalg.norm(grads, axis=0)
  assert (np.abs(radial) > 0.1).any() == vanishes


def _leaves(tree):
  return jax.tree_util.tree_leaves_with_path(tree)


def test_line_figure_keeps_colors_and_leaves_out_what_an_axis_lacks():
  x = np.arange(4)
  one, other = np.array([1.0, 10, 0, np.inf]), np.array([5.0, -1, 2, 3])
  figure = figures.line_figure(
    [
      figures.Panel("first", {"a": (x, one), "b": (x, other)}),
      figures.Panel("second", {"b": (x, other)}, log_y=False),
      figures.Panel("third", {"a": (x + 1, one)}, log_x=True),
    ],
    "step",
  )
  first, second, third = figure.axes
  a, b = first.lines[:2]
  np.testing.assert_array_equal(a.get_ydata(), [1, 10, np.nan, np.nan])
  np.testing.assert_array_equal(second.lines[0].get_ydata(), other)
  assert b.get_color() == second.lines[0].get_color() != a.get_color()
  assert third.lines[0].get_color() == a.get_color()
  assert (first.get_yscale(), second.get_yscale()) == ("log", "linear")
  assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
