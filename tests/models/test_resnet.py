"""ResNets for ImageNet, against the literature."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
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


def test_normalizers_of_the_two_versions():
  def names(version):
    params = shapes(50, "batch_norm", version)["params"]
    found = jax.tree_util.tree_leaves_with_path(params)
    paths = [tuple(k.key for k in p) for p, _ in found if p[-1].key == "scale"]
    stage = {p[-2] for p in paths if p[0] == "stage1_first"}
    return stage, {p[0] for p in paths if p[0] in ("stem_norm", "head")}

  # Version 1: after each convolution. Version 2: before each activation.
  after = {"norm2", "norm3", "norm4", "projection_norm"}
  assert names(1) == (after, {"stem_norm"})
  assert names(2) == ({"norm1", "norm2", "norm3"}, {"head"})


@pytest.mark.parametrize(("name", "version"), [("fixup", 1), ("skipinit", 2)])
def test_version_is_the_method_s_own(name, version):
  assert ResNet(18, 5, methods.get(name)).version == version
  assert ResNet(18, 5, methods.get(name), 3 - version).version == 3 - version


@pytest.mark.parametrize("stem", [True, False])
def test_padding_of_flax_s_example_is_mixed(random_variables, stem):
  """Its stem pads both sides alike, and everything else is SAME."""
  model = ResNet(18, 5, methods.get("skipinit"), symmetric_stem=stem)
  variables = random_variables(model, IMAGES, train=False)
  _, state = jax.jit(functools.partial(apply, model))(variables, IMAGES)

  def convolve(x, kernel, size):
    padding = [(size // 2, size // 2)] * 2 if size else "SAME"
    return jax.lax.conv_general_dilated(
      x, kernel, (2, 2), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  params, found = variables["params"], state["intermediates"]
  expected = convolve(IMAGES, params["stem"]["kernel"], 7 * stem)
  actual = found["stem"]["__call__"][0]
  np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)
  # The first layer with strides behind the stem.
  x = nn.relu(found["stage1_rest"]["__call__"][0])
  block = found["stage2_first"]["conv1"]["__call__"][0]
  expected = convolve(x, params["stage2_first"]["conv1"]["kernel"], 0)
  np.testing.assert_allclose(block, expected, rtol=1e-3, atol=1e-3)


def apply(model, variables, images):
  # The stem and the first block are captured, so that their wiring can be checked.
  return model.apply(
    variables,
    images,
    train=False,
    mutable=["intermediates"],
    capture_intermediates=lambda module, _: (
      module.name
      in ("stem", "stage1_first", "stage1_rest", "stage4_rest", "projection", "head")
      or module.path == ("stage2_first", "conv1")
    ),
  )


@pytest.mark.parametrize("version", [1, 2])
def test_stem_and_head(random_variables, version):
  method = methods.get("fixup" if version == 1 else "skipinit_one")
  # The images' 64 pixels are even: SAME pads 2 and 3 of them, and 0 and 1.
  symmetric = version == 1
  model = ResNet(50, 5, method, version, symmetric_padding=symmetric)
  variables = random_variables(model, IMAGES, train=False)
  run = jax.jit(functools.partial(apply, model))
  logits, state = run(variables, IMAGES)
  params, found = variables["params"], state["intermediates"]

  stem = jax.lax.conv_general_dilated(
    IMAGES,
    params["stem"]["kernel"],
    (2, 2),
    [(3, 3), (3, 3)] if symmetric else [(2, 3), (2, 3)],
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  np.testing.assert_allclose(found["stem"]["__call__"][0], stem, rtol=1e-3, atol=1e-3)
  if version == 1:
    stem = nn.relu(stem + params["stem_bias"]["bias"])
  low = 1 if symmetric else 0
  edge = jnp.pad(stem, [(0, 0), (low, 1), (low, 1), (0, 0)], constant_values=-jnp.inf)
  pooled = nn.max_pool(edge, (3, 3), (2, 2), padding="VALID")
  # The projection sees what enters the first block: raw in version 1, with Fixup's
  # bias, and activated in version 2.
  first = params["stage1_first"]
  pooled = pooled + first["layer_bias1"]["bias"] if version == 1 else nn.relu(pooled)
  projected = jnp.einsum("nhwi,io->nhwo", pooled, first["projection"]["kernel"][0, 0])
  actual = found["stage1_first"]["projection"]["__call__"][0]
  assert actual.shape == (1, 16, 16, 256)
  np.testing.assert_allclose(actual, projected, rtol=1e-3, atol=1e-3)

  features = found["stage4_rest"]["__call__"][0]
  assert features.shape == (1, 2, 2, 2048)
  mean = np.maximum(features, 0).mean((1, 2))
  if version == 1:
    # Version 1's blocks end with the activation.
    assert np.min(features) >= 0
    mean = mean + params["head"]["classifier_bias"]["bias"]
  classifier = params["head"]["classifier"]
  expected = mean @ classifier["kernel"] + classifier["bias"]
  np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
  ("method", "version"), [("batch_norm", 1), ("skipinit", 2), ("fixup", 2)]
)
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


@pytest.mark.parametrize("version", [1, 2])
def test_a_normalizer_of_nnx_is_one_sentence(version):
  model = ResNet(
    50, 2, methods.Method("mine", "Mine", normalizer=nnx.LayerNorm), version
  )
  with pytest.raises(UsageError, match=r"give flax\.linen\.LayerNorm"):
    jax.eval_shape(
      lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
    )
