"""A ResNet of version 1 against one written like Flax's ImageNet example."""

import functools

import jax
import numpy as np
from flax import traverse_util

from benchmarks import peer_flax
from skipinit_jax import models
from skipinit_jax.models import resnet
from tests.peers.common import (
  FLOAT64,
  assert_same,
  float64,
  place_of_block,
  random_variables,
  run,
)

# A transition with and without strides, and a block that is neither.
BLOCKS = (2, 1, 1, 1)
OUTSIDE = {"stem": "Conv_0", "stem_norm": "BatchNorm_0", "head": "Dense_0"}
LAYERS = {"conv": "Conv", "norm": "BatchNorm"}


def to_flax(variables):
  """Returns our variables by the names that Flax gives them."""
  renamed = {}
  for (collection, *names, leaf), array in variables.items():
    if names[0] in OUTSIDE:
      path = [OUTSIDE[names[0]]]
    else:
      stage, index, (name,) = place_of_block(names)
      if name.startswith("projection"):
        layer, number = ("norm" if name.endswith("norm") else "conv"), 3
      else:
        layer, number = name[:4], int(name[4:])
        # Normalizers stand behind the convolutions.
        number -= 2 if layer == "norm" else 1
      block = sum(BLOCKS[:stage]) + index
      path = [f"BottleneckBlock_{block}", f"{LAYERS[layer]}_{number}"]
    renamed[collection, *path, leaf] = array
  return traverse_util.unflatten_dict(renamed)


def test_weights_of_the_example_load(monkeypatch):
  monkeypatch.setitem(resnet.STAGE_BLOCKS, 50, BLOCKS)
  # Even sizes, where SAME and symmetric padding differ.
  images, labels = np.random.default_rng(1).normal(size=(2, 64, 64, 3)), np.arange(2)
  with float64():
    model = models.ResNet(
      50,
      5,
      "batch_norm_zero_scale",
      1,
      scan=False,
      symmetric_stem=True,
      **FLOAT64,
    )
    variables = random_variables(model, images)
    _, logits, _, statistics = run(model, variables, images, labels, evaluate=False)
    peer = peer_flax.ResNet(5, "float64", BLOCKS)
    apply = jax.jit(functools.partial(peer.apply, mutable=["batch_stats"]))
    expected, new = apply(to_flax(variables), images)
    assert_same({"logits": logits}, {"logits": np.asarray(expected)})
    kept = traverse_util.flatten_dict(to_flax(statistics))
    flat = {path: np.asarray(x) for path, x in traverse_util.flatten_dict(new).items()}
    assert_same(kept, flat)
