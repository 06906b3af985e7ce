"""Residual networks of fully connected blocks.

Their output is written out in test_normalizer_free.py.
"""

import jax
import numpy as np
import pytest

from skipinit_jax import methods
from skipinit_jax.models import ResidualMLP

IMAGES = np.random.default_rng(0).normal(size=(5, 4, 3, 1)).astype(np.float32)


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
