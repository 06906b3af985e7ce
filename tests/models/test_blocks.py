"""Residual blocks, against functions written out in `jax.lax`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

from skipinit_jax.errors import UsageError
from skipinit_jax.layers import LayerScale, SkipInit, identity
from skipinit_jax.models import (
  BasicBlock,
  BottleneckBlock,
  FullyConnectedBlock,
  PostActivationBasicBlock,
  PostActivationBottleneckBlock,
)

EPSILON = 1e-3
BatchNorm = functools.partial(
  nn.BatchNorm, use_running_average=False, momentum=0.9, epsilon=EPSILON
)


class UnitVariance(nn.Module):
  """A normalizer of a user, without parameters or fields."""

  @nn.compact
  def __call__(self, x):
    return x / jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPSILON)


NORMALIZERS = {
  "none": None,
  "batch": BatchNorm,
  "group": functools.partial(nn.GroupNorm, num_groups=2),
  "layer": nn.LayerNorm,
  "user": UnitVariance,
  "user_function": lambda name: UnitVariance(name=name),
}


def images(features, size=6):
  generator = np.random.default_rng(features)
  return generator.normal(1, 2, (3, size, size + 1, features)).astype(np.float32)


def random_variables(module, x):
  """Variables of which none has a value that would hide its place."""
  generator = np.random.default_rng(0)
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)
  return jax.tree.map(
    lambda leaf: generator.normal(0.3, 0.4, leaf.shape).astype(np.float32), shapes
  )


@functools.partial(jax.jit, static_argnums=0)
def apply(module, variables, x):
  return module.apply(variables, x, mutable=["batch_stats"])[0]


class ByHand:
  """The parts of a block as plain functions of its parameters; absent parts do nothing.

  It remembers what it used, so that a test sees what it did not.
  """

  def __init__(self, params, activation=jax.nn.relu):
    self.params = params
    self.activation = activation
    self.used = set()

  def get(self, name, default):
    self.used.add(name)
    return self.params.get(name, default)

  def bias(self, x, name):
    return x + self.get(name, {"bias": 0.0})["bias"]

  def norm(self, x, name):
    params = self.get(name, None)
    if params is None:
      return x
    axes = tuple(range(x.ndim - 1))
    normal = (x - x.mean(axes)) / jnp.sqrt(x.var(axes) + EPSILON)
    return normal * params["scale"] + params["bias"]

  def conv(self, x, name, strides=1):
    params = self.get(name, None)
    y = lax.conv_general_dilated(
      x,
      params["kernel"],
      (strides, strides),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + params.get("bias", 0.0)

  def activate(self, x, index):
    x = self.bias(self.norm(x, f"norm{index}"), f"activation_bias{index}")
    return self.bias(self.activation(x), f"layer_bias{index}")

  def end(self, branch):
    branch = self.norm(branch, "last_norm")
    alpha = self.get("branch_scale", {"alpha": 1.0})["alpha"]
    return self.bias(branch * alpha, "branch_bias")


def basic(p, x, strides):
  y = p.activate(x, 1)
  shortcut = p.conv(y, "projection", strides) if "projection" in p.params else x
  y = p.activate(p.conv(y, "conv1", strides), 2)
  return shortcut, p.end(p.conv(y, "conv2"))


def bottleneck(p, x, strides):
  y = p.activate(x, 1)
  shortcut = p.conv(y, "projection", strides) if "projection" in p.params else x
  y = p.activate(p.conv(y, "conv1"), 2)
  y = p.activate(p.conv(y, "conv2", strides), 3)
  return shortcut, p.end(p.conv(y, "conv3"))


def post_activation(p, x, strides):
  y = p.bias(x, "layer_bias1")
  shortcut = x
  if "projection" in p.params:
    shortcut = p.norm(p.conv(y, "projection", strides), "projection_norm")
  y = p.activate(p.conv(y, "conv1"), 2)
  y = p.activate(p.conv(y, "conv2", strides), 3)
  return shortcut, p.end(p.norm(p.conv(y, "conv3"), "norm4"))


def post_basic(p, x, strides):
  y = p.bias(x, "layer_bias1")
  shortcut = x
  if "projection" in p.params:
    shortcut = p.norm(p.conv(y, "projection", strides), "projection_norm")
  y = p.activate(p.conv(y, "conv1", strides), 2)
  return shortcut, p.end(p.norm(p.conv(y, "conv2"), "norm3"))


# Block, function, features of the block and of an input that it need not project.
BLOCKS = {
  "basic": (BasicBlock, basic, 4, 4),
  "bottleneck": (BottleneckBlock, bottleneck, 2, 8),
  "post": (PostActivationBottleneckBlock, post_activation, 2, 8),
  "post_basic": (PostActivationBasicBlock, post_basic, 4, 4),
}
# Strides, and whether the input has other features than the output.
SHAPES = {"identity": (1, False), "strides": (2, False), "features": (1, True)}
KINDS = {
  "plain": {},
  "batch_norm": {"normalizer": BatchNorm},
  "fixup": {"scalar_biases": True, "branch_scale": SkipInit},
  "everything": {
    "normalizer": BatchNorm,
    "last_normalizer": BatchNorm,
    "scalar_biases": True,
    "branch_scale": functools.partial(SkipInit, 0.5),
    "use_bias": True,
    "sum_scale": 0.6,
    "activation": jnp.tanh,
  },
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
  ("shape", "kind"),
  [
    *((shape, "everything") for shape in SHAPES),
    ("strides", "plain"),
    ("strides", "batch_norm"),
    ("strides", "fixup"),
  ],
)
def test_output(block, shape, kind):
  factory, function, features, inputs = BLOCKS[block]
  strides, other_features = SHAPES[shape]
  fields = KINDS[kind]
  x = images(inputs + 2 * other_features)
  module = factory(features, strides, **fields)
  variables = random_variables(module, x)
  hand = ByHand(variables["params"], fields.get("activation", jax.nn.relu))

  @jax.jit
  def expected(x):
    total = sum(function(hand, x, strides)) * fields.get("sum_scale", 1.0)
    return hand.activation(total) if block.startswith("post") else total

  output = apply(module, variables, x)
  assert output.shape == (3, 6 // strides, -(-7 // strides), inputs)
  np.testing.assert_allclose(output, expected(x), rtol=1e-3, atol=1e-3)
  assert ("projection" in variables["params"]) == (shape != "identity")
  assert set(variables["params"]) <= hand.used


def scalars(params):
  return {name for name in params if params[name].get("bias", np.ones(1)).ndim == 0}


@pytest.mark.parametrize(
  ("block", "biases"),
  [
    # One before each activation, one before each layer, one at the end.
    (
      BasicBlock,
      {"activation_bias1", "layer_bias1", "activation_bias2", "layer_bias2"},
    ),
    (
      BottleneckBlock,
      {f"{kind}_bias{i}" for kind in ("activation", "layer") for i in (1, 2, 3)},
    ),
    # Zhang, Dauphin & Ma's basic block: 1a, 1b, 2a, and 2b at the end.
    (
      PostActivationBasicBlock,
      {"layer_bias1", "activation_bias2", "layer_bias2"},
    ),
    # Zhang, Dauphin & Ma's bottleneck: 1a, 1b, 2a, 2b, 3a, and 3b at the end.
    (
      PostActivationBottleneckBlock,
      {"layer_bias1", "activation_bias2", "layer_bias2", "activation_bias3"}
      | {"layer_bias3"},
    ),
  ],
)
@pytest.mark.parametrize("strides", [1, 2])
def test_fixup_has_these_scalars(block, biases, strides):
  module = block(4, strides, scalar_biases=True, branch_scale=SkipInit)
  params = jax.eval_shape(module.init, jax.random.key(0), images(16))["params"]
  assert scalars(params) == biases | {"branch_bias"}
  assert params["branch_scale"]["alpha"].shape == ()


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_output_of_fully_connected_block(num_layers, kind):
  fields = KINDS[kind]
  x = np.random.default_rng(0).normal(1, 2, (5, 6)).astype(np.float32)
  module = FullyConnectedBlock(6, num_layers=num_layers, **fields)
  variables = random_variables(module, x)
  hand = ByHand(variables["params"], fields.get("activation", jax.nn.relu))
  y = x
  for index in range(1, num_layers + 1):
    dense = hand.get(f"dense{index}", None)
    y = hand.activate(y, index) @ dense["kernel"] + dense.get("bias", 0.0)
  expected = (x + hand.end(y)) * fields.get("sum_scale", 1.0)
  np.testing.assert_allclose(
    apply(module, variables, x), expected, rtol=1e-4, atol=1e-4
  )
  assert set(variables["params"]) <= hand.used


@pytest.mark.parametrize(
  ("block", "normalizer"),
  [
    *((block, "batch") for block in BLOCKS),
    *(("fully_connected", normalizer) for normalizer in NORMALIZERS),
  ],
)
def test_skipinit_block_starts_as_its_shortcut(block, normalizer):
  if block == "fully_connected":
    factory, features, x = FullyConnectedBlock, 6, images(6)[:, 0, 0]
  else:
    factory, _, features, inputs = BLOCKS[block]
    x = images(inputs)
  module = factory(features, normalizer=NORMALIZERS[normalizer], branch_scale=SkipInit)
  variables = random_variables(module, x)
  # Whatever the other parameters are.
  variables["params"]["branch_scale"]["alpha"] = SkipInit.initial_value
  expected = nn.relu(x) if block.startswith("post") else x
  np.testing.assert_array_equal(apply(module, variables, x), expected)


@pytest.mark.parametrize("block", [*BLOCKS, "fully_connected"])
def test_a_last_scale_of_zero_makes_the_shortcut_and_learns(block):
  factory, features, x = FullyConnectedBlock, 6, images(6)[:, 0, 0]
  if block != "fully_connected":
    factory, _, features, inputs = BLOCKS[block]
    x = images(inputs)
  zero = functools.partial(BatchNorm, scale_init=nn.initializers.zeros)
  module = factory(features, normalizer=BatchNorm, last_normalizer=zero)
  variables = random_variables(module, x)
  name = {"post": "norm4", "post_basic": "norm3"}.get(block, "last_norm")
  last = variables["params"][name]
  last.update(scale=0 * last["scale"], bias=0 * last["bias"])
  expected = nn.relu(x) if block.startswith("post") else x
  np.testing.assert_array_equal(apply(module, variables, x), expected)
  weights = np.random.default_rng(1).normal(size=x.shape)

  def product(scale):
    last["scale"] = scale
    return (apply(module, variables, x) * weights).sum()

  # Before an activation it would have no gradient at zero.
  assert np.all(jax.grad(product)(last["scale"]))


@pytest.mark.parametrize("block", [*BLOCKS, "fully_connected"])
def test_each_layer_has_its_initializer(block):
  if block == "fully_connected":
    factory, features, x = FullyConnectedBlock, 6, np.ones((5, 6), np.float32)
    options = {"num_layers": 3}
  else:
    factory, _, features, inputs = BLOCKS[block]
    x = images(inputs)
    options = {"strides": 2, "projection_init": nn.initializers.constant(3)}
  module = factory(
    features,
    **options,
    kernel_init=nn.initializers.constant(1),
    last_kernel_init=nn.initializers.constant(2),
  )
  params = jax.jit(module.init)(jax.random.key(0), x)["params"]
  last = max(name for name in params if name != "projection")
  for name, layer in params.items():
    value = {last: 2, "projection": 3}.get(name, 1)
    np.testing.assert_array_equal(layer["kernel"], value)
  assert len(params) == {"bottleneck": 4, "post": 4}.get(block, 3)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("normalizer", [None, nn.LayerNorm])
def test_dtypes(block, normalizer):
  factory, _, features, inputs = BLOCKS[block]
  bfloat16 = jnp.dtype("bfloat16")
  if normalizer is not None:
    normalizer = functools.partial(normalizer, dtype=bfloat16, param_dtype=bfloat16)
  fields = {"normalizer": normalizer, "scalar_biases": True, "use_bias": True}
  x = images(inputs).astype(bfloat16)

  def dtypes(**options):
    module = factory(features, 2, branch_scale=SkipInit, **fields, **options)
    output, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    names = [name for name in variables["params"] if "norm" not in name]
    leaves = jax.tree.leaves(
      [variables["params"][n] for n in names if n[-5:] != "scale"]
    )
    return output.dtype, {leaf.dtype for leaf in leaves}

  assert dtypes(dtype=bfloat16) == (bfloat16, {jnp.dtype("float32")})
  assert dtypes(dtype=bfloat16, param_dtype=bfloat16) == (bfloat16, {bfloat16})


def test_bfloat16_block_keeps_its_dtype_with_a_normalizer_that_widens():
  block = PostActivationBottleneckBlock(
    2, normalizer=lambda name: Widen(name=name), dtype=jnp.bfloat16
  )
  x = jnp.ones((1, 4, 4, 8), jnp.bfloat16)
  output = jax.eval_shape(lambda: block.init_with_output(jax.random.key(0), x)[0])
  assert output.dtype == jnp.bfloat16


class Widen(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x.astype(jnp.float32)


def test_fully_connected_block_names_what_it_cannot_do():
  with pytest.raises(UsageError, match="has 4 features, but its input has 1"):
    FullyConnectedBlock(4).init(jax.random.key(0), jnp.ones((2, 1)))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      {"normalizer": nn.LayerNorm()},
      r"normalizer is a LayerNorm that is made already: give its class, LayerNorm, or",
    ),
    (
      {"normalizer": nnx.LayerNorm},
      "normalizer is nnx.LayerNorm, of Flax NNX, .*: give flax.linen.LayerNorm",
    ),
    (
      {"normalizer": functools.partial(nnx.GroupNorm, num_groups=2)},
      "normalizer is nnx.GroupNorm, .*: give flax.linen.GroupNorm",
    ),
    (
      {"branch_scale": 0.0},
      r"branch_scale is 0.0: .* such as functools.partial\(layers.SkipInit, 0.0\)",
    ),
    ({"normalizer": True}, "normalizer is True: .* such as flax.linen.LayerNorm"),
  ],
)
def test_what_is_no_factory_is_one_sentence(fields, message):
  with pytest.raises(UsageError, match=message):
    BasicBlock(4, **fields)


class OwnScale(nn.Module):
  """SkipInit as a user may write it, which blocks apply to the branch itself."""

  initial_value: float
  shape: tuple[int, ...] = ()

  @nn.compact
  def __call__(self, x):
    return x * self.param(
      "scale" if self.shape else "alpha",
      nn.initializers.constant(self.initial_value),
      self.shape,
    )


@pytest.mark.parametrize(
  ("scale", "own"),
  [
    (functools.partial(SkipInit, 0.5), functools.partial(OwnScale, 0.5)),
    (functools.partial(LayerScale, 0.5), functools.partial(OwnScale, 0.5, (4,))),
  ],
)
@pytest.mark.parametrize("block", [BasicBlock, FullyConnectedBlock])
@pytest.mark.parametrize("scalar_biases", [False, True])
def test_a_scale_in_the_last_layer_is_one_behind_it(block, scale, own, scalar_biases):
  x = images(4)[:, 0, 0] if block is FullyConnectedBlock else images(4)
  blocks = [
    block(4, use_bias=True, scalar_biases=scalar_biases, branch_scale=each)
    for each in (scale, own)
  ]
  params = random_variables(blocks[0], x)["params"]

  @jax.jit
  def both(params, x):
    def value(block, params, x):
      return jnp.sin(block.apply({"params": params}, x)).sum()

    gradient = jax.value_and_grad(value, (1, 2))
    return [gradient(block, params, x) for block in blocks]

  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-3),
    *both(params, x),
  )


@pytest.mark.parametrize("scale", [SkipInit, LayerScale])
@pytest.mark.parametrize("block", [BasicBlock, FullyConnectedBlock])
def test_a_scale_keeps_no_activations(block, scale):
  x = images(8)[:, 0, 0] if block is FullyConnectedBlock else images(8)

  def kept(branch_scale):
    module = block(8, branch_scale=branch_scale)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    _, residuals = jax.eval_shape(lambda v: jax.vjp(module.apply, v, x), variables)
    return [leaf.shape for leaf in jax.tree.leaves(residuals)].count(x.shape)

  assert kept(scale) == kept(None)
  # The measure sees what a scale behind the branch keeps.
  assert kept(functools.partial(OwnScale, 0.5)) == kept(None) + 1


def test_average_projection_is_of_the_means_of_windows():
  block = BottleneckBlock(2, 2, average_projection=True, activation=identity)
  x = np.random.default_rng(0).normal(size=(1, 5, 4, 3)).astype(np.float32)
  variables = block.init(jax.random.key(0), x)
  params = variables["params"]
  params["conv3"]["kernel"] *= 0
  # The last window of an odd size has one row.
  means = [[x[0, i : i + 2, j : j + 2].mean((0, 1)) for j in (0, 2)] for i in (0, 2, 4)]
  expected = np.array(means) @ params["projection"]["kernel"][0, 0]
  np.testing.assert_allclose(block.apply(variables, x)[0], expected, atol=1e-5)
