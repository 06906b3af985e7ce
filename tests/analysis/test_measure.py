"""Measured signals against theory, against plain JAX, and of a user's own network."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from skipinit_jax import methods
from skipinit_jax.analysis import measure, probes, theory
from skipinit_jax.errors import UsageError
from skipinit_jax.models import (
  BasicBlock,
  FullyConnectedBlock,
  PostActivationBottleneckBlock,
  ResidualMLP,
  WideResNet,
  scan_variables,
)


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def key(seed=0):
  # Many random kernels compile much faster with this generator.
  return jax.random.key(seed, impl="rbg")


def assert_theory(ensemble, expected, width):
  """Compares logarithms, within four standard errors and the finite-width term.

  At width n the logarithm of a second moment drifts by the order of the typical path
  length over n: what multiplies the stream at each block fluctuates. See
  `theory.predict`. The drift is about twice l / n, at p = 1/2, in networks that double.
  """
  forward = np.append(0, np.cumsum(expected.branch_share)) / width
  backward = forward[-1] - forward
  seeds = len(ensemble.signals.cosine)

  def compare(measured, value, finite_width):
    np.testing.assert_array_equal(
      measured == 0, np.broadcast_to(value == 0, measured.shape)
    )
    positive = value > 0
    measured, value = measured[:, positive], value[positive]
    logarithms = np.log(measured / value)
    error = logarithms.std(0, ddof=1) / np.sqrt(seeds)
    allowed = 4 * error + 5 * (finite_width[positive] + 1 / width)
    np.testing.assert_array_less(np.abs(logarithms.mean(0)), allowed)

  signals = ensemble.signals
  for name in ("second_moment", "variance"):
    compare(getattr(signals, name), getattr(expected, name), forward)
    for part in ("skip", "branch"):
      field = f"{part}_{name}"
      compare(getattr(signals, field), getattr(expected, field), forward[1:])
  compare(signals.relative_gradient, expected.relative_gradient, backward)
  if not np.isnan(expected.moving_variance).all():
    compare(signals.moving_variance, expected.moving_variance, forward[:-1])
  # A cosine has a scale of its own, and a correlation of two random vectors as error.
  error = 4 * ensemble.standard_error.cosine + 5 * (forward + 1 / width)
  assert np.all(np.abs(ensemble.mean.cosine - expected.cosine) < np.minimum(error, 0.1))


@pytest.mark.parametrize("name", methods.NAMES)
def test_theory_holds_for_every_method(name):
  width, x = 256, normal(32, 512)
  model = ResidualMLP(12, width, 2, methods.get(name), layers_per_block=2)
  ensemble = measure.over_seeds(model, x, num_seeds=8, key=key(), train=True)
  expected = theory.predict_model(model, x)
  assert ensemble.signals.names == expected.names
  assert_theory(ensemble, expected, width)


@pytest.mark.parametrize("name", ["batch_norm", "unnormalized"])
def test_theory_holds_at_depth_1000(name):
  """In double precision: 2^1000, and some methods' gradients, need it."""
  width, x = 64, normal(16, 128).astype(np.float64)
  with jax.enable_x64(True):
    dtypes = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    model = ResidualMLP(1000, width, 2, methods.get(name), **dtypes)
    ensemble = measure.over_seeds(model, x, num_seeds=4, key=key(), train=True)
    expected = theory.predict_model(model, x)
  assert_theory(ensemble, expected, width)


@pytest.mark.parametrize(
  ("name", "mean"),
  # Standardized weights do not see the mean of an image, but its border.
  [("batch_norm", 0.0), ("nf_resnet", 2.0)],
)
def test_theory_holds_for_convolutions_with_transitions(name, mean):
  """Borders, strides and projections of the activated input included."""
  model, x = WideResNet(10, 1, 2, methods.get(name)), normal(16, 8, 8, 3) + mean
  ensemble = measure.over_seeds(model, x, num_seeds=16, key=key(), train=True)
  expected = theory.predict_model(model, x)
  assert ensemble.signals.names == expected.names
  assert_theory(ensemble, expected, 3 * 3 * 16)


