"""PyTorch's layout: names, shapes, errors; tests/test_convert_torch.py has logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn

from skipinit_jax import convert, layers, methods
from skipinit_jax.errors import UsageError
from skipinit_jax.models import ResNet, WideResNet, unroll_variables
from skipinit_jax.training import TrainConfig, load_weights

MODEL = ResNet(50, 3, methods.get("batch_norm"), version=1, symmetric_padding=True)


def make_variables(model):
  """Variables of the model's shapes, each number another one."""
  images = np.zeros((1, 32, 32, 3), np.float32)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: rng.random(s.shape, np.float32), shapes)


@pytest.fixture(scope="module")
def variables():
  return make_variables(MODEL)


@pytest.fixture(scope="module")
def state_dict(variables):
  return convert.to_torchvision(MODEL, variables)


NF = ResNet(
  50, 3, methods.get("nf_resnet"), symmetric_padding=True, average_projection=True
)


@pytest.mark.parametrize(
  ("model", "names"),
  [
    (MODEL.clone(depth=101), {"layer4.2.bn3.running_var": (2048,)}),
    # Its first stage has no projection.
    (MODEL.clone(depth=18), {"fc.weight": (3, 512)}),
    (
      MODEL.clone(version=2),
      {"stages.3.blocks.2.norm3.bias": (512,), "head.fc.weight": (3, 2048, 1, 1)},
    ),
    (NF, {"stages.3.2.conv3.gain": (2048, 1, 1, 1), "stages.0.0.skipinit_gain": ()}),
  ],
)
def test_both_ways_is_the_same_again(model, names):
  variables = make_variables(model)
  state_dict = convert.to_timm(model, variables)
  for name, shape in names.items():
    assert state_dict[name].shape == shape
  restored, again = convert.from_timm(state_dict)
  assert restored == model
  # timm's gains are not the same numbers.
  assert_close = functools.partial(
    np.testing.assert_allclose, rtol=1e-6 if model is NF else 0
  )
  jax.tree.map(assert_close, again, variables)


def test_layout(variables, state_dict):
  kernel = variables["params"]["stage3_rest"]["blocks"]["conv2"]["kernel"]
  there = state_dict["layer3.4.conv2.weight"]
  assert there.shape == (256, 256, 3, 3)
  assert there[7, 11, 0, 2] == kernel[3, 0, 2, 11, 7]
  assert there.flags.c_contiguous
  dense = variables["params"]["head"]["classifier"]["kernel"]
  assert state_dict["fc.weight"].shape == (3, 2048)
  assert state_dict["fc.weight"][2, 5] == dense[5, 2]
  statistics = variables["batch_stats"]["stage2_first"]["projection_norm"]
  there = state_dict["layer2.0.downsample.1.running_var"]
  np.testing.assert_array_equal(there, statistics["var"])
  assert state_dict["bn1.num_batches_tracked"].dtype == np.int64
  unrolled = MODEL.clone(scan=False), unroll_variables(variables)
  there = convert.to_torchvision(*unrolled)
  jax.tree.map(np.testing.assert_array_equal, there, state_dict)


def test_old_checkpoints_of_grey_images(variables):
  kernel = variables["params"]["stem"]["kernel"][:, :, :1]
  grey = variables | {"params": variables["params"] | {"stem": {"kernel": kernel}}}
  state_dict = convert.to_torchvision(MODEL, grey)
  # They have no counters.
  old = without(state_dict, "tracked")
  assert len(old) == 320 - 53
  _, again = convert.from_torchvision(old)
  jax.tree.map(np.testing.assert_array_equal, again, grey)


def prefixed(prefix, state_dict):
  return {prefix + name: array for name, array in state_dict.items()}


