"""Batch-normalized ResNets of both versions against Haiku's."""

import re

import jax
import numpy as np
import pytest

from skipinit_jax import models
from skipinit_jax.models import resnet
from tests.peers.common import (
  FLOAT64,
  assert_same,
  cross_entropy,
  float64,
  place_of_block,
  random_variables,
  run,
)

hk = pytest.importorskip("haiku", reason="needs dm-haiku: pip install -e '.[peers]'")

# Blocks of each stage: a transition with and without strides, and one that is neither.
BLOCKS = (2, 1, 1, 1)
OUTSIDE = {"stem": "initial_conv", "stem_norm": "initial_batchnorm"}


def module_name(path, version):
  """Returns the name of Haiku's module that has one of our variables."""
  first, *rest = path
  if first == "head":
    return {"norm": "final_batchnorm", "classifier": "logits"}[rest[0]]
  if first in OUTSIDE:
    return OUTSIDE[first]
  stage, block, (name,) = place_of_block(path)
  layer, number = re.fullmatch(r"(\D+)(\d?)", name).groups()
  # Normalizers stand before the convolutions in version 2, and behind in version 1.
  shift = 2 if layer == "norm" and version == 1 else 1
  name = {
    "conv": "conv_{}",
    "norm": "batchnorm_{}",
    "projection": "shortcut_conv",
    "projection_norm": "shortcut_batchnorm",
  }[layer].format(int(number or 0) - shift)
  return f"block_group_{stage}/~/block_{block}/~/{name}"


def to_haiku(variables, version):
  """Returns our parameters and statistics as Haiku's."""
  params, state = {}, {}
  for (collection, *path, leaf), array in variables.items():
    name = f"net/~/{module_name(path, version)}"
    if collection == "batch_stats":
      kept = array.reshape(1, 1, 1, -1)
      ema = f"{name}/~/{leaf}_ema"
      state[ema] = {"hidden": kept, "average": kept, "counter": np.int32(100)}
      continue
    is_norm = leaf != "kernel" and not path[-1].startswith(("conv", "class"))
    key = {"kernel": "w", "scale": "scale", "bias": "offset" if is_norm else "b"}[leaf]
    params.setdefault(name, {})[key] = array.reshape(1, 1, 1, -1) if is_norm else array
  return params, state


@pytest.mark.parametrize("version", [1, 2])
def test_batch_norm_is_haiku_s(monkeypatch, version):
  monkeypatch.setitem(resnet.STAGE_BLOCKS, 50, BLOCKS)
  rng = np.random.default_rng(1)
  images, labels = rng.normal(size=(3, 40, 40, 3)), np.array([0, 4, 2])

  def net(images, is_training):
    network = hk.nets.ResNet(BLOCKS, 5, resnet_v2=version == 2, name="net")
    return network(images, is_training)

  peer = hk.transform_with_state(net)

  @jax.jit
  def peer_gradients(params, state, images):
    def loss(params):
      logits, new = peer.apply(params, state, None, images, True)
      return cross_entropy(logits, labels), (logits, new)

    return jax.grad(loss, has_aux=True)(params)

  evaluate = jax.jit(lambda *arguments: peer.apply(*arguments, None, images, False)[0])
  with float64():
    model = models.ResNet(50, 5, "batch_norm", version, scan=False, **FLOAT64)
    variables = random_variables(model, images)
    evaluated, logits, gradients, statistics = run(model, variables, images, labels)
    params, state = to_haiku(variables, version)
    expected_gradients, (expected_logits, new) = peer_gradients(params, state, images)
    expected = {"eval": evaluate(params, state), "train": expected_logits}
    assert_same({"eval": evaluated, "train": logits}, expected)

    def flat(tree):
      return {(n, k): np.asarray(x) for n, v in tree.items() for k, x in v.items()}

    actual, _ = to_haiku(gradients, version)
    assert_same(flat(actual), flat(expected_gradients), 1e-10)
    # Haiku's averages are debiased; what it averages is what is kept here.
    _, kept = to_haiku(statistics, version)
    for name, value in kept.items():
      np.testing.assert_allclose(value["hidden"], new[name]["hidden"], rtol=1e-11)