class OwnBlock(nn.Module):
  """A block of a user: normalized by the batch, linear, its sum divided."""

  features: int
  strides: int = 1

  @nn.compact
  def __call__(self, x, _=None):
    y = nn.BatchNorm(use_running_average=False)(x)
    y = nn.Dense(self.features, use_bias=False, name="last")(y)
    if x.shape[-1] != self.features:
      x = nn.Dense(self.features, use_bias=False, name="match")(x)
    return 0.8 * (x + y), None


class OwnNetwork(nn.Module):
  """A network of a user, in several forms."""

  features: tuple[int, ...] = (128,) * 5
  form: str = "plain"
  scanned: tuple[str, ...] = ("params", "batch_stats", "signal")

  @nn.compact
  def __call__(self, x):
    if self.form == "scan":
      block = nn.scan(
        OwnBlock,
        variable_axes=dict.fromkeys(self.scanned, 0),
        split_rngs={"params": True},
        length=len(self.features),
      )
      x, _ = block(self.features[0], name="layers")(x, None)
    else:
      block = nn.remat(OwnBlock) if self.form == "remat" else OwnBlock
      shared = block(self.features[0]) if self.form == "shared" else None
      for index, features in enumerate(self.features):
        layer = shared or block(features, name=f"layer_{index}")
        x, _ = layer(x)
    return nn.Dense(1, name="readout")(x)


OWN = measure.Blocks(OwnBlock, shortcut="match", branch=("last",))


@pytest.mark.parametrize("form", ["plain", "remat", "scan"])
def test_theory_holds_for_a_users_network(form):
  x = normal(32, 128)
  ensemble = measure.over_seeds(
    OwnNetwork(form=form), x, num_seeds=8, key=key(), blocks=OWN
  )
  layer = theory.Layer(1.0)
  block = theory.Block((theory.BatchNorm(), layer), sum_scale=0.8)
  network = theory.Network((block,) * 5)
  expected = theory.predict(network, theory.Kernel.of(x), len(x))
  assert_theory(ensemble, expected, 128)
  names = ("layers/{}" if form == "scan" else "layer_{}").format
  assert ensemble.signals.names == tuple(map(names, range(5)))


def measure_own(blocks, form="plain", features=(8, 8, 8), x=None, **fields):
  model = OwnNetwork(features, form, **fields)
  x = normal(4, 8) if x is None else x
  variables = model.init(key(), x)
  return measure.signal(model, variables, x, blocks=blocks)


class TestChoiceOfBlocks:
  def test_patterns_of_paths(self):
    for select, count in (("layer_2", 1), ("layer_[01]", 2)):
      blocks = dataclasses.replace(OWN, select=select)
      signal = jax.eval_shape(functools.partial(measure_own, blocks))
      assert len(signal.names) == count == signal.second_moment.size - 1

  def test_transitions(self):
    named = measure_own(OWN, features=(8, 16))
    assert np.isfinite(named.skip_variance).all()
    unnamed = measure_own(measure.Blocks(OwnBlock), features=(8, 16))
    assert np.isnan(unnamed.skip_variance).tolist() == [False, True]
    assert np.isnan(unnamed.branch_variance).tolist() == [False, True]
    np.testing.assert_allclose(unnamed.second_moment, named.second_moment)

  @pytest.mark.parametrize(
    ("blocks", "fields", "message"),
    [
      (measure.Blocks((nn.Conv, BasicBlock)), {}, "Conv or BasicBlock.*OwnBlock"),
      (
        measure.Blocks("layers_*"),
        {},
        r"Unknown block 'layers_\*' \(did you mean 'layer_\*",
      ),
      (
        OWN,
        {"form": "scan", "scanned": ("params", "batch_stats")},
        r"'layers' is inside a scan.*\"signal\": 0",
      ),
    ],
  )
  def test_blocks_that_cannot_be_measured(self, blocks, fields, message):
    with pytest.raises(UsageError, match=message):
      measure_own(blocks, **fields)

  def test_a_block_that_is_called_several_times(self):
    x = normal(4, 8)
    shared = measure_own(OWN, form="shared", x=x)
    assert shared.names == tuple(f"OwnBlock_0 (call {n})" for n in (1, 2, 3))
    model = OwnNetwork((8, 8, 8), "shared")
    kernel = model.init(key(), x)["params"]["OwnBlock_0"]["last"]["kernel"]
    for index in range(3):
      np.testing.assert_allclose(
        shared.second_moment[index], np.square(x).mean(), rtol=1e-5
      )
      x = 0.8 * (x + (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) @ kernel)
    assert np.isfinite(shared.gradient_second_moment).all()

  def test_inputs_by_name_and_of_integers(self):
    """A dict of arguments, tokens, a mask by keyword, and blocks called by keyword."""

    class Network(nn.Module):
      @nn.compact
      def __call__(self, tokens, mask):
        x = nn.Embed(7, 8, name="embed")(tokens)
        for name in ("encoder", "decoder"):
          x = Stage(name=name)(x, mask=mask)
        return x.mean(1)

    class Stage(nn.Module):
      @nn.compact
      def __call__(self, x, *, mask):
        x = jnp.where(mask[..., None], x, 0)
        return FullyConnectedBlock(8, name="block")(x=x)

    tokens = np.random.default_rng(0).integers(0, 7, (4, 5))
    batch = {"tokens": tokens, "mask": np.ones((4, 5), bool)}
    ensemble = measure.over_seeds(Network(), batch, num_seeds=2)
    assert ensemble.signals.names == ("encoder/block", "decoder/block")
    blocks = measure.Blocks("embed")
    with pytest.raises(UsageError, match=r"input of block 'embed' has dtype int"):
      measure.over_seeds(Network(), batch, num_seeds=2, blocks=blocks)

  def test_a_network_without_modules_inside(self):
    class Network(nn.Module):
      @nn.compact
      def __call__(self, x):
        return x

    with pytest.raises(UsageError, match=r"model is a function, no Flax module"):
      measure.signal(lambda x: x, {}, normal(4, 8))
    for select in ("layers_*", OwnBlock):
      with pytest.raises(UsageError, match=r"no modules inside.*diagnose_functions"):
        measure.signal(Network(), {}, normal(4, 8), blocks=measure.Blocks(select))


