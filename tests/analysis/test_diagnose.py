"""Verdicts on predicted signals, on measured networks, and on a user's own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from skipinit_jax import analysis, methods
from skipinit_jax.analysis import (
  diagnose,
  diagnose_functions,
  diagnose_signal,
  measure,
  theory,
)
from skipinit_jax.errors import UsageError
from skipinit_jax.models import ResidualMLP


def verdict(name, depth, *, layers=1, cosine=0.0, **changes):
  method = dataclasses.replace(methods.get(name), **changes)
  network = theory.uniform(method, depth, layers_per_block=layers)
  return diagnose_signal(
    theory.predict(network, theory.Kernel.uniform(1.0, cosine), 64)
  )


@pytest.mark.parametrize(
  ("name", "depth"),
  [
    ("batch_norm", 300),
    ("skipinit", 1000),
    ("skipinit_inverse_sqrt_depth", 1000),
    ("fixup", 1000),
    ("nf_resnet", 1000),
    ("rezero", 1000),
    ("layer_scale", 1000),
    ("unnormalized", 6),
    ("divide_by_sqrt2", 16),
    ("batch_norm_divide_by_sqrt2", 16),
  ],
)
def test_networks_that_train_are_healthy(name, depth):
  diagnosis = verdict(name, depth, layers=2 if name == "fixup" else 1)
  assert diagnosis.healthy
  assert (diagnosis.alpha, diagnosis.advice) == (None, ())
  assert f"passes all {depth} blocks" in str(diagnosis)


def test_doubling_explodes():
  diagnosis = verdict("unnormalized", 100)
  (forward,) = diagnosis.faults
  assert (forward.kind, forward.direction) == ("explodes", "forward")
  # It is the first block that gives the stream its size.
  harmless = int(np.log2(analysis.FORWARD_LIMIT)) + 1
  assert (forward.block, forward.harmless_depth) == (harmless + 1, harmless)
  assert forward.name == str(harmless + 1)
  np.testing.assert_allclose(forward.value, 2.0**99)
  # A quarter as deep, Adam undoes it.
  assert not diagnosis.healthy_with_adam
  assert verdict("unnormalized", 25).healthy_with_adam
  np.testing.assert_allclose(diagnosis.alpha, 0.1)
  assert "Start each branch at 0.1 times its present size, or at 0" in str(diagnosis)


@pytest.mark.parametrize("sum_scale", [1.0, 0.5**0.5, 0.5])
def test_a_unit_of_the_stream_means_nothing(sum_scale):
  """With one weight, and a normalizer before the head, all three are one network."""
  method = dataclasses.replace(methods.get("unnormalized"), sum_scale=sum_scale)
  network = theory.uniform(method, 20)
  signal = theory.predict(network, theory.Kernel.uniform(1.0, 0.0), 64)
  np.testing.assert_allclose(signal.relative_sensitivity, 1)
  np.testing.assert_allclose(
    signal.relative_gradient, (2 * sum_scale**2) ** np.arange(20.0, -1, -1)
  )
  assert diagnose_signal(signal).healthy == (sum_scale == 0.5**0.5)
  behind_a_normalizer = diagnose_signal(dataclasses.replace(signal, head=0.0))
  assert behind_a_normalizer.healthy
  # Adam undoes what only grows or shrinks.
  assert diagnose_signal(signal).healthy_with_adam
  if sum_scale == 1:
    assert "which the head does not see" in str(behind_a_normalizer)


@pytest.mark.parametrize("name", ["unnormalized", "divide_by_sqrt2"])
def test_advice_helps(name):
  diagnosis = verdict(name, 200)
  repaired = verdict(name, 200, alpha=diagnosis.alpha, sum_scale=1.0)
  assert not diagnosis.healthy and repaired.healthy
  assert verdict(name, 200, alpha=0.0, sum_scale=1.0).healthy
  np.testing.assert_allclose(repaired.forward_growth, np.e, rtol=0.01)


@pytest.mark.parametrize(
  ("name", "kind", "direction", "advice"),
  [
    ("unnormalized", "explodes", "forward", "Start each branch at"),
    ("divide_by_sqrt2", "loses its inputs", "forward", "second moment by 0.5 in each"),
    ("batch_norm_divide_by_sqrt2", "explodes", "backward", "Leave the sum of"),
  ],
)
def test_shallower_networks_are_healthy(name, kind, direction, advice):
  diagnosis = verdict(name, 200)
  fault, *others = diagnosis.faults
  assert (fault.kind, fault.direction) == (kind, direction)
  # Division keeps the second moment, and normalization the distance of the inputs.
  assert bool(others) == (name == "unnormalized")
  assert advice in str(diagnosis)
  assert verdict(name, fault.harmless_depth).healthy
  assert not verdict(name, fault.harmless_depth + 1).healthy


def test_a_gradient_that_overflows_alone():
  """As behind sin(k x), whose second moment is bounded and whose derivative is not."""
  network = theory.uniform(methods.get("skipinit"), 20)
  signal = theory.predict(network, theory.Kernel.uniform(1.0, 0.0), 64)
  gradient = np.array(signal.gradient_second_moment)
  gradient[:15], gradient[:3] = np.inf, np.nan
  diagnosis = diagnose_signal(signal.replace(gradient_second_moment=gradient))
  (fault,) = diagnosis.faults
  assert (fault.kind, fault.direction, fault.block) == ("explodes", "backward", 15)


def test_inputs_that_are_equal_are_not_the_networks_fault():
  diagnosis = verdict("skipinit", 5, cosine=0.999)
  (fault,) = diagnosis.faults
  assert (fault.block, fault.harmless_depth, fault.name) == (0, 0, "")
  assert "cosine similarity of 1 - 0.001" in str(diagnosis)
  assert diagnosis.advice == ("Center the inputs over the examples.",)


def images(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_a_signal_that_overflows():
  """Twice the depth at which the squares of float32 end, and more than the features."""
  x = images(8, 16)
  model = ResidualMLP(300, 16, 2, methods.get("skipinit_one"))
  variables = model.init(jax.random.key(0), x, train=True)
  # In the mode that trains it.
  diagnosis = diagnose(model, variables, x)
  fault = diagnosis.faults[0]
  assert (fault.kind, fault.direction, fault.value) == ("explodes", "forward", np.inf)
  assert 5 < fault.harmless_depth < 40
  assert 0.03 < diagnosis.alpha < 0.1
  assert "an infinite factor" in str(diagnosis)


class OwnBlock(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x + 2 * nn.Dense(x.shape[-1], use_bias=False, name="last")(x)


class OwnNetwork(nn.Module):
  num_blocks: int

  @nn.compact
  def __call__(self, x):
    for index in range(self.num_blocks):
      x = OwnBlock(name=f"layer_{index}")(x)
    return x


def test_a_users_network():
  x, model = images(8, 128), OwnNetwork(8)
  variables = jax.jit(model.init)(jax.random.key(0), x)
  run = functools.partial(diagnose, model, variables, x)
  diagnosis = run(blocks=measure.Blocks(OwnBlock))
  fault = diagnosis.faults[0]
  # 5^5 is the first power above the limit, counted from behind the first block.
  assert (fault.kind, fault.block, fault.name) == ("explodes", 6, "layer_5")
  np.testing.assert_allclose(diagnosis.alpha, 1 / np.sqrt(8 * 4), rtol=0.1)
  # What it judged: a factor of five in each block.
  moments = diagnosis.signal.second_moment
  np.testing.assert_allclose(moments[1:], moments[:-1] * 5, rtol=0.2)
  assert diagnosis.forward_growth == moments[-1] / moments[1]
  with pytest.raises(UsageError, match="no residual blocks of class ResidualBlock"):
    run()
  with pytest.raises(UsageError, match=r"has 1 example\(s\)"):
    diagnose(model, variables, x[:1], blocks=measure.Blocks("layer_*"))


def normalize(x):
  x -= x.mean(-1, keepdims=True)
  return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-12)


class TestFunctions:
  """Networks of plain JAX."""

  def weights(self, count, width=64):
    shape = (count, width, width)
    kernels = np.random.default_rng(1).normal(size=shape) * (2 / width) ** 0.5
    return list(kernels.astype(np.float32))

  def blocks(self, count, norm=lambda x: x, scale=1.0):
    return [
      lambda x, w=w: scale * (x + jax.nn.relu(norm(x)) @ w) for w in self.weights(count)
    ]

  def test_numbers_are_those_of_a_module(self):
    x, model = images(8, 64), OwnNetwork(3)
    variables = model.init(jax.random.key(0), x)
    expected = measure.signal(model, variables, x, blocks=measure.Blocks(OwnBlock))
    kernels = [variables["params"][f"layer_{i}"]["last"]["kernel"] for i in range(3)]
    actual = measure.signal_of_functions(
      [lambda x, w=w: x + 2 * (x @ w) for w in kernels],
      x,
      branches=[lambda x, w=w: 2 * (x @ w) for w in kernels],
      names=expected.names,
    )
    leaves = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for value, of_module in leaves:
      np.testing.assert_allclose(value, of_module, rtol=1e-4)
    assert actual.names == expected.names

  def test_the_size_of_the_first_input_is_arbitrary_where_branches_are_normalized(self):
    x, blocks = images(32, 64), self.blocks(12, normalize)
    ordinary = diagnose_functions(blocks, x)
    small = diagnose_functions(blocks, 1e-3 * x)
    assert ordinary.healthy and small.healthy
    # The first branch amplifies, and nothing else does.
    assert small.gradient_growth > 1e5 * ordinary.gradient_growth
    np.testing.assert_allclose(
      small.sensitivity_growth, ordinary.sensitivity_growth, rtol=0.5
    )
    # The second moment grows by one at each block, from the first one's.
    np.testing.assert_allclose(small.forward_growth, 12, rtol=0.2)

  def test_a_normalizer_before_the_head(self):
    """Elasticities against differences of the spread of the head's outputs."""
    x, readout = images(32, 64), images(64, 4)
    # A second moment times 18 in each block.
    blocks = self.blocks(4, scale=3.0)
    y = functools.reduce(lambda x, block: block(x), blocks, x)
    y /= jnp.sqrt(jnp.square(y).mean())
    for head in (
      lambda x: normalize(x) @ readout,
      lambda x: x @ readout + 5,
      lambda x: jax.nn.sigmoid(x @ readout / 8),
      # A classifier of zeros says nothing.
      lambda x: 0 * x[:, :1],
    ):
      spread = [
        (head(size * y) - head(size * y).mean(0)).std() for size in (0.99, 1.01)
      ]
      elasticity = (
        np.log(spread[1] / spread[0]) / np.log(1.01 / 0.99) if any(spread) else 1
      )
      diagnosis = diagnose_functions(blocks, x, head=head)
      np.testing.assert_allclose(diagnosis.head, elasticity, rtol=0.01, atol=1e-4)
      assert diagnosis.healthy == (elasticity < 0.1)
      assert diagnosis.forward_growth > analysis.FORWARD_LIMIT

  def test_advice_where_branches_are_correlated_with_the_skip_path(self):
    """The means behind a ReLU add up from block to block."""
    x = images(32, 64)

    def network(alpha):
      return [lambda x, w=w: x + alpha * jax.nn.relu(x @ w) for w in self.weights(20)]

    diagnosis = diagnose_functions(network(1.0), x)
    assert "from block 9 on" in str(diagnosis)
    # Nothing follows the sum.
    assert [advice.split()[0] for advice in diagnosis.advice] == ["Start"]
    assert diagnose_functions(network(diagnosis.alpha), x).healthy
    # This would do if they were not correlated.
    assert diagnosis.alpha < 20**-0.5 / 2

  @pytest.mark.parametrize("post_norm", [True, False])
  def test_tokens_that_become_alike(self, post_norm):
    """Each block adds what attention of equal weights does: an image of the mean."""
    tokens, depth = 4, 14
    images_of_mean = [
      lambda x, w=w: normalize(x).mean(1, keepdims=True) @ w / 16
      for w in np.random.default_rng(1).normal(size=(depth, 256, 256))
    ]
    behind = normalize if post_norm else lambda x: x
    blocks = [lambda x, f=f: behind(x + f(x)) for f in images_of_mean]
    if not post_norm:
      blocks.append(lambda x: x.mean(1))
    signal = measure.signal_of_functions(blocks, images(64, tokens, 256))
    diagnosis = diagnose_signal(signal)
    if not post_norm:
      assert diagnosis.healthy
      assert np.isnan(signal.position_cosine[depth:]).all()
      return
    # The mean's part over the rest is 1 / 3 for four tokens, and doubles each time.
    ratio = 2.0 ** np.arange(1, depth + 1) / (tokens - 1)
    expected = tokens / (tokens - 1) / (1 + ratio)
    distance = 1 - signal.position_cosine
    np.testing.assert_allclose(distance, expected, rtol=0.1)
    (fault,) = diagnosis.faults
    harmless = int((distance >= analysis.POSITION_LIMIT).sum())
    assert (fault.kind, fault.harmless_depth) == ("loses its positions", harmless)
    assert "two of one input" in str(diagnosis)
    assert diagnosis.healthy_with_adam
    worse = signal.replace(position_cosine=1 - distance**2)
    assert not diagnose_signal(worse).healthy_with_adam

  def test_a_gradient_that_reaches_the_first_token_alone(self):
    """The first token sees itself, and each other one the mean of those up to it."""
    tokens, depth = 8, 20
    count = jnp.arange(1, tokens + 1)[:, None]

    def network(normalize_sum):
      return [
        lambda x, w=w: normalize_sum(x + x.cumsum(1) / count @ w)
        for w in np.random.default_rng(1).normal(size=(depth, 128, 128)) / 128**0.5
      ]

    signal = measure.signal_of_functions(network(normalize), images(32, tokens, 128))
    # White noise behind the last block.
    np.testing.assert_allclose(signal.gradient_spread[-1], 1 - 1 / tokens, rtol=0.02)
    fault = diagnose_signal(signal).faults[-1]
    reached = signal.gradient_spread >= analysis.SPREAD_LIMIT
    assert (fault.kind, fault.direction) == ("loses its positions", "backward")
    assert fault.block == depth - reached.sum() == depth - fault.harmless_depth
    assert "it is at one of them" in str(fault)
    assert not diagnose_signal(signal).healthy_with_adam
    shallow = network(normalize)[: fault.harmless_depth - 2]
    assert diagnose_functions(shallow, images(32, tokens, 128)).healthy

  def test_a_network_may_read_one_position(self):
    signal = measure.signal_of_functions(
      self.blocks(4, normalize), images(8, 4, 64), loss=lambda y: y[:, -1].sum()
    )
    np.testing.assert_allclose(signal.gradient_spread, 0, atol=1e-6)
    assert diagnose_signal(signal).healthy

  def test_a_loss_is_differentiated_and_the_head_seen_nevertheless(self):
    signal = measure.signal_of_functions(
      self.blocks(2), images(8, 64), head=normalize, loss=lambda y: jnp.square(y).sum()
    )
    # The normalizer's output has a square sum that nothing changes.
    np.testing.assert_allclose(signal.head, 0, atol=1e-4)
    assert np.all(signal.gradient_second_moment < 1e-6)

  def test_a_network_of_equinox(self):
    """Its modules are functions of one example."""
    import equinox as eqx

    class Block(eqx.Module):
      layer: eqx.nn.Linear

      def __call__(self, x):
        return x + 3 * self.layer(x)

    head_key, *keys = jax.random.split(jax.random.key(0), 13)
    blocks = [Block(eqx.nn.Linear(32, 32, key=key)) for key in keys]
    head = jax.vmap(eqx.nn.Linear(32, 10, key=head_key))
    diagnosis = diagnose_functions(
      list(map(jax.vmap, blocks)), images(32, 32), head=head
    )
    assert [fault.kind for fault in diagnosis.faults] == ["explodes"]

  @pytest.mark.parametrize(
    ("changes", "message"),
    [
      ({"blocks": []}, "blocks is empty"),
      ({"blocks": 3}, "blocks is 3: it must be a list of functions"),
      ({"blocks": [normalize, 1]}, "blocks is .*: it must be a list of functions"),
      ({"branches": [normalize]}, "branches has 1 entries: there are 2 blocks"),
      ({"names": "abc"}, "names has 3 entries"),
      ({"x": images(1, 4)}, r"has 1 example\(s\)"),
      ({"x": np.ones((4, 4), np.int32)}, "input of block '1' has dtype int32.*embed"),
      ({"blocks": [lambda x: {"y": x}]}, "output of block '1' is a dict"),
    ],
  )
  def test_bad_input(self, changes, message):
    arguments = {"blocks": [normalize] * 2, "x": images(4, 4)} | changes
    with pytest.raises(UsageError, match=message):
      diagnose_functions(**arguments)


@pytest.mark.parametrize("train", [True, False])
def test_the_mode_that_is_given_counts(train):
  model = ResidualMLP(2, 8, 3, "batch_norm")
  x = jax.random.normal(jax.random.key(0), (8, 5))
  variables = model.init(jax.random.key(1), x, train=False)
  actual = diagnose(model, variables, x, train=train).signal.second_moment
  expected = measure.signal(model, variables, x, train=train).second_moment
  np.testing.assert_array_equal(actual, expected)
  other = measure.signal(model, variables, x, train=not train).second_moment
  assert not np.allclose(actual, other, rtol=1e-3)
