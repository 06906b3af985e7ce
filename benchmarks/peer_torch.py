"""The same networks in PyTorch, in channels-last, eager or through `torch.compile`.

They run on a GPU where there is one. The ResNet has batch norm and version 1.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.peer import L2, LEARNING_RATE, MOMENTUM, Case


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


def wide_resnet(
  depth: int, width: int, method: str, num_classes: int = 10
) -> nn.Module:
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
  layers += [nn.Flatten(), nn.Linear(features, num_classes)]
  return nn.Sequential(*layers)


class BottleneckBlock(nn.Module):
  """Post-activation block of 1x1, 3x3 and 1x1 convolutions (He et al., CVPR 2016)."""

  def __init__(self, inputs: int, features: int, strides: int) -> None:
    super().__init__()
    outputs = 4 * features
    self.branch = nn.Sequential(
      nn.Conv2d(inputs, features, 1, bias=False),
      nn.BatchNorm2d(features),
      nn.ReLU(),
      nn.Conv2d(features, features, 3, strides, padding=1, bias=False),
      nn.BatchNorm2d(features),
      nn.ReLU(),
      nn.Conv2d(features, outputs, 1, bias=False),
      nn.BatchNorm2d(outputs),
    )
    self.projection: nn.Module = nn.Identity()
    if strides != 1 or inputs != outputs:
      convolution = nn.Conv2d(inputs, outputs, 1, strides, bias=False)
      self.projection = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Maps [N, inputs, H, W] to [N, 4 features, H / strides, W / strides]."""
    return (self.projection(x) + self.branch(x)).relu()


def resnet(num_classes: int) -> nn.Module:
  """Returns a ResNet-50 for images [N, 3, H, W]."""
  inputs = 64
  layers: list[nn.Module] = [nn.Conv2d(3, inputs, 7, 2, padding=3, bias=False)]
  layers += [nn.BatchNorm2d(inputs), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
  for stage, blocks in enumerate((3, 4, 6, 3)):
    for index in range(blocks):
      features = 64 * 2**stage
      layers.append(BottleneckBlock(inputs, features, 2 if stage and not index else 1))
      inputs = 4 * features
  head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes)]
  return nn.Sequential(*layers, *head)


def make_step(case: Case, *, compiled: bool) -> Callable[[], None]:
  """Returns a function that takes one step."""
  assert not case.remat
  on_gpu = torch.cuda.is_available()
  device = "cuda" if on_gpu else "cpu"
  torch.backends.cudnn.benchmark = True
  if case.width:
    network = wide_resnet(case.depth, case.width, case.method, case.num_classes)
  else:
    assert (case.depth, case.version, case.method) == (50, 1, "batch_norm")
    network = resnet(case.num_classes)
  # PyTorch's types do not know the argument of `to`.
  model: Any = network
  model = model.to(device, memory_format=torch.channels_last)
  optimizer = torch.optim.SGD(
    model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=L2
  )
  images, labels = (torch.from_numpy(each).to(device) for each in case.batch())
  # As [N, C, H, W], its memory is channels-last.
  images = images.permute(0, 3, 1, 2)
  labels = labels.long()
  apply = torch.compile(model) if compiled else model
  dtype = getattr(torch, case.dtype)
  narrow = dtype != torch.float32
  autocast = torch.autocast(device, dtype) if narrow else contextlib.nullcontext()

  def step() -> None:
    optimizer.zero_grad(set_to_none=True)
    with autocast:
      loss = nn.functional.cross_entropy(apply(images), labels)
    loss.backward()
    optimizer.step()
    if on_gpu:
      torch.cuda.synchronize()

  return step


def device_peak_bytes() -> int | None:
  """Returns the most memory of a GPU that this process had."""
  return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
