"""Wide-ResNets against one in PyTorch, and training against torch.optim."""

import collections
import functools

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util

from skipinit_jax import models
from skipinit_jax.training import TrainConfig, make_optimizer
from tests.peers.common import (
  FLOAT64,
  assert_same,
  cross_entropy,
  float64,
  random_variables,
  run,
  to_torch,
)

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[peers]'")
nn = torch.nn
LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "mean": "running_mean",
  "var": "running_var",
}
CLASSES = 5


class Alpha(nn.Module):
  def __init__(self):
    super().__init__()
    self.alpha = nn.Parameter(torch.zeros(()))

  def forward(self, x):
    return self.alpha * x


class Block(nn.Module):
  """The block of Zagoruyko & Komodakis, or De & Smith's without normalization."""

  def __init__(self, inputs, features, stride, normalized):
    super().__init__()
    norm = nn.BatchNorm2d if normalized else lambda _: nn.Identity()
    self.norm1, self.norm2 = norm(inputs), norm(features)
    self.conv1 = nn.Conv2d(inputs, features, 3, stride, padding=1, bias=False)
    self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
    self.branch_scale = nn.Identity() if normalized else Alpha()
    self.projection = None
    if stride != 1 or inputs != features:
      self.projection = nn.Conv2d(inputs, features, 1, stride, bias=False)

  def forward(self, x):
    y = self.norm1(x).relu()
    shortcut = x if self.projection is None else self.projection(y)
    y = self.conv2(self.norm2(self.conv1(y)).relu())
    return shortcut + self.branch_scale(y)


class TorchWideResNet(nn.Module):
  """A Wide-ResNet whose modules are named as ours."""

  def __init__(self, depth, width, normalized):
    super().__init__()
    self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    inputs, self.stages = 16, []
    for stage, (features, stride) in enumerate(((16, 1), (32, 2), (64, 2)), start=1):
      features *= width
      first = Block(inputs, features, stride, normalized)
      rest = nn.Sequential(
        collections.OrderedDict(
          (f"block{index}", Block(features, features, 1, normalized))
          for index in range((depth - 4) // 6 - 1)
        )
      )
      self.add_module(f"stage{stage}_first", first)
      self.add_module(f"stage{stage}_rest", rest)
      self.stages += [first, rest]
      inputs = features
    self.head = nn.ModuleDict({"classifier": nn.Linear(inputs, CLASSES)})
    if normalized:
      self.head["norm"] = nn.BatchNorm2d(inputs)

  def forward(self, x):
    x = self.stem(x)
    for stage in self.stages:
      x = stage(x)
    x = self.head["norm"](x) if "norm" in self.head else x
    return self.head["classifier"](x.relu().mean((2, 3)))


def named(variables):
  """Returns variables as PyTorch's, by PyTorch's names."""
  return {
    ".".join((*path[1:-1], LEAVES.get(path[-1], path[-1]))): to_torch(path, array)
    for path, array in variables.items()
  }


def load(network, variables):
  tensors = {name: torch.tensor(array) for name, array in named(variables).items()}
  missing, unexpected = network.load_state_dict(tensors, strict=False)
  assert not unexpected
  assert all(name.endswith("num_batches_tracked") for name in missing)


IMAGES = np.random.default_rng(1).normal(size=(4, 8, 8, 3))
LABELS = np.array([0, 4, 2, 2])


def torch_loss(network, images, labels):
  logits = network(torch.tensor(images.transpose(0, 3, 1, 2)))
  return logits, nn.functional.cross_entropy(logits, torch.tensor(labels))


@pytest.mark.parametrize("method", ["batch_norm", "skipinit"])
def test_wide_resnet(method):
  # A block that keeps the shape, and two that change it.
  network = TorchWideResNet(10, 1, method == "batch_norm").double()
  with float64():
    model = models.WideResNet(
      10, 1, CLASSES, method, scan=False, symmetric_padding=True, **FLOAT64
    )
    variables = random_variables(model, IMAGES)
    evaluated, logits, gradients, statistics = run(model, variables, IMAGES, LABELS)
  load(network, variables)
  network.eval()
  expected = {"eval": torch_loss(network, IMAGES, LABELS)[0].detach().numpy()}
  network.train()
  expected_logits, loss = torch_loss(network, IMAGES, LABELS)
  loss.backward()
  expected["train"] = expected_logits.detach().numpy()
  assert_same({"eval": evaluated, "train": logits}, expected)
  expected = {name: p.grad.numpy() for name, p in network.named_parameters()}
  assert_same(named(gradients), expected)
  # PyTorch keeps an unbiased variance, of one position less.
  buffers = {name: b.numpy() for name, b in network.named_buffers()}
  before = named(variables)
  for name, value in named(statistics).items():
    change = buffers[name] - 0.9 * before[name]
    if name.endswith("var"):
      size = 8 if name.startswith(("stage1", "stage2_first.norm1")) else 4
      size = 2 if name.startswith(("stage3_first.norm2", "head")) else size
      count = len(IMAGES) * size**2
      change = change * (count - 1) / count
    np.testing.assert_allclose(value, 0.9 * before[name] + change, rtol=1e-10)


def test_fifty_steps_with_l2_and_halving():
  steps, steps_per_epoch = 50, 10
  config = TrainConfig(
    learning_rate=2**-5, l2=0.01, constant_epochs=2, halve_every_epochs=1
  )
  rng = np.random.default_rng(2)
  batches = rng.normal(size=(steps, 4, 8, 8, 3)), rng.integers(0, CLASSES, (steps, 4))
  network = TorchWideResNet(10, 1, normalized=False).double()
  with float64():
    model = models.WideResNet(
      10, 1, CLASSES, "skipinit", scan=False, symmetric_padding=True, **FLOAT64
    )
    variables = random_variables(model, IMAGES)
    params = traverse_util.unflatten_dict(variables)["params"]
    optimizer = make_optimizer(config, steps_per_epoch)

    @jax.jit
    def train(params, state, batches):
      def step(carry, batch):
        params, state = carry
        images, labels = batch

        def loss(params):
          return cross_entropy(
            model.apply({"params": params}, images, train=True), labels
          )

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

      return jax.lax.scan(step, (params, state), batches)[0][0]

    trained = traverse_util.flatten_dict(
      {"params": train(params, optimizer.init(params), batches)}
    )
  load(network, variables)
  sgd = torch.optim.SGD(network.parameters(), lr=2**-5, momentum=0.9, weight_decay=0.01)
  # The rate of steps 0 to 19, and half of the last in each ten that follow.
  schedule = torch.optim.lr_scheduler.LambdaLR(
    sgd, lambda step: 0.5 ** max(0, step // steps_per_epoch - 1)
  )
  for images, labels in zip(*batches, strict=True):
    sgd.zero_grad()
    torch_loss(network, images, labels)[1].backward()
    sgd.step()
    schedule.step()
  expected = {name: p.detach().numpy() for name, p in network.named_parameters()}
  actual = {name: np.asarray(x) for name, x in named(trained).items()}
  assert_same(actual, expected, 1e-9)
  start = named(variables)
  moved = functools.reduce(max, (np.abs(start[n] - x).max() for n, x in actual.items()))
  assert moved > 0.1