def test_too_few_seeds():
  model = ResidualMLP(2, 8, 2, methods.get("batch_norm"))
  with pytest.raises(UsageError, match="num_seeds is 1"):
    measure.over_seeds(model, normal(4, 8), num_seeds=1, train=True)


class Perturbed(nn.Module):
  """A network whose code provides for gradients, as Flax suggests."""

  @nn.compact
  def __call__(self, x):
    for index in range(3):
      block = BasicBlock(4, 2 if index == 1 else 1, name=f"block{index}")
      x = self.perturb(f"output{index}", block(x))
    return x.mean((1, 2))


def test_numbers_are_those_of_plain_jax():
  model, x = Perturbed(), normal(5, 6, 6, 3)
  variables = jax.jit(model.init)(key(), x)

  def loss(outputs):
    return jnp.square(outputs).sum()

  signal = measure.signal(model, {"params": variables["params"]}, x, loss=loss)

  @jax.jit
  def plain(variables):
    _, state = model.apply(
      variables, x, capture_intermediates=True, mutable=["intermediates"]
    )
    return state, jax.grad(lambda variables: loss(model.apply(variables, x)))(variables)

  state, gradients = plain(variables)
  state = state["intermediates"]
  for index in range(3):
    features = np.asarray(state[f"block{index}"]["__call__"][0], np.float64)
    gradient = np.asarray(gradients["perturbations"][f"output{index}"])
    rows = features.reshape(5, -1)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = (rows @ rows.T)[~np.eye(5, dtype=bool)]
    branch = np.asarray(state[f"block{index}"]["conv2"]["__call__"][0])
    shortcut = features - branch
    at = np.square(gradient).mean((0, 3))
    for measured, value in (
      (signal.gradient_spread[index], 1 - at.max() / at.sum()),
      (signal.second_moment[index + 1], np.square(features).mean()),
      (signal.variance[index + 1], features.var((0, 1, 2)).mean()),
      (signal.cosine[index + 1], cosines.mean()),
      (signal.gradient_second_moment[index + 1], np.square(gradient).mean()),
      (signal.branch_second_moment[index], np.square(branch).mean()),
      (signal.branch_variance[index], branch.var((0, 1, 2)).mean()),
      (signal.skip_second_moment[index], np.square(shortcut).mean()),
      (signal.skip_variance[index], shortcut.var((0, 1, 2)).mean()),
      (signal.sum_second_moment[index], np.square(features).mean()),
    ):
      np.testing.assert_allclose(measured, value, rtol=1e-4)
  np.testing.assert_allclose(signal.second_moment[0], np.square(x).mean(), rtol=1e-5)


