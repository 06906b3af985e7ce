"""Residual networks of fully connected blocks."""

import jax
import numpy as np
import pytest

from skipinit_jax import methods
from skipinit_jax.models import ResidualMLP

IMAGES = np.random.default_rng(0).normal(size=(5, 4, 3, 1)).astype(np.float32)


def test_output(random_variables):
  model = ResidualMLP(3, 6, 4, methods.get("divide_by_sqrt2"), layers_per_block=2)
  variables = random_variables(model, IMAGES, train=True)
  params = variables["params"]
  x = IMAGES.reshape(5, 12) @ params["stem"]["kernel"]
  blocks = params["stack"]["blocks"]
  for index in range(3):
    y = np.maximum(x, 0) @ blocks["dense1"]["kernel"][index]
    y = np.maximum(y, 0) @ blocks["dense2"]["kernel"][index]
    x = (x + y) / np.sqrt(2)
  classifier = params["head"]["classifier"]
  expected = np.maximum(x, 0) @ classifier["kernel"] + classifier["bias"]
  logits = jax.jit(lambda v: model.apply(v, IMAGES, train=True))(variables)
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ("method", "extra"),
  [
    ("unnormalized", 0),
    ("skipinit", 7),
    ("skipinit_biases", 7 + 7 * 2 * 16),
    # Normalizers before both layers of a block, and before the classifier.
    ("batch_norm", 2 * 16 * (7 * 2 + 1)),
    ("output_batch_norm", 2 * 16),
    # Two biases a layer, one more and a multiplier a block, two around the head.
    ("fixup", 7 * (2 * 2 + 2) + 2),
  ],
)
def test_number_of_parameters(method, extra):
  model = ResidualMLP(7, 16, 4, methods.get(method), layers_per_block=2)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES, train=False))
  number = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
  assert number == 12 * 16 + 7 * 2 * 16 * 16 + 16 * 4 + 4 + extra


@pytest.mark.parametrize("layers_per_block", [1, 2, 3])
def test_fixup_initialization(layers_per_block):
  model = ResidualMLP(16, 32, 4, methods.get("fixup"), layers_per_block)
  init = jax.jit(lambda key: model.init(key, IMAGES, train=False)["params"])
  params = init(jax.random.key(0))
  blocks = params["stack"]["blocks"]
  assert not np.any(params["head"]["classifier"]["kernel"])
  assert not np.any(blocks[f"dense{layers_per_block}"]["kernel"])
  for index in range(1, layers_per_block):
    kernel = blocks[f"dense{index}"]["kernel"]
    # Weights times d^(-1/(2m - 2)): their variance times 1/16 or 1/4.
    variance = 2 / 32 * 16 ** (-1 / (layers_per_block - 1))
    error = 5 * np.sqrt(2 / kernel.size)
    np.testing.assert_allclose(np.var(kernel), variance, rtol=error)
