"""Stacks of blocks: scanned, unrolled and rematerialized they are one function."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from skipinit_jax import methods
from skipinit_jax.errors import UsageError
from skipinit_jax.models import (
  BasicBlock,
  DepthStack,
  FullyConnectedBlock,
  ResidualMLP,
  VisionTransformer,
  WideResNet,
  depth,
  scan_variables,
  unroll_variables,
)
from tests.models.common import random_variables

IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
LABELS = np.array([0, 2, 1, 2])


class Convolutional(nn.Module):
  """A stack of convolutional blocks that update statistics, and a linear head.

  A whole Wide-ResNet has three of them, and takes three times as long to compile.
  """

  scan: bool = True
  remat: bool = False

  @nn.compact
  def __call__(self, images, *, train):
    normalizer = functools.partial(nn.BatchNorm, use_running_average=not train)
    block = functools.partial(BasicBlock, 3, normalizer=normalizer)
    stack = DepthStack(block, 3, scan=self.scan, remat=self.remat, name="stack")
    return nn.Dense(3)(stack(images).mean((1, 2)))


MODELS = {
  "convolutional": Convolutional,
  # Its blocks update statistics and have constants of their own; it is rematerialized
  # in segments of two.
  "mlp": functools.partial(
    ResidualMLP,
    10,
    6,
    3,
    dataclasses.replace(methods.get("nf_resnet"), normalizer=methods.batch_normalizer),
  ),
  "transformer": functools.partial(
    VisionTransformer, 2, 8, 3, methods.get("layer_norm"), num_heads=2
  ),
}


def assert_close(actual, expected, tolerance=1e-4):
  chex.assert_trees_all_close(actual, expected, rtol=tolerance, atol=tolerance)


def step(model, variables):
  """Logits, gradients and updated statistics."""

  def loss(params):
    logits, updated = model.apply(
      variables | {"params": params}, IMAGES, train=True, mutable=["batch_stats"]
    )
    log_likelihood = jax.nn.log_softmax(logits)[jnp.arange(4), LABELS]
    return -log_likelihood.mean(), (logits, updated)

  gradients, (logits, updated) = jax.grad(loss, has_aux=True)(variables["params"])
  return logits, {"params": gradients}, updated


@pytest.fixture(scope="module", params=MODELS)
def scanned(request):
  """A model's factory, its variables, and one step of it."""
  model = MODELS[request.param]
  variables = random_variables(model(), IMAGES, train=True)
  return model, variables, jax.jit(functools.partial(step, model()))(variables)


def test_unrolled_is_the_same_function(scanned):
  model, variables, (logits, gradients, updated) = scanned
  unrolled = jax.jit(functools.partial(step, model(scan=False)))
  actual = unrolled(unroll_variables(variables))
  assert np.std(logits) > 1e-2
  assert_close(actual[0], logits)
  assert_close(scan_variables(actual[1]), gradients, 1e-3)
  assert_close(scan_variables(actual[2]), updated)


def test_rematerialized_is_the_same_function(scanned):
  model, variables, expected = scanned
  assert_close(jax.jit(functools.partial(step, model(remat=True)))(variables), expected)


# The others have no other code than here and above.
@pytest.mark.parametrize("scanned", ["mlp"], indirect=True)
def test_unrolled_and_rematerialized_is_the_same_function(scanned):
  model, variables, (logits, gradients, _) = scanned
  both = jax.jit(functools.partial(step, model(scan=False, remat=True)))
  actual = both(unroll_variables(variables))
  assert_close(actual[0], logits)
  assert_close(scan_variables(actual[1]), gradients, 1e-3)


@pytest.mark.parametrize(
  "model",
  [
    functools.partial(WideResNet, 22, 1, 3, methods.get("batch_norm")),
    MODELS["mlp"],
    MODELS["transformer"],
  ],
)
def test_round_trip_is_exact(model):
  variables = random_variables(model(), IMAGES, train=True)
  unrolled = unroll_variables(variables)
  shapes = jax.eval_shape(
    lambda: model(scan=False).init(jax.random.key(0), IMAGES, train=True)
  )
  assert jax.tree.map(jnp.shape, unrolled) == jax.tree.map(jnp.shape, shapes)
  chex.assert_trees_all_equal(scan_variables(unrolled), variables)
  chex.assert_trees_all_equal(unroll_variables(scan_variables(unrolled)), unrolled)


def test_other_modules_keep_their_names():
  # A module of a user that happens to be called like a block of a stack.
  variables = {
    "params": {"block0": {"kernel": np.ones(3)}, "head": np.ones(2), "x": {}}
  }
  chex.assert_trees_all_equal(scan_variables(variables), variables)
  chex.assert_trees_all_equal(unroll_variables(variables), variables)


def lines(model):
  """The length of a step's program."""
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES, train=True))
  step_of_model = functools.partial(step, model)
  return jax.jit(step_of_model).lower(shapes).as_text().count("\n")


def test_program_grows_with_depth_only_if_it_is_written_out():
  wide_resnet = functools.partial(
    WideResNet, width=1, num_classes=3, method="batch_norm"
  )
  assert lines(wide_resnet(22)) == lines(wide_resnet(1000))
  unrolled = functools.partial(
    ResidualMLP, width=6, num_classes=3, method="skipinit", scan=False
  )
  assert lines(unrolled(16)) > 2 * lines(unrolled(4))


