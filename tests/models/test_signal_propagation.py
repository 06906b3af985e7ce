"""The second moment on the skip path at initialization, against theory.

De & Smith (2020): it doubles at every block without normalization, and grows by one
a block with batch normalization. Each test compares an ensemble's mean with the
theory's value: within four standard errors, plus one part in `fan_in` a block, because
the theory is exact only in the limit of infinite width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skipinit_jax import methods
from skipinit_jax.layers import Conv
from skipinit_jax.models import BasicBlock, BottleneckBlock, DepthStack, ResidualMLP

DEPTH, WIDTH, SEEDS, BATCH, INPUTS = 8, 256, 32, 128, 64
BLOCKS = np.arange(DEPTH + 1)


def assert_theory(moments, expected, fan_in):
  """Compares moments, [seeds, blocks], with the theory's, [blocks]."""
  moments = np.asarray(moments, np.float64)
  error = moments.std(0, ddof=1) / np.sqrt(len(moments))
  allowed = 4 * error + np.arange(len(expected)) / fan_in * expected
  # The test must be able to tell theories apart, such as 2^l and 1.8^l.
  assert np.all(allowed[1:] < 0.35 * expected[1:])
  assert np.all(np.abs(moments.mean(0) - expected) <= allowed + 1e-5), (
    moments.mean(0),
    expected,
    allowed,
  )


@functools.cache
def mlp_moments(method):
  """Second moments of the stem and after each block, [seeds, DEPTH + 1]."""
  model = ResidualMLP(DEPTH, WIDTH, 2, method)

  def moments(key):
    keys = jax.random.split(key)
    x = jax.random.normal(keys[0], (BATCH, INPUTS)) * 0.5**0.5
    # Given no parameters, init runs the model on those it makes, and the scan stacks
    # what the blocks return.
    variables = model.init(keys[1], x, train=True)
    _, state = model.apply(
      variables,
      x,
      train=True,
      capture_intermediates=True,
      mutable=["intermediates", "batch_stats"],
    )
    stem = state["intermediates"]["stem"]["__call__"][0]
    (blocks,) = state["intermediates"]["stack"]["blocks"]["__call__"]
    assert blocks.shape == (DEPTH, BATCH, WIDTH)
    return jnp.square(jnp.concatenate([stem[None], blocks])).mean((1, 2))

  keys = jax.random.split(jax.random.key(0, impl="rbg"), SEEDS)
  return np.asarray(jax.jit(functools.partial(jax.lax.map, moments))(keys))


def with_alpha(alpha):
  return dataclasses.replace(methods.get("skipinit"), alpha=alpha)


@pytest.mark.parametrize(
  ("method", "growth"),
  [
    (methods.get("unnormalized"), 2.0),
    (methods.get("skipinit_one"), 2.0),
    (with_alpha(0.5), 1.25),
    (methods.get("skipinit_inverse_sqrt_depth"), 1 + 1 / DEPTH),
    (methods.get("divide_by_sqrt2"), 1.0),
  ],
  ids=lambda value: getattr(value, "name", None),
)
def test_growth_by_a_factor(method, growth):
  moments = mlp_moments(method)
  assert_theory(moments / moments[:, :1], growth**BLOCKS, WIDTH)


@pytest.mark.parametrize("method", [with_alpha(0.0), methods.get("fixup")])
def test_branches_of_zero_leave_the_skip_path_alone(method):
  moments = mlp_moments(method)
  np.testing.assert_allclose(moments / moments[:, :1], 1.0, rtol=1e-6)


def test_batch_normalization_adds_one_a_block():
  moments = mlp_moments(methods.get("batch_norm"))
  # The stem's He initialization of inputs of one half: a second moment of one.
  assert_theory(moments, 1.0 + BLOCKS, WIDTH)
  np.testing.assert_allclose(moments[:, 0].mean(), 1.0, rtol=0.05)
  # Each branch by itself, a sharper test than their sum.
  branches = np.diff(moments, axis=1)
  error = branches.std(0, ddof=1) / np.sqrt(SEEDS)
  np.testing.assert_array_less(np.abs(branches.mean(0) - 1), 4 * error + DEPTH / WIDTH)


def test_batch_normalization_divided_by_sqrt2_stays_at_one():
  # m becomes (m + 1) / 2, whose fixed point is one.
  moments = mlp_moments(methods.get("batch_norm_divide_by_sqrt2"))
  assert_theory(moments, np.ones(DEPTH + 1), WIDTH)


DOUBLING = ("unnormalized", lambda blocks: 2.0**blocks)
SKIPINIT = ("skipinit_inverse_sqrt_depth", lambda blocks: 1.25**blocks)
CONSTANT = ("divide_by_sqrt2", lambda blocks: 1.0**blocks)
LINEAR = ("batch_norm", lambda blocks: 1.0 + blocks)


@pytest.mark.parametrize(
  ("block", "width", "name", "theory"),
  [
    (BasicBlock, 24, *DOUBLING),
    (BasicBlock, 24, *SKIPINIT),
    (BasicBlock, 24, *CONSTANT),
    (BasicBlock, 24, *LINEAR),
    (BottleneckBlock, 96, *DOUBLING),
    (BottleneckBlock, 96, *LINEAR),
  ],
)
def test_convolutional_blocks(block, width, name, theory):
  depth = 4
  layers = {BasicBlock: 2, BottleneckBlock: 3}[block]
  fields = methods.get(name).activated_block_fields(
    num_blocks=depth,
    branch_layers=layers,
    train=True,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
  )
  # On a circle every position sees as many others, so that the theory holds exactly.
  circular = functools.partial(Conv, padding="CIRCULAR")
  stack = DepthStack(functools.partial(block, 24, conv=circular, **fields), depth)

  def moments(key):
    keys = jax.random.split(key)
    x = jax.random.normal(keys[0], (8, 4, 4, width))
    _, state = stack.init_with_output(
      keys[1], x, mutable=True, capture_intermediates=True
    )
    (blocks,) = state["intermediates"]["blocks"]["__call__"]
    return jnp.square(jnp.concatenate([x[None], blocks])).mean((1, 2, 3, 4))

  keys = jax.random.split(jax.random.key(1, impl="rbg"), 64)
  values = jax.jit(functools.partial(jax.lax.map, moments))(keys)
  assert_theory(values, theory(np.arange(depth + 1)), 3 * 3 * 24)
