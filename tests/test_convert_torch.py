"""Converted networks against timm's own: the same logits."""

import copy
import functools

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from skipinit_jax import convert, methods
from skipinit_jax.errors import UsageError
from skipinit_jax.models import ResNet, scan_variables
from skipinit_jax.training import load_weights
from tests.peers.common import random_variables, torchvision

torch = pytest.importorskip(
  "torch", reason="needs PyTorch: .venv/bin/pip install torch==2.13.0"
)
nn = torch.nn

NUM_CLASSES = 7
# At several stages the sizes are odd, where the windows of strides differ: 47 becomes
# 24, 12, 6, 3 and 2, 58 becomes 29, 15, 8, 4 and 2.
IMAGES = np.random.default_rng(0).normal(size=(2, 47, 58, 3)).astype(np.float32)
IMAGES[1] *= 4


def assert_same_logits(model, variables, network):
  run = jax.jit(
    lambda variables: model.apply(variables, IMAGES, train=False),
    # Compiles in half the time.
    compiler_options={"xla_backend_optimization_level": 1},
  )
  with torch.no_grad():
    expected = network(torch.from_numpy(IMAGES.transpose(0, 3, 1, 2))).numpy()
  # Measured by what tells images apart, because biases alone make logits too.
  difference = np.abs(expected[0] - expected[1]).max()
  assert difference > 0.1
  np.testing.assert_allclose(run(variables), expected, rtol=0, atol=1e-5 * difference)


@pytest.fixture(scope="module")
def timm():
  with torchvision():
    yield pytest.importorskip(
      "timm",
      reason="needs timm: .venv/bin/pip install timm==1.0.31 --no-deps, and "
      "huggingface_hub",
    )


def randomize(network):
  """Makes a network of which no array is at its initial value, in evaluation mode."""
  torch.manual_seed(0)
  with torch.no_grad():
    for name, array in [*network.named_parameters(), *network.named_buffers()]:
      if array.dtype.is_floating_point and array.ndim != 2:
        array.uniform_(0.7, 1.3)
      if name.endswith(("bias", "running_mean")):
        array.normal_(std=0.1)
      if name.endswith(".weight") and array.ndim == 4:
        nn.init.kaiming_normal_(array, nonlinearity="relu")
  return network.eval()


@pytest.fixture(scope="module")
def network(timm):
  """A ResNet-50, by torchvision's names."""
  return randomize(timm.create_model("resnet50", num_classes=NUM_CLASSES))


@pytest.fixture(scope="module")
def converted(network):
  return convert.from_torchvision(network.state_dict())


def test_is_a_copy(network, converted):
  _, variables = converted
  mean = variables["batch_stats"]["stem_norm"]["mean"]
  before = mean.copy()
  there = network.bn1.running_mean
  there += 1
  np.testing.assert_array_equal(mean, before)
  there.copy_(torch.from_numpy(before))


def test_parameters_in_bfloat16(network):
  half = copy.deepcopy(network).to(torch.bfloat16)
  wrapped = {"state_dict": dict(half.named_parameters()) | dict(half.named_buffers())}
  model, variables = convert.from_torchvision(wrapped)
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(variables)} == {"bfloat16"}
  again = convert.to_torchvision(model, variables)
  for name, parameter in half.named_parameters():
    there = parameter.detach().float().numpy()
    np.testing.assert_array_equal(again[name].astype(np.float32), there, name)


def test_networks_themselves_and_wrapped_ones(network, converted):
  _, expected = converted
  wrapped = nn.DataParallel(torch.compile(network, backend="eager"))
  for checkpoint in (wrapped, {"model": network, "epoch": 3}):
    _, variables = convert.from_torchvision(checkpoint)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)


def test_training_begins_with_the_weights_of_files(network, converted, tmp_path):
  model, expected = converted
  torch.save({"state_dict": nn.DataParallel(network).state_dict()}, tmp_path / "a.pth")
  arrays = convert.to_torchvision(model, expected)
  safetensors.numpy.save_file(arrays, tmp_path / "b.safetensors")
  for name in ("a.pth", "b.safetensors"):
    variables, _ = load_weights(str(tmp_path / name), model, (32, 32, 3))
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
  other = model.clone(num_classes=5)
  weights = load_weights(str(tmp_path / "a.pth"), other, (32, 32, 3))
  assert "head" not in weights.variables["params"]
  assert weights.description.endswith("classifier: 7 classes there, 5 classes here")
  # Without symmetric padding the same weights would be another network.
  torch.save(network, tmp_path / "network.pt")
  (tmp_path / "text.pt").write_text("text")
  for name, there, message in (
    ("a.pth", model.clone(symmetric_padding=False), "symmetric_padding is False"),
    ("network.pt", model, "cannot read weights alone"),
    ("text.pt", model, "cannot read weights alone"),
  ):
    with pytest.raises(UsageError, match=message) as error:
      load_weights(str(tmp_path / name), there, (32, 32, 3))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "name", ["resnet50", "resnetv2_50", "nf_resnet50", "nf_resnet50 skipinit"]
)
def test_from_and_to_timm(timm, name):
  name, *skipinit = name.split()
  network = randomize(
    timm.create_model(name, num_classes=NUM_CLASSES, **dict.fromkeys(skipinit, True))
  )
  model, variables = convert.from_timm(network.state_dict())
  assert_same_logits(model, variables, network)
  convert.require_timm(model)
  state_dict = convert.to_timm(model, variables)
  there = network.state_dict()
  assert state_dict.keys() == there.keys()
  for key, tensor in there.items():
    np.testing.assert_allclose(state_dict[key], tensor.numpy(), rtol=1e-6, err_msg=key)


def test_skipinit_to_timm(timm):
  method = methods.get("regularized_skipinit")
  model = ResNet(50, NUM_CLASSES, method, symmetric_padding=True)
  flat = random_variables(model, IMAGES)
  variables = scan_variables(traverse_util.unflatten_dict(flat))
  network = timm.models.resnetv2.ResNetV2(
    layers=[3, 4, 6, 3],
    num_classes=NUM_CLASSES,
    conv_layer=functools.partial(timm.layers.create_conv2d, bias=True),
    norm_layer=lambda features, **_: nn.ReLU(),
  ).eval()
  state_dict = convert.to_timm(model, variables)
  network.load_state_dict({k: torch.from_numpy(v) for k, v in state_dict.items()})
  assert_same_logits(model, variables, network)
