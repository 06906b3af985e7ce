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
