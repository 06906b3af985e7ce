"""Residual blocks, against functions written out in `jax.lax`."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

from skipinit_jax import nnx as native
from skipinit_jax.errors import UsageError
from skipinit_jax.layers import LayerScale, SkipInit, identity
from skipinit_jax.models import (
  AttentionBlock,
  BasicBlock,
  BottleneckBlock,
  FullyConnectedBlock,
  MLPBlock,
  PostActivationBasicBlock,
  PostActivationBottleneckBlock,
)
from tests.models.common import random_variables

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


def images(features):
  generator = np.random.default_rng(features)
  return generator.normal(1, 2, (3, 6, 7, features)).astype(np.float32)


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

  def dense(self, x, name):
    params = self.get(name, None)
    return x @ params["kernel"] + params.get("bias", 0.0)

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


def post_bottleneck(p, x, strides):
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


def dense(p, x, strides):
  y = x
  for index in range(1, 1 + sum(name.startswith("dense") for name in p.params)):
    y = p.dense(p.activate(y, index), f"dense{index}")
  return x, p.end(y)


# Block, function, and the features of the block's output.
BLOCKS = {
  "basic": (functools.partial(BasicBlock, 4), basic, 4),
  "bottleneck": (functools.partial(BottleneckBlock, 2), bottleneck, 8),
  "post": (functools.partial(PostActivationBottleneckBlock, 2), post_bottleneck, 8),
  "post_basic": (functools.partial(PostActivationBasicBlock, 4), post_basic, 4),
  "dense": (functools.partial(FullyConnectedBlock, 6, num_layers=3), dense, 6),
  "dense_one": (functools.partial(FullyConnectedBlock, 6), dense, 6),
}
CONVOLUTIONAL = [name for name in BLOCKS if not name.startswith("dense")]


def example(block, **fields):
  """A block, and an input that it need not project."""
  make, _, features = BLOCKS[block]
  x = images(features)
  return make(**fields), x if block in CONVOLUTIONAL else x[:, 0, 0]


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


@pytest.mark.parametrize(
  ("block", "shape", "kind"),
  [
    *((block, shape, "everything") for block in CONVOLUTIONAL for shape in SHAPES),
    *(
      (block, "strides", kind)
      for block in CONVOLUTIONAL
      for kind in ("plain", "batch_norm", "fixup")
    ),
    *((block, "identity", kind) for block in ("dense", "dense_one") for kind in KINDS),
  ],
)
def test_output(block, shape, kind):
  strides, other_features = SHAPES[shape]
  fields = KINDS[kind]
  module, x = example(block, **fields, **({"strides": strides} if strides > 1 else {}))
  if other_features:
    x = images(x.shape[-1] + 2)
  variables = random_variables(module, x)
  hand = ByHand(variables["params"], fields.get("activation", jax.nn.relu))
  _, function, _ = BLOCKS[block]

  @jax.jit
  def expected(x):
    total = sum(function(hand, x, strides)) * fields.get("sum_scale", 1.0)
    return hand.activation(total) if block.startswith("post") else total

  output = apply(module, variables, x)
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
def test_fixup_has_these_scalars(block, biases):
  module = block(4, 2, scalar_biases=True, branch_scale=SkipInit)
  params = jax.eval_shape(module.init, jax.random.key(0), images(16))["params"]
  assert scalars(params) == biases | {"branch_bias"}
  assert params["branch_scale"]["alpha"].shape == ()


@pytest.mark.parametrize(
  ("block", "normalizer"),
  [
    *((block, "batch") for block in CONVOLUTIONAL),
    *(("dense_one", normalizer) for normalizer in NORMALIZERS),
  ],
)
def test_skipinit_block_starts_as_its_shortcut(block, normalizer):
  module, x = example(block, normalizer=NORMALIZERS[normalizer], branch_scale=SkipInit)
  variables = random_variables(module, x)
  # Whatever the other parameters are.
  variables["params"]["branch_scale"]["alpha"] = SkipInit.initial_value
  expected = nn.relu(x) if block.startswith("post") else x
  np.testing.assert_array_equal(apply(module, variables, x), expected)


@pytest.mark.parametrize("block", [*CONVOLUTIONAL, "dense_one"])
def test_a_last_scale_of_zero_makes_the_shortcut_and_learns(block):
  zero = functools.partial(BatchNorm, scale_init=nn.initializers.zeros)
  module, x = example(block, normalizer=BatchNorm, last_normalizer=zero)
  variables = random_variables(module, x)
  name = {"post": "norm4", "post_basic": "norm3"}.get(block, "last_norm")
  # The other layers' initialization is not compiled, because nothing needs it.
  last = jax.jit(lambda key: module.init(key, x)["params"][name])(jax.random.key(0))
  variables["params"][name] = last
  expected = nn.relu(x) if block.startswith("post") else x
  np.testing.assert_array_equal(apply(module, variables, x), expected)
  weights = np.random.default_rng(1).normal(size=x.shape)

  def product(scale):
    last["scale"] = scale
    return (apply(module, variables, x) * weights).sum()

  # Before an activation it would have no gradient at zero.
  assert np.all(jax.grad(product)(last["scale"]))


@pytest.mark.parametrize("block", [*CONVOLUTIONAL, "dense"])
def test_each_layer_has_its_initializer(block):
  options = {"strides": 2, "projection_init": nn.initializers.constant(3)}
  module, x = example(
    block,
    **(options if block in CONVOLUTIONAL else {}),
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
  bfloat16 = jnp.dtype("bfloat16")
  if normalizer is not None:
    normalizer = functools.partial(normalizer, dtype=bfloat16, param_dtype=bfloat16)
  fields = {"normalizer": normalizer, "scalar_biases": True, "use_bias": True}

  def dtypes(**options):
    module, x = example(block, branch_scale=SkipInit, **fields, **options)
    output, variables = jax.eval_shape(
      module.init_with_output, jax.random.key(0), x.astype(bfloat16)
    )
    params = variables["params"]
    layers = [params[n] for n in params if "norm" not in n and n != "branch_scale"]
    return output.dtype, {leaf.dtype for leaf in jax.tree.leaves(layers)}

  assert dtypes(dtype=bfloat16) == (bfloat16, {jnp.dtype("float32")})
  assert dtypes(dtype=bfloat16, param_dtype=bfloat16) == (bfloat16, {bfloat16})


def test_bfloat16_block_keeps_its_dtype_with_a_normalizer_that_widens():
  def widen(name):
    return lambda x: x.astype(jnp.float32)

  block, x = example("post", normalizer=widen, dtype=jnp.bfloat16)
  output, _ = jax.eval_shape(
    block.init_with_output, jax.random.key(0), x.astype(jnp.bfloat16)
  )
  assert output.dtype == jnp.bfloat16


@pytest.mark.parametrize("block", [FullyConnectedBlock, AttentionBlock, MLPBlock])
def test_blocks_of_tokens_name_what_they_cannot_do(block):
  with pytest.raises(UsageError, match="has 4 features, but its input has 1"):
    jax.eval_shape(block(4).init, jax.random.key(0), jnp.ones((2, 3, 1)))


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("normalizer", nn.LayerNorm(), "LayerNorm that is made already: give its class, L"),
    ("normalizer", True, "True: .* such as flax.linen.LayerNorm"),
    ("branch_scale", 0.0, r"0.0: .* functools.partial\(layers.SkipInit, 0.0\)"),
    ("normalizer", nnx.LayerNorm, "nnx.LayerNorm, .*: give flax.linen.LayerNorm"),
    (
      "last_normalizer",
      functools.partial(nnx.GroupNorm, num_groups=2),
      "nnx.GroupNorm, of Flax NNX, .*: give flax.linen.GroupNorm",
    ),
    ("branch_scale", native.SkipInit, "nnx.SkipInit, .* skipinit_jax.layers.SkipInit"),
    ("branch_scale", native.SkipInit(), "SkipInit, .* skipinit_jax.layers.SkipInit"),
    ("branch_scale", type("Mine", (nnx.Module,), {}), "give a Linen module"),
  ],
)
def test_what_is_no_factory_of_linen_is_one_sentence(field, value, message):
  with pytest.raises(UsageError, match=f"{field} is .*{message}"):
    BasicBlock(4, **{field: value})


class OwnScale(nn.Module):
  """SkipInit or LayerScale as users may write it: blocks apply it to the branch."""

  initial_value: float
  name_of_parameter: str = "alpha"

  @nn.compact
  def __call__(self, x):
    shape = x.shape[-1:] if self.name_of_parameter == "scale" else ()
    start = nn.initializers.constant(self.initial_value)
    return x * self.param(self.name_of_parameter, start, shape)


@pytest.mark.parametrize(
  ("scale", "name"), [(SkipInit, "alpha"), (LayerScale, "scale")]
)
@pytest.mark.parametrize("block", ["basic", "dense_one"])
def test_a_scale_in_the_last_layer_is_one_behind_it(block, scale, name):
  own = functools.partial(OwnScale, 0.5, name)
  fields = {"use_bias": True, "scalar_biases": True}
  module, x = example(block, branch_scale=scale, **fields)
  params = random_variables(module, x)["params"]

  @jax.jit
  def both(params, x):
    def value(module, params, x):
      return jnp.sin(module.apply({"params": params}, x)).sum()

    gradient = jax.value_and_grad(value, (1, 2))
    return [
      gradient(each, params, x) for each in (module, module.clone(branch_scale=own))
    ]

  chex.assert_trees_all_close(*both(params, x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [SkipInit, LayerScale])
@pytest.mark.parametrize("block", ["basic", "dense_one"])
def test_a_scale_keeps_no_activations(block, scale):
  def kept(branch_scale):
    module, x = example(block, branch_scale=branch_scale)
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
