"""JAX's transformations and meshes of whole networks, against the plain gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType

from skipinit_jax import methods
from skipinit_jax.analysis import measure
from skipinit_jax.layers import Conv
from skipinit_jax.models import (
  BasicBlock,
  DepthStack,
  ResidualMLP,
  VisionTransformer,
  WideResNet,
)
from tests.models.common import random_variables

MODELS = {
  "wide_resnet": functools.partial(WideResNet, 10, 1, 7),
  "mlp": functools.partial(ResidualMLP, 3, 8, 7, remat=True),
  "transformer": functools.partial(VisionTransformer, 1, 8, 7),
}
IMAGES = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype(np.float32)


def build(model, name, ghost_batch_size=None):
  """A network, its parameters, and a scalar function of these and of images."""
  method = methods.get(name)
  if ghost_batch_size:
    method = methods.with_ghost_batches(method, ghost_batch_size)
  module = MODELS[model](method=method)
  variables = random_variables(module, IMAGES, train=False)
  params = variables.pop("params")

  def loss(params, images):
    logits, state = module.apply(
      {"params": params, **variables},
      images,
      train=True,
      mutable=list(variables),
      rngs={"dropout": jax.random.key(0)},
    )
    statistics = sum(map(jnp.sum, jax.tree.leaves(state)))
    return jnp.mean(jnp.sin(logits)) + statistics / 100

  return module, {"params": params, **variables}, loss


def assert_close(actual, expected, rtol=1e-3):
  largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol / 10 * largest),
    actual,
    expected,
  )


@functools.cache
def mesh(axis_type):
  return jax.make_mesh((4,), ("data",), (axis_type,), devices=jax.devices()[:4])


@pytest.mark.parametrize(
  ("model", "name", "ghost_batch_size"),
  [
    ("wide_resnet", "regularized_skipinit", None),
    ("transformer", "batch_norm", None),
    ("mlp", "fixup_dropout", None),
    ("mlp", "nf_resnet", None),
    ("mlp", "batch_norm", 2),
    # A ghost batch on two devices.
    ("mlp", "batch_norm", 4),
  ],
)
def test_explicit_mesh(model, name, ghost_batch_size):
  module, variables, loss = build(model, name, ghost_batch_size)
  explicit = mesh(AxisType.Explicit)
  images = jax.device_put(IMAGES, jax.NamedSharding(explicit, jax.P("data")))
  placed = jax.device_put(variables, jax.NamedSharding(explicit, jax.P()))
  gradient = jax.jit(jax.value_and_grad(loss))
  value, actual = gradient(placed["params"], images)
  expected_value, expected = gradient(variables["params"], IMAGES)
  # The norm of two examples that are nearly alike multiplies rounding errors; in
  # float64 the two gradients agree to 4e-16.
  rtol = 5e-2 if ghost_batch_size == 2 else 1e-3
  np.testing.assert_allclose(value, expected_value, rtol=rtol / 10)
  assert_close(actual, expected, rtol)
  if model == "mlp":
    signal = measure.signal(module, placed, images, train=True)
    expected_signal = measure.signal(module, variables, IMAGES, train=True)
    assert_close(signal, expected_signal, rtol)


@pytest.mark.parametrize("model", ["wide_resnet", "mlp"])
def test_shard_map_sums_the_gradients_of_replicated_parameters(model):
  _, variables, loss = build(model, "skipinit_biases")
  params = variables["params"]

  @functools.partial(
    jax.shard_map,
    mesh=mesh(AxisType.Auto),
    in_specs=(jax.P(), jax.P("data")),
    out_specs=jax.P(),
  )
  def gradient(params, images):
    return jax.grad(lambda *x: jax.lax.pmean(loss(*x), "data"))(params, images)

  assert_close(
    jax.jit(gradient)(params, IMAGES), jax.jit(jax.grad(loss))(params, IMAGES)
  )


def build_stack(**fields):
  """Parameters of two convolutional blocks, and a function of these and of images."""
  norm = functools.partial(nn.BatchNorm, use_running_average=False)
  stack = DepthStack(functools.partial(BasicBlock, 3, normalizer=norm, **fields), 2)
  variables = random_variables(stack, IMAGES)
  params = variables.pop("params")

  def outputs(params, images):
    y, _ = stack.apply({"params": params, **variables}, images, mutable=["batch_stats"])
    return jnp.mean(jnp.sin(y), (1, 2))

  return params, outputs


def test_jacobians_equal_those_of_flax_s_convolution():
  images = IMAGES[:2, :3, :3]
  jacobians = []
  for conv in (Conv, nn.Conv):
    params, outputs = build_stack(conv=conv)
    of_images = functools.partial(outputs, params)
    jacobians += jax.jit(lambda x, f=of_images: (jax.jacfwd(f)(x), jax.jacrev(f)(x)))(
      images
    )
  *actual, expected = jacobians
  assert expected.shape == (2, 3, *images.shape)
  for jacobian in actual:
    assert_close(jacobian, expected)


def test_tangents_have_the_dtype_of_a_computation_in_bfloat16():
  model = WideResNet(10, 1, 7, "batch_norm", dtype=jnp.bfloat16)
  outputs = functools.partial(
    model.apply, train=True, capture_intermediates=True, mutable=True
  )
  variables = jax.eval_shape(
    functools.partial(model.init, train=True), jax.random.key(0), IMAGES
  )
  values, tangents = jax.eval_shape(
    lambda *x: jax.jvp(outputs, x, x), variables, jnp.bfloat16(IMAGES)
  )
  assert tangents == values
  assert jnp.dtype(jnp.bfloat16) in {leaf.dtype for leaf in jax.tree.leaves(values)}


def test_donated_arguments():
  params, outputs = build_stack()

  def step(params, images):
    gradient = jax.grad(lambda params: outputs(params, images).sum())(params)
    return jax.tree.map(lambda p, g: p - g / 10, params, gradient)

  donated = jax.tree.map(jnp.array, params)
  actual = jax.jit(step, donate_argnums=0)(donated, IMAGES)
  assert_close(actual, jax.jit(step)(params, IMAGES))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))


def test_forward_mode_and_curvature_of_a_scanned_stack():
  params, outputs = build_stack()

  def loss(params, images):
    return jnp.mean(outputs(params, images))

  direction = jax.tree.map(lambda leaf: np.cos(leaf + 1) / 10, params)

  @jax.jit
  def derivatives(params, direction):
    gradient = jax.grad(loss)
    dot = lambda a, b: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))  # noqa: E731
    along = lambda p: jax.jvp(  # noqa: E731
      lambda p: loss(p, IMAGES), (p,), (direction,)
    )[1]
    return (
      (along(params), dot(gradient(params, IMAGES), direction)),
      [
        jax.jvp(lambda p: gradient(p, IMAGES), (params,), (direction,))[1],
        jax.grad(along)(params),
        jax.grad(lambda p: dot(gradient(p, IMAGES), direction))(params),
      ],
    )

  (forward, reverse), products = derivatives(params, direction)
  np.testing.assert_allclose(forward, reverse, rtol=1e-3)
  for product in products[1:]:
    assert_close(product, products[0])


def test_vmap_over_seeds_and_over_examples():
  _, variables, loss = build("wide_resnet", "skipinit_biases")
  seeds = [jax.tree.map(lambda x, i=i: x + i / 50, variables["params"]) for i in (0, 1)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
  gradient = jax.grad(loss)
  single = jax.jit(gradient)
  over_seeds = jax.jit(jax.vmap(gradient, (0, None)))(stacked, IMAGES)
  expected = [single(params, IMAGES) for params in seeds]
  assert_close(over_seeds, jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected))
  by_example = jax.jit(jax.vmap(gradient, (None, 0)))(seeds[1], IMAGES[:, None])
  assert_close(jax.tree.map(lambda leaf: leaf.mean(0), by_example), expected[1])
