"""Ghost batch normalization, against Flax's batch normalization."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from skipinit_jax import methods
from skipinit_jax.errors import UsageError
from skipinit_jax.layers import GhostBatchNorm

BATCH, FEATURES = 16, 3
GhostNorm = functools.partial(GhostBatchNorm, momentum=0.8, epsilon=1e-3)
FlaxNorm = functools.partial(nn.BatchNorm, momentum=0.8, epsilon=1e-3)
COLLECTIVE = re.compile(
  r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
)


@pytest.fixture(scope="module")
def images():
  # Examples differ in mean and scale, so that each ghost batch has its own statistics.
  generator = np.random.default_rng(0)
  scale = np.linspace(0.5, 3, BATCH)[:, None, None, None]
  x = generator.normal(size=(BATCH, 4, 5, FEATURES)) * scale + scale**2
  return x.astype(np.float32)


@pytest.fixture(scope="module")
def variables():
  generator = np.random.default_rng(1)
  draw = lambda: generator.uniform(0.5, 2, FEATURES).astype(np.float32)  # noqa: E731
  return {
    "params": {"scale": draw(), "bias": draw()},
    "batch_stats": {"mean": draw(), "var": draw()},
  }


@functools.partial(jax.jit, static_argnums=0)
def train(module, variables, x):
  y, changed = module.apply(variables, x, mutable=["batch_stats"])
  return y, changed["batch_stats"]


def by_hand(variables, x):
  """One batch's normalized output, mean and variance."""
  x = np.asarray(x, np.float64)
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  params = variables["params"]
  y = (x - mean) / np.sqrt(var + 1e-3) * params["scale"] + params["bias"]
  return y, mean, var


def assert_close(actual, expected, tolerance=1e-5):
  chex.assert_trees_all_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_variables_are_those_of_flax(images):
  ghost = GhostNorm(use_running_average=False, ghost_batch_size=8)
  flax = FlaxNorm(use_running_average=False)
  # The batch of initialization need not divide.
  actual, expected = (m.init(jax.random.key(0), images[:3]) for m in (ghost, flax))
  assert_close(actual, expected)


@pytest.mark.parametrize(
  ("dtype", "shift", "scale", "tolerance", "var_tolerance"),
  # A mean of float32 is off by its last digit, relative to the deviation. bfloat16 has
  # steps of 4 at 1000, and so its deviation is hardly more than rounding at last.
  [
    ("float32", 0.0, 1.0, 1e-4, 1e-4),
    ("float32", 1000.0, 0.1, 1e-2, 1e-4),
    ("bfloat16", 1000.0, 10.0, 2**-7, 1e-3),
    ("bfloat16", 1000.0, 0.5, 2**-5, 2**-5),
  ],
)
def test_one_ghost_batch_is_the_methods_batch_normalization(
  images, variables, dtype, shift, scale, tolerance, var_tolerance
):
  x = jnp.asarray(shift + scale * images, dtype)
  whole = functools.partial(methods.batch_normalizer, epsilon=1e-3, momentum=0.8)
  expected, mean, var = by_hand(variables, x)
  old = variables["batch_stats"]
  for module, output_dtype in (
    (whole(use_running_average=False), dtype),
    (GhostNorm(False, BATCH), dtype),
    (GhostNorm(False, BATCH, dtype=jnp.float32), "float32"),
  ):
    y, statistics = train(module, variables, x)
    assert y.dtype == output_dtype
    assert statistics["mean"].dtype == statistics["var"].dtype == np.float32
    assert_close(y, expected, tolerance)
    assert_close(statistics["mean"], 0.8 * old["mean"] + 0.2 * mean)
    assert_close(statistics["var"], 0.8 * old["var"] + 0.2 * var, var_tolerance)


def test_one_pass_of_accelerators(images, variables, monkeypatch):
  """What a TPU or GPU takes for bfloat16, run here, with and without a large mean."""
  lowered = (
    jax.jit(lambda x: GhostNorm(False).apply(variables, x, mutable=True))
    .trace(jnp.asarray(images, dtype))
    .lower(lowering_platforms=("tpu",))
    .as_text()
    for dtype in ("bfloat16", "float32")
  )
  # The squared mean is subtracted, of one number a feature.
  subtracted = [
    len(re.findall("subtract.*tensor<1x1x1x3xf32>$", t, re.M)) for t in lowered
  ]
  assert subtracted == [1, 0]
  monkeypatch.setattr(
    jax.lax, "platform_dependent", lambda *x, cpu, default: default(*x)
  )
  # The output is rounded to bfloat16.
  for shift, scale, var_tolerance in ((0.0, 1.0, 1e-5), (1000.0, 10.0, 2**-7)):
    x = jnp.asarray(shift + scale * images, jnp.bfloat16)
    y, statistics = GhostNorm(False).apply(variables, x, mutable=True)
    expected, mean, var = by_hand(variables, x)
    assert_close(y, expected, 2**-7)
    old, running = variables["batch_stats"], statistics["batch_stats"]
    assert_close(running["mean"], 0.8 * old["mean"] + 0.2 * mean)
    assert_close(running["var"], 0.8 * old["var"] + 0.2 * var, var_tolerance)


