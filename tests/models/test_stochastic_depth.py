"""Stochastic depth: which branches are dropped, how often, and by what masks."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from skipinit_jax import methods
from skipinit_jax.errors import UsageError
from skipinit_jax.models import (
  FullyConnectedBlock,
  ResidualMLP,
  VisionTransformer,
  WideResNet,
  unroll_variables,
)
from tests.models.common import random_variables

IMAGES = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype(np.float32)
KEY = {"dropout": jax.random.key(0)}


def method(name, rate=0.5):
  return dataclasses.replace(methods.get(name), drop_path=rate)


MODELS = {
  "wide_resnet": functools.partial(WideResNet, 16, 1, 3, method("nf_resnet")),
  # Rematerialized in segments of two.
  "mlp": functools.partial(ResidualMLP, 8, 6, 3, method("skipinit_one")),
  "transformer": functools.partial(
    VisionTransformer, 2, 8, 3, method("layer_norm"), num_heads=2
  ),
}


@pytest.fixture(scope="module", params=MODELS)
def scanned(request):
  """A model's factory, its variables, and its logits in training."""
  make = MODELS[request.param]
  variables = random_variables(make(), IMAGES, train=False)
  return make, variables, logits(make(), variables)


def logits(model, variables, train=True):
  run = jax.jit(functools.partial(model.apply, train=train))
  return np.asarray(run(variables, IMAGES, rngs=KEY))


def test_unrolled_has_the_same_masks(scanned):
  make, variables, expected = scanned
  actual = logits(make(scan=False), unroll_variables(variables))
  np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scanned", ["mlp"], indirect=True)
def test_rematerialized_has_the_same_masks_and_evaluation_none(scanned):
  make, variables, expected = scanned
  actual = logits(make(remat=True), variables)
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
  evaluated = logits(make(), variables, train=False)
  whole = make().clone(method=method("skipinit_one", 0.0))
  np.testing.assert_array_equal(evaluated, logits(whole, variables))
  assert np.abs(evaluated - expected).max() > 0.1


def test_each_example_drops_a_branch_as_often_as_its_depth_says():
  depth, rate, num_examples = 4, 0.6, 2000
  model = ResidualMLP(depth, 3, 2, method("unnormalized", rate), scan=False)
  images = np.random.default_rng(1).normal(size=(num_examples, 3)).astype(np.float32)
  variables = random_variables(model, images, train=False)
  _, seen = model.apply(
    variables,
    images,
    train=True,
    rngs=KEY,
    capture_intermediates=lambda module, _: (
      module.name == "stem" or isinstance(module, FullyConnectedBlock)
    ),
    mutable="intermediates",
  )
  seen = seen["intermediates"]
  x = seen["stem"]["__call__"][0]
  masks = []
  for index in range(depth):
    params = variables["params"]["stack"][f"block{index}"]
    branch = FullyConnectedBlock(3).apply({"params": params}, x) - x
    after = seen["stack"][f"block{index}"]["__call__"][0]
    dropped = rate * (index + 1) / depth
    stays = np.asarray(after != x).any(-1)
    # Branches that stay are divided by their probability.
    expected = x + np.where(stays[:, None], branch / (1 - dropped), 0)
    np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-5)
    # Some branches are zero because each unit is: they look dropped.
    stays = stays[np.asarray(branch != 0).any(-1)]
    deviation = np.sqrt(dropped * (1 - dropped) / len(stays))
    assert abs(np.mean(~stays) - dropped) < 4 * deviation
    masks.append(np.asarray(after != x).any(-1))
    x = after
  assert not (masks[2] == masks[3]).all()


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_bad_rate(rate):
  with pytest.raises(UsageError, match=rf"drop_path is {rate}: it must be in \[0, 1\)"):
    method("skipinit", rate)