@pytest.mark.parametrize(
  "wrap",
  [
    lambda s: {"epoch": 3, "state_dict": prefixed("module.", s), "optimizer": {}},
    lambda s: {"model": prefixed("module._orig_mod.", s), "n": 1},
    lambda s: {"state_dict": {"model": prefixed("backbone.model.", s)}},
    # As PyTorch's averages have it, and with one compiled layer.
    lambda s: prefixed("module.", s) | {"n_averaged": np.zeros((), np.int64)},
    lambda s: {k.replace("layer1.", "layer1._orig_mod."): v for k, v in s.items()},
  ],
)
def test_what_wraps_weights_is_taken_off(variables, state_dict, wrap):
  model, again = convert.from_torchvision(wrap(state_dict))
  assert model == MODEL
  jax.tree.map(np.testing.assert_array_equal, again, variables)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float64])
def test_dtypes_stay(state_dict, dtype):
  there = {name: array.astype(dtype) for name, array in state_dict.items()}
  model, variables = convert.from_torchvision(there)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(dtype)}
  again = convert.to_torchvision(model, variables)
  for name in ("layer1.1.conv2.weight", "layer3.4.bn1.running_var"):
    np.testing.assert_array_equal(again[name], there[name])


@pytest.mark.parametrize(
  ("parts", "num_classes", "expected"), [(("fc.",), None, 1000), ((), 7, 7)]
)
def test_a_classifier_that_is_not_there_is_new(
  variables, state_dict, parts, num_classes, expected
):
  there = prefixed("module.", without(state_dict, *parts))
  model, again = convert.from_torchvision(there, num_classes)
  assert model == MODEL.clone(num_classes=expected)
  head = again["params"].pop("head")["classifier"]
  assert head["kernel"].shape == (2048, expected) and head["bias"].shape == (expected,)
  assert not head["kernel"].any() and not head["bias"].any()
  rest = {name: v for name, v in variables["params"].items() if name != "head"}
  jax.tree.map(np.testing.assert_array_equal, again["params"], rest)


def without(state_dict, *parts):
  """Leaves out each name that has one of some parts."""
  return {k: v for k, v in state_dict.items() if not any(part in k for part in parts)}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda s: without(s, "layer2.1.bn3.running_var"),
      r"ResNet-50: 'layer2.1.bn3.running_var' is missing\.$",
    ),
    (
      lambda s: s | {"layer1.0.se.weight": np.zeros(3)},
      r"ResNet-50: 'layer1.0.se.weight' is unknown\.$",
    ),
    (lambda s: s | {"fc.bias": np.zeros((4,))}, r"shape \(3, 2048\), not \(4, 2048\)"),
    (
      lambda s: without(s, "layer3.5.") | {"se.weight": np.zeros(3)},
      r"\(3, 4, 5, 3\) blocks .* 'layer3.5.conv1.weight', .* missing, 'se.weight' is",
    ),
    (lambda s: {"weights": [s]}, r"\(0, 0, 0, 0\) blocks .*, 'weights' is unknown\.$"),
    (lambda s: without(s, "fc.bias"), r": 'fc.bias' is missing\.$"),
    (lambda s: s | {"bn1.bias": [[1], [2, 3]]}, r"'bn1.bias' .* is no dense array"),
    (lambda s: s | {"module.bn1.bias": 0}, r"two arrays 'bn1.bias'"),
    (lambda s: {"model": [*s]}.get("model"), r"are a list: they must be a dict"),
    # With basic blocks it would be a ResNet-34, which has as many.
    (
      lambda s: without(s, "conv3", "bn3"),
      r"ResNet-34: 'layer1.0.downsample.1.running_mean', .* unknown, .* and 24 more",
    ),
  ],
)
def test_bad_state_dict(state_dict, change, message):
  with pytest.raises(UsageError, match=message) as error:
    convert.from_torchvision(change(state_dict))
  assert "\n" not in str(error.value)


def test_training_begins_with_a_normalizer_free_network(tmp_path):
  config = TrainConfig(
    dataset="imagenet2012",
    model="resnet",
    depth=18,
    method="nf_resnet",
    alpha=1.0,
    learnable_alpha=False,
    symmetric_padding=True,
    average_projection=True,
  )
  config.validate()
  model = config.make_model(3)
  variables = make_variables(model)
  path = tmp_path / "nf.safetensors"
  safetensors.numpy.save_file(convert.to_timm(model, variables), path)
  loaded, _ = load_weights(str(path), model, (32, 32, 3))
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6), loaded, variables
  )
  with pytest.raises(UsageError, match="average_projection is False, but timm's netw"):
    load_weights(str(path), model.clone(average_projection=False), (32, 32, 3))