def test_layer_norm_of_the_methods_with_a_large_mean(images):
  x = 1000 + images / 10
  norm = methods.get("layer_norm").normalizer(use_scale=False, use_bias=False)
  y = np.asarray(norm.apply({}, x))
  wide = np.asarray(x, np.float64)
  expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(
    wide.var(-1, keepdims=True) + 1e-6
  )
  assert_close(y, expected, 0.02)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_each_ghost_batch_has_its_own_statistics(images, variables, size):
  output, running = train(GhostNorm(False, size), variables, images)
  ghosts = [by_hand(variables, ghost) for ghost in images.reshape(-1, size, 4, 5, 3)]
  assert_close(output, np.concatenate([y for y, _, _ in ghosts]), 1e-4)
  old = variables["batch_stats"]
  for name, index in (("mean", 1), ("var", 2)):
    average = np.mean([ghost[index] for ghost in ghosts], axis=0)
    assert_close(running[name], 0.8 * old[name] + 0.2 * average)


@pytest.mark.parametrize(
  ("size", "dtype", "tolerance"),
  [(8, "float32", 1e-3), (None, "float32", 1e-3), (None, "bfloat16", 0.05)],
)
def test_derivatives_go_through_the_statistics(
  images, variables, size, dtype, tolerance
):
  """The first and the second one, against Flax's of float32."""
  images = jnp.asarray(images, dtype)
  generator = np.random.default_rng(2)
  direction, cotangent = generator.normal(size=(2, *images.shape)).astype(np.float32)

  @functools.partial(jax.jit, static_argnums=0)
  def derivatives(module, x, direction, cotangent):
    def gradient(params, x):
      def function(params, x):
        return module.apply(variables | {"params": params}, x, mutable=True)[0]

      y, pull_back = jax.vjp(function, params, x)
      return pull_back(cotangent.astype(y.dtype))

    params = variables["params"]
    tangents = jax.tree.map(jnp.zeros_like, params), direction.astype(x.dtype)
    return jax.jvp(gradient, (params, x), tangents)

  actual = derivatives(GhostNorm(False, size), images, direction, cotangent)
  flax = FlaxNorm(use_running_average=False, use_fast_variance=False)
  size = size or BATCH
  parts = [
    derivatives(flax, *(each[start : start + size] for each in arrays))
    for arrays in [(images.astype(np.float32), direction, cotangent)]
    for start in range(0, BATCH, size)
  ]
  for order in (0, 1):
    params, inputs = zip(*(part[order] for part in parts), strict=True)
    expected = jax.tree.map(lambda *each: sum(each), *params), np.concatenate(inputs)
    assert_close(actual[order], expected, tolerance)


def test_evaluation_uses_the_running_statistics(images, variables):
  # A batch that does not divide is no trouble here.
  output, unchanged = train(GhostNorm(True, 8), variables, images[:5])
  running = variables["batch_stats"]
  assert_close(unchanged, running, 0)
  normal = (images[:5] - running["mean"]) / np.sqrt(running["var"] + 1e-3)
  params = variables["params"]
  assert_close(output, normal * params["scale"] + params["bias"], 1e-4)


@pytest.mark.parametrize("size", [5, 32, 0, -4])
def test_a_batch_that_does_not_divide(images, variables, size):
  message = f"ghost_batch_size {size} does not divide the batch of 16"
  with pytest.raises(UsageError, match=message):
    GhostNorm(False, size).apply(variables, images, mutable=["batch_stats"])


@pytest.mark.parametrize(
  ("module", "communicates"),
  [
    (GhostNorm(False, 1), False),
    (GhostNorm(False, 2), False),
    # As many examples as a device holds.
    (GhostNorm(False, 4), False),
    (GhostNorm(False, 8), True),
    (FlaxNorm(use_running_average=False), True),
  ],
)
def test_ghost_batches_on_one_device_need_no_communication(
  images, variables, module, communicates
):
  mesh = jax.make_mesh(
    (4,),
    ("data",),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:4],
  )
  sharded = jax.device_put(images, jax.NamedSharding(mesh, jax.P("data")))
  # The normalized output alone: running statistics average over all devices.
  program = (
    jax.jit(lambda x: train(module, variables, x)[0]).lower(sharded).compile().as_text()
  )
  assert "num_partitions=4" in program
  assert bool(COLLECTIVE.search(program)) == communicates
  assert_close(train(module, variables, sharded), train(module, variables, images))