def test_moving_variance_is_what_the_running_average_approaches():
  method = methods.with_ghost_batches(methods.get("batch_norm"), 4)
  model, x = ResidualMLP(3, 16, 2, method), normal(8, 16)
  variables = model.init(key(), x, train=True)
  # What nobody reads is not compiled.
  measured = jax.jit(
    lambda *given: measure.signal(model, *given, train=True).moving_variance
  )(variables, x)
  _, state = model.apply(variables, x, train=True, mutable=["batch_stats"])
  running = state["batch_stats"]["stack"]["blocks"]["norm1"]["var"]
  np.testing.assert_allclose(0.9 + 0.1 * measured, running.mean(1), rtol=1e-5)


def test_alphas_are_in_the_order_of_the_network():
  model = ResidualMLP(12, 4, 2, methods.get("skipinit"), scan=False)
  x = normal(4, 4)
  shapes = jax.eval_shape(functools.partial(model.init, train=True), key(), x)
  variables = jax.tree.map(jnp.zeros_like, shapes)
  # As text, 10 comes before 2.
  for index in range(12):
    block = variables["params"]["stack"][f"block{index}"]
    block["branch_scale"]["alpha"] = jnp.float32(index + 1)
  for each in (model, model.clone(scan=True)):
    each_variables = scan_variables(variables) if each.scan else variables
    run = functools.partial(measure.signal, each, train=True)
    # What nobody reads is not compiled.
    alpha = jax.jit(lambda *given, run=run: run(*given).alpha)(each_variables, x)
    np.testing.assert_array_equal(alpha, np.arange(1, 13))
    names = jax.eval_shape(run, each_variables, x).names
    assert names[-1] == ("stack/blocks/11" if each.scan else "stack/block11")


def test_a_scale_of_each_feature_is_no_alpha():
  model, x = ResidualMLP(2, 4, 2, methods.get("layer_scale")), normal(4, 4)
  variables = model.init(key(), x, train=True)
  signal = jax.eval_shape(lambda: measure.signal(model, variables, x, train=True))
  assert signal.alpha is None


def test_a_classifier_of_zeros_stops_the_losss_gradient_and_not_the_noises():
  model, x = ResidualMLP(3, 16, 2, methods.get("fixup")), normal(8, 16)
  variables = model.init(key(), x, train=True)
  run = functools.partial(measure.signal, model, variables, x, train=True)
  np.testing.assert_array_equal(run(loss=jnp.sum).gradient_second_moment, 0)
  noise = run().gradient_second_moment
  assert 0.5 < noise[-1] < 2
  np.testing.assert_allclose(noise, noise[-1], rtol=1e-6)


def test_bfloat16_is_measured_in_float32():
  method = methods.get("skipinit_one")
  model, x = ResidualMLP(3, 256, 2, method, dtype=jnp.bfloat16), normal(8, 256)
  variables = model.init(key(), x, train=True)
  run = functools.partial(measure.signal, model, variables, x, train=True)
  leaves = jax.tree.leaves(jax.eval_shape(run))
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
  second_moment = jax.jit(lambda: run().second_moment)()
  np.testing.assert_allclose(second_moment / second_moment[0], [1, 2, 4, 8], rtol=0.2)


def test_post_activation_blocks_have_their_sum_in_front_of_the_activation():
  class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
      for _ in range(2):
        x = PostActivationBottleneckBlock(8, branch_scale=None)(x)
      return x

  x = np.abs(normal(64, 4, 4, 32))
  signal = measure.over_seeds(Network(), x, num_seeds=4, key=key()).mean
  np.testing.assert_allclose(signal.skip_second_moment, signal.second_moment[:-1])
  assert np.all(signal.second_moment[1:] < signal.sum_second_moment)


def test_moments_are_finite_where_only_their_sums_overflow():
  x = 2.0**63 * jnp.tile(jnp.array([[1.0], [-1.0]]), (32, 128))
  statistics = probes.statistics(x)
  assert statistics["second_moment"] == 2.0**126
  assert statistics["variance"] == 2.0**126
  assert probes.statistics(4 * x)["second_moment"] == jnp.inf
  _, gradient, _ = probes._probe_backward(None, x)
  assert gradient == 2.0**126
