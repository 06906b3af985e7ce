"""Theory against closed forms, and its operations against sampled networks."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from skipinit_jax import methods
from skipinit_jax.analysis import theory
from skipinit_jax.analysis.theory import BatchNorm, Kernel, Layer, ReLU
from skipinit_jax.errors import UsageError
from skipinit_jax.models import ResidualMLP, ResNet, WideResNet

# NF-ResNet without its learnable scalar, which starts at zero.
TIMM = dataclasses.replace(methods.get("nf_resnet"), alpha=None)
LARGE = 10**6  # a batch so large that its size does not matter


def change(name, **fields):
  return dataclasses.replace(methods.get(name), **fields)


def predict(method, depth, *, batch_size=LARGE, cosine=0.0, linear=False, **keywords):
  method = methods.get(method) if isinstance(method, str) else method
  method = methods.linear(method) if linear else method
  network = theory.uniform(method, depth, **keywords)
  return theory.predict(network, Kernel.uniform(1.0, cosine), batch_size)


def power_of_gradients(signal, base):
  """The power of `base` as which gradients grow from block 400 to block 100."""
  gradients = signal.gradient_second_moment
  return np.log(gradients[100] / gradients[400]) / np.log(base[400] / base[100])


class TestClosedForms:
  @pytest.mark.parametrize(
    ("method", "alpha", "keywords"),
    [
      ("unnormalized", 1.0, {"linear": True}),
      ("unnormalized", 1.0, {"layers_per_block": 3}),
      ("skipinit", 0.0, {}),
      (change("skipinit", alpha=0.5), 0.5, {}),
      ("skipinit_inverse_sqrt_depth", 0.001**0.5, {}),
    ],
  )
  def test_both_directions_grow_by_one_plus_alpha_squared(
    self, method, alpha, keywords
  ):
    signal = predict(method, 1000, **keywords)
    growth = (1 + alpha**2) ** np.arange(1001)
    np.testing.assert_allclose(signal.second_moment, growth)
    np.testing.assert_allclose(signal.gradient_second_moment, growth[::-1])
    np.testing.assert_allclose(signal.branch_share, alpha**2 / (1 + alpha**2))

  def test_linear_batch_norm_grows_by_one_a_block(self):
    signal = predict("batch_norm", 50, linear=True)
    blocks = np.arange(1, 51)
    np.testing.assert_allclose(signal.variance, np.arange(51) + 1, rtol=1e-4)
    np.testing.assert_allclose(signal.moving_variance, blocks, rtol=1e-4)
    np.testing.assert_allclose(signal.branch_to_skip, 1 / blocks, rtol=1e-4)
    np.testing.assert_allclose(signal.branch_share, 1 / (blocks + 1), rtol=1e-4)
    # The product of 1 + 1 / l, which telescopes.
    np.testing.assert_allclose(
      signal.gradient_second_moment, 51 / np.arange(1, 52), rtol=1e-4
    )

  def test_relu_batch_norm_adds_1_minus_1_over_pi_to_the_variance(self):
    signal = predict("batch_norm", 1000)
    blocks = np.arange(1001)
    np.testing.assert_allclose(signal.second_moment, 1 + blocks, rtol=1e-4)
    np.testing.assert_allclose(signal.variance, 1 + (1 - 1 / np.pi) * blocks, rtol=1e-4)
    np.testing.assert_allclose(signal.cosine[-1], 1 / np.pi, rtol=2e-3)
    power = power_of_gradients(signal, 1 + blocks)
    np.testing.assert_allclose(power, 1 / (1 - 1 / np.pi), rtol=0.02)

  def test_gradients_of_batch_norm_divided_by_sqrt2_explode(self):
    signal = predict("batch_norm_divide_by_sqrt2", 100)
    np.testing.assert_allclose(signal.second_moment, 1, rtol=1e-4)
    growth = signal.gradient_second_moment[50] / signal.gradient_second_moment[51]
    np.testing.assert_allclose(growth, (1 + 1 / (1 - 1 / np.pi)) / 2, rtol=1e-4)

  def test_division_by_sqrt2_is_perfect_and_loses_its_inputs(self):
    signal = predict("divide_by_sqrt2", 3000)
    np.testing.assert_allclose(signal.second_moment, 1)
    np.testing.assert_allclose(signal.gradient_second_moment, 1)
    distance = 1 - signal.cosine[[1000, 3000]]
    np.testing.assert_allclose(
      distance, 18 * np.pi**2 / np.array([1000, 3000]) ** 2, rtol=0.05
    )
    doubling = predict("unnormalized", 100)
    np.testing.assert_allclose(signal.cosine[:101], doubling.cosine, rtol=1e-9)

  def test_batch_norm_of_scale_zero_is_the_identity_but_for_transitions(self):
    signal = predict("batch_norm_zero_scale", 6, transitions={4}, cosine=0.2)
    np.testing.assert_array_equal(signal.branch_second_moment, 0)
    # A transition's projection takes normalized features.
    np.testing.assert_allclose(signal.second_moment, 1, rtol=1e-4)
    np.testing.assert_allclose(signal.cosine[:4], 0.2)
    np.testing.assert_allclose(signal.moving_variance, signal.variance[:-1])
    # What enters the transition has variance 0.8 over the batch.
    assert signal.gradient_second_moment[4] == 1
    np.testing.assert_allclose(signal.gradient_second_moment[3], 1 / 0.8, rtol=1e-4)

  def test_transitions_reset_batch_normalized_streams_only(self):
    signal = predict("batch_norm", 6, transitions={4})
    np.testing.assert_allclose(signal.second_moment, [1, 2, 3, 4, 2, 3, 4], rtol=1e-4)
    np.testing.assert_allclose(signal.moving_variance[3], signal.variance[3])
    doubling = predict("unnormalized", 6, transitions={4})
    np.testing.assert_allclose(doubling.second_moment, 2.0 ** np.arange(7))
    # Both ways through a transition share the activation's derivative.
    np.testing.assert_allclose(doubling.gradient_second_moment[3], 8)

  def test_layer_norm_scales_like_batch_norm_but_keeps_common_directions(self):
    signal = predict("layer_norm", 300)
    np.testing.assert_allclose(signal.second_moment, 1 + np.arange(301), rtol=1e-4)
    assert signal.cosine[-1] > 0.6
    np.testing.assert_allclose(signal.gradient_second_moment[0], 301, rtol=1e-4)

  def test_nf_resnet_has_the_variance_that_it_expects(self):
    method, transitions = TIMM, {1, 4}
    signal = predict(method, 6, transitions=transitions, layers_per_block=2)
    # 1 + l alpha^2, reset behind a transition's shortcut.
    expected = [1, 1.04, 1.08, 1.12, 1.04, 1.08, 1.12]
    np.testing.assert_allclose(signal.second_moment, expected)
    np.testing.assert_allclose(
      method.expected_variances([block in transitions for block in range(1, 7)]),
      expected[:-1],
    )
    # No mean: examples that are orthogonal stay so, as in no other ReLU network here.
    np.testing.assert_allclose(signal.variance, expected, rtol=1e-5)
    np.testing.assert_allclose(signal.cosine, 0, atol=1e-12)

  @pytest.mark.parametrize(
    ("layers", "linear", "cosine"), [(1, False, 0.0), (3, False, 0.0), (1, True, 0.3)]
  )
  def test_gradients_of_nf_resnet_grow_as_a_power(self, layers, linear, cosine):
    signal = predict(TIMM, 1000, layers_per_block=layers, linear=linear, cosine=cosine)
    np.testing.assert_allclose(signal.second_moment, 1 + 0.04 * np.arange(1001))
    np.testing.assert_allclose(signal.cosine, cosine, atol=1e-12)
    growth = 1.0 if linear else (1 / (1 - 1 / np.pi)) ** layers
    blocks = 0.04 / signal.second_moment[:-1]
    expected = np.cumprod((1 + growth * blocks)[::-1])[::-1]
    np.testing.assert_allclose(signal.gradient_second_moment[:-1], expected)
    power = power_of_gradients(signal, signal.second_moment)
    np.testing.assert_allclose(power, growth, rtol=0.02)

  def test_ghost_batches_center_over_their_own_size(self):
    method = methods.with_ghost_batches(methods.get("batch_norm"), 8)
    signal = predict(method, 3, batch_size=64)
    np.testing.assert_allclose(signal.moving_variance[0], 1 - 1 / 8)
    np.testing.assert_allclose(signal.skip_variance[0], 1 - 1 / 64)


class TestOperations:
  @pytest.mark.parametrize(
    ("cosine", "expected"),
    [
      (1.0, 1.0),
      (0.5, (math.sqrt(3) / 2 + math.pi / 3) / math.pi),
      (0.0, 1 / math.pi),
      (-1.0, 0.0),
    ],
  )
  def test_arc_cosine_kernel(self, cosine, expected):
    kernel = ReLU().forward(Kernel.uniform(3.0, cosine), 2)
    np.testing.assert_allclose(kernel.second_moment, 1.5)
    np.testing.assert_allclose(kernel.cosine, expected, atol=1e-12)

  @pytest.mark.parametrize("grid", [(8, 8), (5, 4), (2, 1), (1, 1)])
  @pytest.mark.parametrize("symmetric", [False, True])
  @pytest.mark.parametrize(("size", "strides"), [(3, 1), (1, 2), (3, 2), (7, 2)])
  def test_windows_are_those_of_jax(self, grid, symmetric, size, strides):
    layer = Layer(1.0, size=size, strides=strides, symmetric=symmetric)
    inputs = np.random.default_rng(0).normal(size=(2, *grid, 1)).astype(np.float32)
    # With weights of one and no cross terms, a convolution adds variances.
    expected = jax.lax.conv_general_dilated(
      inputs**2,
      np.ones((size, size, 1, 1), np.float32) / size**2,
      (strides, strides),
      [(size // 2, size // 2)] * 2 if symmetric else "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    means = layer.window_means(inputs[..., 0] ** 2)
    np.testing.assert_allclose(means, expected[..., 0], rtol=1e-5)
    expected = expected.mean(0)
    same = np.diag((inputs**2).mean(0).ravel()).astype(float)
    output = layer.forward(Kernel(same, 0 * same, grid), 2)
    assert output.grid == expected.shape[:2] == layer.output_grid(grid)
    np.testing.assert_allclose(output.diagonal, expected.ravel(), rtol=1e-5)

  @pytest.mark.parametrize(("size", "strides"), [(1, 2), (3, 1), (3, 2)])
  def test_backward_is_the_transpose_of_forward(self, size, strides):
    layer, rng = Layer(2.0, size=size, strides=strides), np.random.default_rng(0)
    inputs = Kernel(rng.normal(size=(20, 20)), rng.normal(size=(20, 20)), (4, 5))
    outputs = layer.forward(inputs, 8)
    gradient = Kernel(*rng.normal(size=(2, *outputs.same.shape)), outputs.grid)
    np.testing.assert_allclose(
      outputs.inner_product(gradient, 8),
      inputs.inner_product(layer.backward(gradient, inputs, 8), 8),
    )

  def test_standardized_weights_do_not_see_the_mean(self):
    """Against the covariance over channels of ReLU's output, and a border."""
    kernel = ReLU().forward(Kernel.uniform(1.0, 0.6, (3, 3)), 2)
    layer = Layer(3.0, size=3, standardized=True, mean_share=1 / np.pi)
    output = layer.forward(kernel, 2)
    # The middle sees all nine positions, a corner four.
    for position, seen in ((4, 1), (0, 4 / 9)):
      expected = 3 * (seen * kernel.same[0, 0] - seen**2 / (2 * np.pi))
      np.testing.assert_allclose(output.same[position, position], expected)

  @pytest.mark.parametrize("relu", [False, True])
  @pytest.mark.parametrize("batch_size", [4, 8])
  def test_batch_norm_agrees_with_samples(self, relu, batch_size):
    """Both directions, against the gradient that JAX computes of the formula."""
    inputs, gradient = Kernel.uniform(2.0, 0.3), Kernel.uniform(1.0, 0.4)
    samples, (key, other) = 100_000, jax.random.split(jax.random.key(0))

    def draw(key, kernel):
      matrix = np.full((batch_size, batch_size), kernel.other[0, 0])
      np.fill_diagonal(matrix, kernel.same[0, 0])
      normal = jax.random.normal(key, (samples, batch_size))
      return normal @ np.linalg.cholesky(matrix).T.astype(np.float32)

    def formula(x):
      x = x - x.mean(1, keepdims=True)
      x = x / jnp.sqrt(jnp.square(x).mean(1, keepdims=True))
      return nn.relu(x) if relu else x

    y, transpose = jax.vjp(formula, draw(key, inputs))
    (g,) = transpose(draw(other, gradient))
    norm = BatchNorm(relu=relu, epsilon=0.0)
    for values, kernel in (
      (y, norm.forward(inputs, batch_size)),
      (g, norm.backward(gradient, inputs, batch_size)),
    ):
      values = np.asarray(values, np.float64)
      assert_mean(np.square(values).mean(1), kernel.same[0, 0])
      pairs = values.sum(1) ** 2 - np.square(values).sum(1)
      assert_mean(pairs / (batch_size * (batch_size - 1)), kernel.other[0, 0])

  def test_kernel_of_a_batch(self):
    x = np.random.default_rng(0).normal(size=(5, 2, 3, 7)) + 1
    kernel = Kernel.of(x)
    assert kernel.grid == (2, 3)
    np.testing.assert_allclose(kernel.second_moment, (x**2).mean())
    pairs = [(x[i] * x[j]).mean() for i, j in itertools.permutations(range(5), 2)]
    np.testing.assert_allclose(np.trace(kernel.other) / 6, np.mean(pairs))
    channels = x.reshape(-1, 7)
    np.testing.assert_allclose(kernel.variance(5), channels.var(0).mean())


