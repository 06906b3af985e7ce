"""Converted networks against PyTorch's own: the same logits."""

import functools

import jax
import numpy as np
import pytest
import safetensors.numpy

from skipinit_jax import convert, methods
from skipinit_jax.errors import UsageError
from skipinit_jax.models import ResNet
from skipinit_jax.training import load_weights
from tests.peers.common import torchvision

torch = pytest.importorskip(
  "torch", reason="needs PyTorch: .venv/bin/pip install torch==2.13.0"
)
nn = torch.nn

# As torchvision's.
STAGE_BLOCKS = (3, 4, 6, 3)
NUM_CLASSES = 7
# Compiles in half the time.
LESS_OPTIMIZED = {"xla_backend_optimization_level": 1}


class Bottleneck(nn.Module):
  """A block with torchvision's names, and the stride where torchvision has it."""

  def __init__(self, inputs, features, stride):
    super().__init__()
    outputs = 4 * features
    self.conv1 = nn.Conv2d(inputs, features, 1, bias=False)
    self.bn1 = nn.BatchNorm2d(features)
    self.conv2 = nn.Conv2d(features, features, 3, stride, padding=1, bias=False)
    self.bn2 = nn.BatchNorm2d(features)
    self.conv3 = nn.Conv2d(features, outputs, 1, bias=False)
    self.bn3 = nn.BatchNorm2d(outputs)
    self.downsample = None
    if stride != 1 or inputs != outputs:
      projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
      self.downsample = nn.Sequential(projection, nn.BatchNorm2d(outputs))

  def forward(self, x):
    shortcut = x if self.downsample is None else self.downsample(x)
    y = self.bn1(self.conv1(x)).relu()
    y = self.bn2(self.conv2(y)).relu()
    return (shortcut + self.bn3(self.conv3(y))).relu()


class TorchResNet(nn.Module):
  """torchvision's ResNet-50, of PyTorch's public layers."""

  def __init__(self):
    super().__init__()
    self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
    self.bn1 = nn.BatchNorm2d(64)
    self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
    inputs = 64
    for stage, num_blocks in enumerate(STAGE_BLOCKS):
      features = 64 * 2**stage
      blocks = []
      for index in range(num_blocks):
        stride = 2 if stage > 0 and index == 0 else 1
        blocks.append(Bottleneck(inputs, features, stride))
        inputs = 4 * features
      self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
    self.fc = nn.Linear(inputs, NUM_CLASSES)

  def forward(self, x):
    x = self.maxpool(self.bn1(self.conv1(x)).relu())
    x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
    return self.fc(x.mean((2, 3)))


def make_network(seed=0):
  """A network in evaluation mode, none of its arrays at its initial value."""
  torch.manual_seed(seed)
  network = TorchResNet().eval()
  for module in network.modules():
    if isinstance(module, nn.Conv2d):
      nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    if isinstance(module, nn.BatchNorm2d):
      # Such branches neither blow up the features nor drown them in biases.
      nn.init.uniform_(module.weight, 0.5, 1.0)
      nn.init.normal_(module.bias, std=0.1)
      module.running_mean.normal_(std=0.1)
      module.running_var.uniform_(0.5, 1.5)
  return network


def torch_logits(network, images):
  with torch.no_grad():
    return network(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()


def jax_logits(model, variables, images):
  run = jax.jit(
    lambda variables, images: model.apply(variables, images, train=False),
    compiler_options=LESS_OPTIMIZED,
  )
  return np.asarray(run(variables, images))


def assert_same(actual, expected):
  # Measured by what tells images apart, because biases alone make logits too.
  difference = np.abs(expected[0] - expected[1]).max()
  assert difference > 0.1
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * difference)


@pytest.fixture(scope="module")
def network():
  return make_network()


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
  half = make_network().to(torch.bfloat16)
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


@pytest.mark.parametrize(
  "name", ["resnet50", "resnetv2_50", "nf_resnet50", "nf_resnet50 skipinit"]
)
def test_from_and_to_timm(timm, name):
  name, *skipinit = name.split()
  network = randomize(
    timm.create_model(name, num_classes=NUM_CLASSES, **dict.fromkeys(skipinit, True))
  )
  model, variables = convert.from_timm(network.state_dict())
  # Small and odd sizes, at which the windows of strides differ.
  images = make_images(47, 58)
  assert_same(jax_logits(model, variables, images), torch_logits(network, images))
  convert.require_timm(model)
  state_dict = convert.to_timm(model, variables)
  there = network.state_dict()
  assert state_dict.keys() == there.keys()
  for key, tensor in there.items():
    np.testing.assert_allclose(state_dict[key], tensor.numpy(), rtol=1e-6, err_msg=key)


def test_skipinit_to_timm(timm):
  resnetv2 = pytest.importorskip("timm.models.resnetv2")
  method = methods.get("regularized_skipinit")
  model = ResNet(50, NUM_CLASSES, method, symmetric_padding=True)
  images = make_images(47, 58)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if path[-1].key == "kernel":
      fan_in = np.prod(leaf.shape[-4:-1] if leaf.ndim > 2 else leaf.shape[:1])
      return rng.normal(0, (2 / fan_in) ** 0.5, leaf.shape).astype(np.float32)
    return rng.uniform(0.1, 0.5, leaf.shape).astype(np.float32)

  variables = jax.tree.map_with_path(draw, shapes)
  network = resnetv2.ResNetV2(
    layers=[3, 4, 6, 3],
    num_classes=NUM_CLASSES,
    conv_layer=functools.partial(timm.layers.create_conv2d, bias=True),
    norm_layer=lambda features, **_: nn.ReLU(),
  ).eval()
  state_dict = convert.to_timm(model, variables)
  network.load_state_dict({k: torch.from_numpy(v) for k, v in state_dict.items()})
  assert_same(torch_logits(network, images), jax_logits(model, variables, images))


def make_images(height, width):
  rng = np.random.default_rng(0)
  images = rng.normal(size=(2, height, width, 3)) * [[[[1.0]]], [[[4.0]]]]
  return images.astype(np.float32)


# At several stages the sizes are odd: 47 becomes 24, 12, 6, 3 and 2, 58 becomes 29,
# 15, 8, 4 and 2.
def test_from_torchvision(network, converted):
  model, variables = converted
  images = make_images(47, 58)
  actual = jax_logits(model, variables, images)
  assert actual.shape == (2, NUM_CLASSES)
  assert_same(actual, torch_logits(network, images))


def test_to_torchvision(network, converted):
  state_dict = convert.to_torchvision(*converted)
  tensors = {name: torch.from_numpy(array) for name, array in state_dict.items()}
  make_network(seed=1).load_state_dict(tensors, strict=True)
  # The counters of batches do not count.
  for name, tensor in network.state_dict().items():
    assert tensor.dtype == torch.int64 or torch.equal(tensors[name], tensor), name
