"""Flax's own tools say the same of scanned stacks as of unrolled ones."""

import functools
import re

import chex
import jax
import numpy as np
import pytest

from skipinit_jax import methods
from skipinit_jax.models import (
  DepthStack,
  FullyConnectedBlock,
  ResidualMLP,
  scan_variables,
  unroll_variables,
)
from tests.models.common import random_variables

IMAGES = np.random.default_rng(0).normal(size=(4, 2, 2, 3)).astype(np.float32)
# One of each kind of layer.
METHODS = ("batch_norm", "fixup_dropout", "layer_scale", "nf_resnet")
KEYS = dict.fromkeys(("params", "dropout"), jax.random.key(0))


def network(name, depth=3):
  return ResidualMLP(depth, 8, 7, methods.get(name))


def capture(model, variables):
  _, state = model.apply(
    variables, IMAGES, train=False, mutable=True, capture_intermediates=True
  )
  return state["intermediates"]


def assert_close(actual, expected):
  chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_captured(name):
  scanned = network(name)
  variables = random_variables(scanned, IMAGES, train=False)
  actual, expected = jax.jit(
    lambda scanned_variables, unrolled_variables: (
      capture(scanned, scanned_variables),
      capture(scanned.clone(scan=False), unrolled_variables),
    )
  )(variables, unroll_variables(variables))
  (outputs,) = actual["stack"]["blocks"]["__call__"]
  assert outputs.shape == (3, 4, 8)
  assert np.any(outputs[1] != outputs[2])
  assert_close(actual, scan_variables(expected))
  assert_close(unroll_variables(actual), expected)


def test_captured_in_segments():
  model = network("batch_norm", depth=12)
  variables = random_variables(model, IMAGES, train=False)
  actual, expected = jax.jit(
    lambda v: (capture(model.clone(remat=True), v), capture(model, v))
  )(variables)
  assert_close(actual, expected)


def test_seeds_together_are_seeds_apart():
  stack = DepthStack(functools.partial(FullyConnectedBlock, 2), 3)
  init = functools.partial(stack.init, x=np.ones((1, 2), np.float32))
  keys = jax.random.split(jax.random.key(0), 2)
  together, apart = jax.jit(
    lambda keys: (jax.vmap(init)(keys), [init(keys[0]), init(keys[1])])
  )(keys)
  assert_close(together, jax.tree.map(lambda *seeds: np.stack(seeds), *apart))


def tabulate(model, **options):
  console = {"force_terminal": False, "width": 250}
  return model.tabulate(KEYS, IMAGES, train=True, console_kwargs=console, **options)


@pytest.mark.parametrize("name", METHODS)
def test_tabulated_totals(name):
  model = network(name)
  variables = random_variables(model, IMAGES, train=True)
  size = sum(leaf.size for leaf in jax.tree.leaves(variables))
  for each in (model, model.clone(scan=False)):
    (total,) = re.findall(r"Total Parameters: ([0-9,]+)", tabulate(each, depth=1))
    assert int(total.replace(",", "")) == size


def test_tabulated_operations():
  text = tabulate(network("skipinit", 5), depth=1, compute_flops=True)
  (row,) = re.findall(r".*DepthStack.*", text)
  # Products, the scale in the kernel, and activation and sum, of [4, 8] and [8, 8].
  assert int(row.split("│")[5]) == 5 * (2 * 4 * 8 * 8 + 8 * 8 + 2 * 4 * 8)