def assert_mean(samples, expected):
  """Within four and a half standard errors, which must be small.

  The fourth moment of a gradient is infinite for the smallest batches, hence the rest.
  """
  error = samples.std() / len(samples) ** 0.5
  assert error < 0.05
  assert abs(samples.mean() - expected) < 4.5 * error + 1e-6, (samples.mean(), expected)


class TestPaths:
  def test_weights_are_those_of_an_enumeration(self):
    shares = np.random.default_rng(0).uniform(size=10)
    expected = np.zeros(11)
    for path in itertools.product([0, 1], repeat=10):
      weight = np.prod(np.where(path, shares, 1 - shares))
      expected[sum(path)] += weight
    weights = theory.path_weights(shares)
    np.testing.assert_allclose(weights, expected)
    np.testing.assert_allclose(weights.sum(), 1)
    np.testing.assert_allclose(theory.mean_path_length(weights), shares.sum())

  def test_weights_are_those_of_a_networks_paths(self):
    """Two blocks of factors 1 and 3 on the branch, and a factor on the sum."""
    blocks = [
      theory.Block((Layer(1.0),), alpha=alpha, sum_scale=0.7) for alpha in (1.0, 3.0)
    ]
    network = theory.Network(tuple(blocks))
    signal = theory.predict(network, Kernel.uniform(1.0, 0.0), 2)
    paths = np.array([1, 1 + 9, 9]) * 0.7**4
    np.testing.assert_allclose(signal.second_moment[-1], paths.sum())
    weights = theory.path_weights(signal.branch_share)
    np.testing.assert_allclose(weights, paths / paths.sum())


