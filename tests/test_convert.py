"""PyTorch's layout: names, shapes, errors; tests/test_convert_torch.py has logits."""

import jax
import numpy as np
import pytest

from skipinit_jax import convert, methods
from skipinit_jax.errors import UsageError
from skipinit_jax.models import ResNet, unroll_variables

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


def test_both_ways_is_the_same_again():
  model = MODEL.clone(depth=101)
  variables = make_variables(model)
  state_dict = convert.to_torchvision(model, variables)
  # The layers of the name and four projections; all but the last are a kernel and
  # the five arrays of a normalizer.
  assert len(state_dict) == 6 * (101 - 1 + 4) + 2
  unrolled = convert.to_torchvision(
    model.clone(scan=False), unroll_variables(variables)
  )
  jax.tree.map(np.testing.assert_array_equal, unrolled, state_dict)
  restored, again = convert.from_torchvision(state_dict)
  assert restored == model
  assert jax.tree.structure(again) == jax.tree.structure(variables)
  jax.tree.map(np.testing.assert_array_equal, again, variables)


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


def test_old_checkpoints_of_grey_images(variables):
  kernel = variables["params"]["stem"]["kernel"][:, :, :1]
  grey = variables | {"params": variables["params"] | {"stem": {"kernel": kernel}}}
  state_dict = convert.to_torchvision(MODEL, grey)
  # They have no counters.
  old = without(state_dict, "tracked")
  assert len(old) == 320 - 53
  _, again = convert.from_torchvision(old)
  jax.tree.map(np.testing.assert_array_equal, again, grey)


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
    (lambda s: without(s, "layer3.5."), r"have \(3, 4, 5, 3\) blocks .*: conv"),
    (lambda s: {"state_dict": s}, r"have \(0, 0, 0, 0\) blocks"),
    # A network of basic blocks: ResNet-34 has as many as ResNet-50.
    (lambda s: without(s, "conv3", "bn3"), r"and \d+ more such problems\.$"),
  ],
)
def test_bad_state_dict(state_dict, change, message):
  with pytest.raises(UsageError, match=message) as error:
    convert.from_torchvision(change(state_dict))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("model", "message"),
  [
    (MODEL.clone(version=2), "version is 2, but torchvision's networks have 1"),
    (MODEL.clone(symmetric_padding=False), "symmetric_padding is False"),
    (MODEL.clone(method=methods.get("batch_norm_divide_by_sqrt2")), "sum_scale is 0.7"),
    (MODEL.clone(method=methods.get("fixup")), "method.alpha is 1.0"),
    (MODEL.clone(num_classes=5), r"kernel' has shape \(2048, 3\), not \(2048, 5"),
  ],
)
def test_other_networks_are_refused(variables, model, message):
  with pytest.raises(UsageError, match=message):
    convert.to_torchvision(model, variables)