@pytest.mark.parametrize(
  ("name", "factor", "leaf", "depth", "last"),
  [
    ("layer_scale", 1.0, "scale", 50, "conv3"),
    ("rezero", 2.0, "alpha", 18, "conv2"),
  ],
)
def test_factors_of_branches_are_folded(name, factor, leaf, depth, last):
  method = dataclasses.replace(methods.get(name), branch_factor=factor)
  model = ResNet(depth, 3, method, symmetric_padding=True)
  variables = make_variables(model)
  first = unroll_variables(variables)["params"]["stage2_first"]
  expected = factor * first[last]["kernel"][0, 0] * first["branch_scale"][leaf]
  there = convert.to_timm(model, variables)[f"stages.1.blocks.0.{last}.weight"]
  np.testing.assert_allclose(there[:, :, 0, 0].T, expected, rtol=1e-6)


@pytest.mark.parametrize(
  ("method", "message"),
  [
    (
      {"alpha": 0.5, "learnable_alpha": False},
      "constant method.alpha is 0.5, but timm",
    ),
    ({"branch_scale": layers.LayerScale}, "method.branch_scale is .* have SkipInit"),
    ({"conv": layers.Conv}, "method.conv is "),
    ({"activation": nn.relu}, "method.activation is "),
    (
      {"branch_factor": 0.1},
      "method.branch_factor is 0.1, but timm's networks have 0.2",
    ),
  ],
)
def test_other_normalizer_free_networks_are_refused(method, message):
  with pytest.raises(UsageError, match=message):
    convert.require_timm(NF.clone(method=dataclasses.replace(NF.method, **method)))


def changed(**fields):
  return MODEL.clone(method=dataclasses.replace(MODEL.method, **fields))


@pytest.mark.parametrize(
  ("model", "message"),
  [
    (MODEL.clone(version=2), "version is 2, but torchvision's networks have 1"),
    (MODEL.clone(symmetric_padding=False), "symmetric_padding is False"),
    (MODEL.clone(method=methods.get("batch_norm_divide_by_sqrt2")), "sum_scale is 0.7"),
    (MODEL.clone(method=methods.get("fixup")), "method.alpha is 1.0"),
    (
      changed(normalizer=functools.partial(nn.BatchNorm, epsilon=1e-3)),
      "epsilon of method.normalizer is 0.001, but torchvision's networks have 1e-05",
    ),
    (changed(normalizer=nn.LayerNorm), "epsilon of method.normalizer is 1e-06"),
    (
      changed(normalizer=functools.partial(nn.RMSNorm, epsilon=1e-5)),
      "method.normalizer is .* have batch normalization",
    ),
    (changed(normalizer=None), "method.normalizer is None"),
    (changed(activation=nn.gelu), "method.activation is .* have ReLU"),
    (changed(conv=functools.partial(layers.Conv, kernel_dilation=2)), "method.conv is"),
    (changed(output_normalizer=nn.LayerNorm), "method.output_normalizer is"),
    (changed(use_bias=True), "method.use_bias is True"),
    (WideResNet(10, 1, 3, MODEL.method), "is a WideResNet"),
    (MODEL.clone(num_classes=5), r"kernel' has shape \(2048, 3\), not \(2048, 5"),
  ],
)
def test_other_networks_are_refused(variables, model, message):
  with pytest.raises(UsageError, match=message):
    convert.to_torchvision(model, variables)


def test_the_same_networks_by_other_means_are_not_refused(variables, state_dict):
  same = changed(
    normalizer=functools.partial(layers.GhostBatchNorm, ghost_batch_size=4),
    activation=lambda x: (x + abs(x)) / 2,
    conv=nn.Conv,
    dropout_rate=0.5,
  )
  there = convert.to_torchvision(same, variables)
  jax.tree.map(np.testing.assert_array_equal, there, state_dict)