class TestDescribe:
  @pytest.mark.parametrize("scan", [True, False])
  def test_wide_resnet(self, scan):
    model = WideResNet(16, 2, 10, methods.get("batch_norm"), scan=scan)
    network = theory.describe(model, (4, 9, 9, 3))
    assert network.grid == (9, 9)
    assert network.stem == Layer(widening=16 / 3, size=3)
    names = [block.name for block in network.blocks]
    rest = "blocks/0" if scan else "block0"
    assert len(names) == 6 and names[:2] == ["stage1_first", f"stage1_rest/{rest}"]
    norm = BatchNorm(relu=True)
    assert network.blocks[2] == theory.Block(
      trunk=(norm,),
      shortcut=(Layer(widening=2.0, strides=2),),
      branch=(Layer(widening=2.0, size=3, strides=2), norm, Layer(size=3)),
      name="stage2_first",
    )
    assert network.blocks[3].trunk == network.blocks[3].shortcut == ()

  def test_resnet_starts_behind_its_max_pool(self):
    model = ResNet(50, 10, methods.get("skipinit"), symmetric_padding=True)
    network = theory.describe(model, (2, 64, 64, 3))
    assert (network.stem, network.grid, len(network.blocks)) == (None, (16, 16), 16)
    layer = functools.partial(Layer, symmetric=True)
    narrow, strided, wide = layer(2.0, 0.5), layer(size=3, strides=2), layer(2.0, 4.0)
    assert network.blocks[3] == theory.Block(
      trunk=(ReLU(),),
      shortcut=(layer(widening=2.0, strides=2),),
      branch=(narrow, ReLU(), strided, ReLU(), wide),
      alpha=0.0,
      name="stage2_first",
    )

  def test_residual_mlp_with_fixup(self):
    model = ResidualMLP(4, 32, 10, methods.get("fixup"), layers_per_block=3)
    network = theory.describe(model, (2, 8, 8, 1))
    assert network.grid == (1, 1)
    assert network.stem == Layer(2.0 * 64 / 32, widening=0.5)
    layers = [step for step in network.blocks[0].branch if isinstance(step, Layer)]
    assert [layer.weight_variance for layer in layers] == [1.0, 1.0, 0.0]


