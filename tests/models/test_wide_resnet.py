"""Wide residual networks, against the literature."""

import jax
import numpy as np
import pytest

from skipinit_jax import methods
from skipinit_jax.models import WideResNet

IMAGES = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)


def count(depth, width, classes, method):
  model = WideResNet(depth, width, classes, methods.get(method))
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), np.ones((1, 32, 32, 3)), train=False)
  )
  return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


@pytest.mark.parametrize(
  ("depth", "width", "classes", "number"),
  [
    # Zagoruyko & Komodakis (2016), where they are 36.5 M, 8.9 M, 2.7 M and 0.7 M.
    (28, 10, 10, 36_479_194),
    (40, 4, 10, 8_949_210),
    (16, 4, 10, 2_748_890),
    (16, 2, 10, 691_674),
    (28, 10, 100, 36_536_884),
  ],
)
def test_parameters_as_in_the_literature(depth, width, classes, number):
  assert count(depth, width, classes, "batch_norm") == number


def test_parameters_of_other_methods_by_what_they_add():
  plain = count(16, 2, 10, "unnormalized")
  # A normalizer before each activation: twice a block and once at the end.
  widths = [16, 32, 32, 32, 32, 64, 64, 64, 64, 128, 128, 128, 128]
  assert count(16, 2, 10, "batch_norm") == plain + 2 * sum(widths)
  assert count(16, 2, 10, "output_batch_norm") == plain + 2 * 128
  assert count(16, 2, 10, "skipinit") == plain + 6
  # Two convolutions a block and three projections.
  biases = 2 * 2 * (32 + 64 + 128) + 32 + 64 + 128
  assert count(16, 2, 10, "skipinit_biases") == plain + 6 + biases
  # Five biases and a multiplier a block, two biases around the last activation.
  assert count(16, 2, 10, "fixup") == plain + 6 * 6 + 2


def test_stages():
  model = WideResNet(22, 2, 10, methods.get("skipinit"))
  _, state = jax.eval_shape(
    lambda: model.init_with_output(
      jax.random.key(0), IMAGES, train=False, capture_intermediates=True, mutable=True
    )
  )
  outputs = [state["intermediates"][f"stage{i}_rest"]["__call__"] for i in (1, 2, 3)]
  assert [output.shape for (output,) in outputs] == [
    (2, 16, 16, 32),
    (2, 8, 8, 64),
    (2, 4, 4, 128),
  ]
