"""The same network in PyTorch, in channels-last, eager or through `torch.compile`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.peer import L2, LEARNING_RATE, MOMENTUM, NUM_CLASSES, Case


def _normalizer(features: int, method: str) -> nn.Module:
  return nn.BatchNorm2d(features) if method == "batch_norm" else nn.Identity()


class BasicBlock(nn.Module):
  """Pre-activation block of two 3x3 convolutions (He et al., ECCV 2016)."""

  def __init__(self, inputs: int, features: int, strides: int, method: str) -> None:
    super().__init__()
    self.norm1 = _normalizer(inputs, method)
    self.conv1 = nn.Conv2d(inputs, features, 3, strides, padding=1, bias=False)
    self.norm2 = _normalizer(features, method)
    self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
    self.relu = nn.ReLU()
    self.alpha = nn.Parameter(torch.zeros(())) if method == "skipinit" else None
    self.projection = None
    if strides != 1 or inputs != features:
      self.projection = nn.Conv2d(inputs, features, 1, strides, bias=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Maps [N, inputs, H, W] to [N, features, H / strides, W / strides]."""
    y = self.relu(self.norm1(x))
    shortcut = x if self.projection is None else self.projection(y)
    y = self.conv2(self.relu(self.norm2(self.conv1(y))))
    return shortcut + (y if self.alpha is None else self.alpha * y)


def wide_resnet(depth: int, width: int, method: str) -> nn.Module:
  """Returns a Wide-ResNet for images [N, 3, H, W]."""
  features = 16
  layers: list[nn.Module] = [nn.Conv2d(3, features, 3, padding=1, bias=False)]
  for stage, strides in enumerate((1, 2, 2)):
    for index in range((depth - 4) // 6):
      wider = 2 ** (4 + stage) * width
      block = BasicBlock(features, wider, strides if index == 0 else 1, method)
      layers.append(block)
      features = wider
  layers += [_normalizer(features, method), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
  layers += [nn.Flatten(), nn.Linear(features, NUM_CLASSES)]
  return nn.Sequential(*layers)


def make_step(case: Case, *, compiled: bool) -> Callable[[], None]:
  """Returns a function that takes one step."""
  assert not case.remat
  # PyTorch's types do not know the argument of `to`.
  model: Any = wide_resnet(case.depth, case.width, case.method)
  model = model.to(memory_format=torch.channels_last)
  optimizer = torch.optim.SGD(
    model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=L2
  )
  images, labels = map(torch.from_numpy, case.batch())
  # As [N, C, H, W], its memory is channels-last.
  images = images.permute(0, 3, 1, 2)
  labels = labels.long()
  apply = torch.compile(model) if compiled else model

  def step() -> None:
    optimizer.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(apply(images), labels).backward()
    optimizer.step()

  return step