IMAGES = np.zeros((2, 32, 32, 3))
UNNORMALIZED = methods.get("unnormalized")


@pytest.mark.parametrize(
  ("run", "message"),
  [
    (lambda: theory.path_weights([0.5, 1.5]), "branch_share"),
    (lambda: theory.path_weights([[0.5]]), "branch_share"),
    (lambda: theory.path_weights([math.nan]), "branch_share"),
    (lambda: theory.uniform(UNNORMALIZED, 0), "num_blocks is 0"),
    (lambda: theory.uniform(UNNORMALIZED, 2, transitions={3}), "transitions holds 3"),
    (
      lambda: predict(change("batch_norm", normalizer=nn.InstanceNorm), 3),
      "does not know the normalizer .*InstanceNorm",
    ),
    (
      lambda: predict(change("unnormalized", activation=nn.gelu), 3),
      "does not know the activation",
    ),
    (
      lambda: predict(change("skipinit", kernel_init=nn.initializers.ones), 3),
      "does not know the initializer",
    ),
    (
      lambda: theory.describe(ResNet(50, 9, UNNORMALIZED, 1), IMAGES.shape),
      "version 1",
    ),
    (
      lambda: theory.describe(
        ResNet(50, 9, UNNORMALIZED, average_projection=True), IMAGES.shape
      ),
      "means of pixels",
    ),
    (lambda: theory.predict_model(ResNet(50, 9, UNNORMALIZED), IMAGES), "max pool"),
    (lambda: predict("unnormalized", 2, batch_size=1), r"has 1 example\(s\)"),
    (lambda: predict("batch_norm", 2, batch_size=3), "fewer than 4 different examples"),
    (lambda: predict("batch_norm", 2, cosine=1.0), "different examples"),
    (lambda: Kernel.uniform(0.0, 0.0), "second_moment is 0.0"),
    (lambda: Kernel.uniform(1.0, 1.1), "cosine is 1.1"),
    (lambda: Kernel.of(np.zeros((2, 3, 4))), "have shape"),
    (lambda: Kernel.of(np.zeros((1, 3))), "need at least 2"),
    (
      lambda: theory.predict(
        theory.uniform(UNNORMALIZED, 1), Kernel.uniform(1.0, 0.0, (2, 2)), 2
      ),
      r"grid of \(2, 2\)",
    ),
    (
      lambda: theory.predict(theory.Network(()), Kernel.uniform(1.0, 0.0), 2),
      "no residual blocks",
    ),
  ],
)
def test_bad_input(run, message):
  with pytest.raises(UsageError, match=message):
    run()
