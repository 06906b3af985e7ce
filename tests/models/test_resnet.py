"""ResNets for ImageNet, against the literature."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from skipinit_jax import methods
from skipinit_jax.errors import UsageError
from skipinit_jax.models import ResNet

IMAGES = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)


@functools.cache
def shapes(depth, method, version):
  model = ResNet(depth, 1000, methods.get(method), version)
  return jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES, train=False))


def count(depth, method, version):
  leaves = jax.tree.leaves(shapes(depth, method, version)["params"])
  return sum(leaf.size for leaf in leaves)


@pytest.mark.parametrize(
  ("depth", "version", "number"),
  [
    # torchvision's resnet18, resnet34, resnet50, resnet101 and resnet152; timm's
    # resnet200.
    (18, 1, 11_689_512),
    (34, 1, 21_797_672),
    (50, 1, 25_557_032),
    (101, 1, 44_549_160),
    (152, 1, 60_192_808),
    (200, 1, 64_673_832),
    # timm's resnetv2_50, resnetv2_101 and resnetv2_152.
    (50, 2, 25_549_352),
    (101, 2, 44_541_480),
    (152, 2, 60_185_128),
  ],
)
def test_parameters_as_in_the_literature(depth, version, number):
  assert count(depth, "batch_norm", version) == number


# A ResNet-50 normalizes 26,560 features, with a scale and a bias each.
PLAIN_50 = 25_557_032 - 2 * 26_560


def test_parameters_of_other_methods_by_what_they_add():
  for version in (1, 2):
    assert count(50, "unnormalized", version) == PLAIN_50
    assert count(50, "skipinit", version) == PLAIN_50 + 16
    assert count(50, "output_batch_norm", version) == PLAIN_50 + 2 * 2048
  # Without batch normalization's scales, and without a bias of the stem's 64 features.
  assert count(50, "skipinit_biases", 1) == PLAIN_50 + 26_560 - 64 + 16
  assert count(50, "skipinit_biases", 2) == PLAIN_50 + 26_560 - 64 + 16
  # Zhang, Dauphin & Ma: six biases and a multiplier a block, one bias after the stem,
  # one before the classifier.
  assert count(50, "fixup", 1) == PLAIN_50 + 7 * 16 + 2
  # Its basic blocks have two biases less.
  assert count(18, "fixup", 1) == count(18, "unnormalized", 1) + 5 * 8 + 2


@pytest.mark.parametrize(("name", "version"), [("fixup", 1), ("skipinit", 2)])
def test_version_is_the_method_s_own(name, version):
  assert ResNet(18, 5, methods.get(name)).version == version
  assert ResNet(18, 5, methods.get(name), 3 - version).version == 3 - version


@pytest.mark.parametrize(("method", "version"), [("batch_norm", 1), ("skipinit", 2)])
def test_classifier_starts_at_zero(method, version):
  model = ResNet(50, 5, methods.get(method), version)
  # The rest of the initialization is not compiled, because nothing needs it.
  init = jax.jit(
    lambda key: model.init(key, IMAGES, train=False)["params"]["head"]["classifier"]
  )
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(init(jax.random.key(0))))


def test_fixup_initialization():
  model = ResNet(50, 5, methods.get("fixup"), version=1)

  # The other layers' initialization is not compiled, because nothing needs it.
  @jax.jit
  def init(key):
    params = model.init(key, IMAGES, train=False)["params"]
    names = ("stem", "stage2_first", "stage4_rest", "head")
    return {name: params[name] for name in names}

  params = init(jax.random.key(0, impl="rbg"))
  # Sixteen blocks of three layers: weights times 16^(-1/4), one half.
  block, rest = params["stage2_first"], params["stage4_rest"]["blocks"]
  for layer, variance in (
    (params["stem"], 2 / (64 * 49)),
    (block["conv1"], 2 / 128 / 4),
    (block["conv2"], 2 / (128 * 9) / 4),
    (block["projection"], 2 / 512),
    (rest["conv2"], 2 / (512 * 9) / 4),
  ):
    kernel = layer["kernel"]
    error = 5 * np.sqrt(2 / kernel.size)
    np.testing.assert_allclose(np.var(kernel), variance, rtol=error)
  for layer in (block["conv3"], rest["conv3"], params["head"]["classifier"]):
    assert not np.any(layer["kernel"])


def test_a_stem_s_normalizer_of_nnx_is_one_sentence():
  method = methods.Method("mine", "Mine", normalizer=nnx.LayerNorm)
  model = ResNet(50, 2, method, version=1)
  with pytest.raises(UsageError, match=r"give flax\.linen\.LayerNorm"):
    jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES, train=False))
