"""Networks without normalization against timm's classes."""

import dataclasses
import functools
import importlib.util

import numpy as np
import pytest
from flax import linen as nn

from skipinit_jax import layers, methods, models
from skipinit_jax.models import resnet
from tests.peers.common import (
  FLOAT64,
  assert_same,
  float64,
  place_of_block,
  random_variables,
  run,
  to_torch,
  torchvision,
)

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[peers]'")

# What NF-ResNet's paper gives by measurement, where theory is 0.06 % below.
GAIN = 1.7139588594436646
BLOCKS = (2, 1, 1, 1)
OUTSIDE = {"stem": "stem.conv", "head": "head.fc"}
LEAVES = {"kernel": "weight", "scale": "gain", "bias": "bias"}


@pytest.fixture(scope="module")
def nfnet():
  """timm's module of networks without normalization."""
  if importlib.util.find_spec("timm") is None:
    pytest.skip("needs timm: pip install --no-deps timm")
  with torchvision():
    yield importlib.import_module("timm.models.nfnet")


def mend(network):
  """Gives transitions the paper's shortcut (timm averages first), and ReLU a gradient.

  timm's scaled ReLU overwrites what its gradient needs.
  """
  for module in network.modules():
    if type(module).__name__ == "GammaAct":
      module.forward = lambda x: torch.relu(x) * GAIN
    if type(module).__name__ == "DownsampleAvg":
      if not isinstance(module.pool, torch.nn.Identity):
        module.conv.stride = (2, 2)
      module.pool = torch.nn.Identity()


def torch_run(network, images, labels):
  """Returns logits and gradients by name, the network being in float64."""
  logits = network(torch.tensor(images.transpose(0, 3, 1, 2)))
  torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).backward()
  return logits.detach().numpy(), {
    name: parameter.grad.numpy() for name, parameter in network.named_parameters()
  }


def timm_name(path):
  """Returns timm's name of one of our parameters."""
  _, *names, leaf = path
  if names[0] in OUTSIDE:
    return f"{OUTSIDE[names[0]]}.{LEAVES[leaf]}"
  stage, block, (name,) = place_of_block(names)
  layer = {"projection": "downsample.conv", "branch_scale": ""}.get(name, name)
  place = f"stages.{stage}.{block}."
  return place + (f"{layer}.{LEAVES[leaf]}" if layer else "skipinit_gain")


def as_timm(parameters):
  def shaped(path, array):
    # A gain has the axes of a kernel.
    return array.reshape(-1, 1, 1, 1) if path[-1] == "scale" else to_torch(path, array)

  return {timm_name(path): shaped(path, array) for path, array in parameters.items()}


def test_nf_resnet(monkeypatch, nfnet):
  monkeypatch.setitem(resnet.STAGE_BLOCKS, 50, BLOCKS)
  rng = np.random.default_rng(1)
  images, labels = rng.normal(size=(2, 40, 40, 3)), np.array([0, 4])
  network = nfnet.NormFreeNet(
    nfnet.NfCfg(
      depths=BLOCKS,
      channels=(256, 512, 1024, 2048),
      stem_type="7x7_pool",
      stem_chs=64,
      bottle_ratio=0.25,
      act_layer="relu",
      gamma_in_act=True,
      std_conv_eps=1e-30,
      # Not its default; without it, `alpha=None` is the same.
      skipinit=True,
    ),
    num_classes=5,
  ).double()
  mend(network)
  method = dataclasses.replace(
    methods.get("nf_resnet"), activation=lambda x: nn.relu(x) * GAIN
  )
  with float64():
    model = models.ResNet(50, 5, method, scan=False, symmetric_padding=True, **FLOAT64)
    variables = random_variables(model, images)
    _, logits, gradients, _ = run(model, variables, images, labels, evaluate=False)
  network.load_state_dict({n: torch.tensor(x) for n, x in as_timm(variables).items()})
  expected, expected_gradients = torch_run(network, images, labels)
  assert_same({"logits": logits}, {"logits": expected})
  assert_same(as_timm(gradients), expected_gradients, 1e-10)


class Blocks(nn.Module):
  """A transition and a block that keeps the shape, with SkipInit."""

  @nn.compact
  def __call__(self, x, train):
    block = functools.partial(
      models.BottleneckBlock,
      4,
      use_bias=True,
      branch_scale=functools.partial(layers.SkipInit, param_dtype=np.float64),
      conv=functools.partial(models.blocks.symmetric_conv, layers.Conv),
      **FLOAT64,
    )
    x = block(strides=2, name="stage1_first")(x)
    return models.DepthStack(block, 1, scan=False, name="stage1_rest")(x).mean((1, 2))


def test_skipinit(nfnet):
  rng = np.random.default_rng(1)
  images, labels = rng.normal(size=(3, 8, 8, 6)), np.array([0, 4, 15])

  def conv(inputs, outputs, size, stride=1, gain_init=None, **fields):
    # Not standardized: De & Smith's.
    return torch.nn.Conv2d(inputs, outputs, size, stride, size // 2, **fields)

  make = functools.partial(
    nfnet.NormFreeBlock,
    out_chs=16,
    reg=False,
    skipinit=True,
    act_layer=lambda inplace=False: torch.nn.ReLU(),
    conv_layer=conv,
  )
  network = torch.nn.Module()
  network.stages = torch.nn.ModuleList(
    [torch.nn.Sequential(make(6, stride=2), make(16))]
  )
  network.forward = lambda x: network.stages[0](x).mean((2, 3))
  network.double()
  mend(network)
  with float64():
    variables = random_variables(Blocks(), images)
    _, logits, gradients, _ = run(Blocks(), variables, images, labels, evaluate=False)
  network.load_state_dict({n: torch.tensor(x) for n, x in as_timm(variables).items()})
  expected, expected_gradients = torch_run(network, images, labels)
  assert_same({"logits": logits}, {"logits": expected})
  assert_same(as_timm(gradients), expected_gradients)