def test_remat_keeps_only_the_inputs_of_blocks():
  x = np.ones((16, 32), np.float32)
  block = functools.partial(FullyConnectedBlock, 32, num_layers=3)

  def kept(remat):
    stack = DepthStack(block, 5, remat=remat)
    variables = jax.eval_shape(stack.init, jax.random.key(0), x)
    _, residuals = jax.eval_shape(lambda v: jax.vjp(stack.apply, v, x), variables)
    shapes = [leaf.shape for leaf in jax.tree.leaves(residuals)]
    return shapes.count((5, 16, 32))

  assert kept(True) == 1
  assert kept(False) > 3


def test_segments_start_as_one_scan():
  x = np.ones((2, 6), np.float32)
  block = functools.partial(FullyConnectedBlock, 6)
  initialized = [
    jax.jit(DepthStack(block, 12, remat=remat).init)(jax.random.key(0), x)
    for remat in (False, True)
  ]
  chex.assert_trees_all_equal(*initialized)


class Sine(nn.Module):
  """A block of little but activations: what it keeps is as large as its input."""

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, ())
    return jnp.sin(jnp.cos(scale * x))


def test_memory_under_remat_grows_with_the_square_root_of_depth():
  x = jnp.ones(4096)

  def activations(num_blocks, remat):
    """Peak memory of a gradient, in sizes of x."""
    stack = DepthStack(Sine, num_blocks, remat=remat)
    variables = jax.eval_shape(stack.init, jax.random.key(0), x)
    loss = lambda v: stack.apply(v, x).sum()  # noqa: E731
    compiled = jax.jit(jax.grad(loss)).lower(variables).compile()
    return compiled.memory_analysis().temp_size_in_bytes / x.nbytes

  few, many = activations(64, True), activations(1024, True)
  # Sixteen times as many blocks: four times as much, and what does not grow.
  assert many < 5 * few
  assert many < 4 * np.sqrt(1024)
  assert activations(1024, False) > 1024


@pytest.mark.parametrize("num_blocks", [1, 5, 12, 165, 1665])
def test_segments_divide_the_blocks(num_blocks):
  length = depth._segment_length(num_blocks)
  assert num_blocks % length == 0
  kept = num_blocks / length + 4 * length
  # No worse than half again what the best divisor gives, the activations of a block
  # being four times its input.
  divisors = [n for n in range(1, num_blocks + 1) if num_blocks % n == 0]
  assert kept <= 1.5 * min(num_blocks / n + 4 * n for n in divisors)


@pytest.mark.parametrize("scan", [True, False])
def test_no_blocks_return_the_input(scan):
  stack = DepthStack(functools.partial(BasicBlock, 4), 0, scan=scan)
  output, variables = stack.init_with_output(jax.random.key(0), IMAGES)
  chex.assert_trees_all_equal(output, IMAGES)
  assert not jax.tree.leaves(variables)


@pytest.mark.parametrize("features", [3, 4])
@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_keeps_shape_and_dtype(features, remat):
  """Written out, blocks of float32 widen bfloat16, and the first may project."""
  block = functools.partial(BasicBlock, features)
  x = jnp.asarray(IMAGES, jnp.bfloat16)
  maps = rf"maps bfloat16\[4, 8, 8, 3\] to float32\[4, 8, 8, {features}\]: under scan"
  with pytest.raises(UsageError, match=maps):
    DepthStack(block, 4, remat=remat).init(jax.random.key(0), x)
  unrolled = DepthStack(block, 2, scan=False, remat=remat)
  y, _ = unrolled.init_with_output(jax.random.key(0), x)
  assert y.dtype == jnp.float32


@pytest.mark.parametrize("num_blocks", [3, 16])
def test_dropout_has_the_same_masks_under_remat(num_blocks):
  """Also in segments, which are scans within a scan."""
  x = np.ones((2, 40), np.float32)

  @functools.partial(jax.jit, static_argnums=0)
  def gradient(remat):
    stack = DepthStack(DroppingBlock, num_blocks, remat=remat)
    return jax.value_and_grad(
      lambda x: stack.apply({}, x, rngs={"dropout": jax.random.key(1)}).sum()
    )(x)

  assert_close(gradient(True), gradient(False), 1e-6)


class DroppingBlock(nn.Module):
  """A block whose features tell which of them were dropped in which blocks."""

  @nn.compact
  def __call__(self, x):
    return 0.7 * x + nn.Dropout(0.5, deterministic=False)(x)


class OwnBlock(nn.Module):
  """A user's block with dropout, a collection of its own and no parameters."""

  @nn.compact
  def __call__(self, x):
    calls = self.variable("calls", "count", jnp.zeros, ())
    calls.value += 1.0
    y = nn.Dropout(0.5, deterministic=False)(jnp.ones_like(x))
    self.sow("intermediates", "dropped", y)
    return x + y


@pytest.mark.parametrize("scan", [True, False])
def test_a_block_of_ones_own(scan):
  x = np.zeros((4, 50), np.float32)
  stack = DepthStack(OwnBlock, 3, scan=scan)
  calls = {"calls": {"blocks": {"count": jnp.zeros(3)}}}
  _, state = stack.apply(
    calls if scan else unroll_variables(calls),
    x,
    mutable=["calls", "intermediates"],
    rngs={"dropout": jax.random.key(0)},
  )
  if not scan:
    state = scan_variables(state)
  np.testing.assert_array_equal(state["calls"]["blocks"]["count"], 1.0)
  (dropped,) = state["intermediates"]["blocks"]["dropped"]
  # Each block draws its own mask.
  assert dropped.shape == (3, *x.shape)
  assert np.any(dropped[0] != dropped[1])
  assert np.any(dropped[1] != dropped[2])
