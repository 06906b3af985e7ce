"""Published results, to stand beside measured ones; never a default of anything."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Published:
  """One published result.

  Attributes:
    dataset: the data set that it is on.
    model: the network.
    depth: its layers.
    width: its width.
    method: a name in `skipinit_jax.methods.NAMES`.
    l2: whether it was trained with L2.
    test_accuracy: in percent; None: it does not train.
    deviation: its standard deviation, in percent.
    learning_rates: the optimal rate, then its lowest and highest one; None likewise.
  """

  dataset: str
  model: str
  depth: int
  width: int
  method: str
  l2: bool
  test_accuracy: float | None
  deviation: float | None
  learning_rates: tuple[float, float, float] | None


DEPTH_SOURCE = "De & Smith (2020), arXiv:2002.10444v1, tables 1 and 2"
"""Where `DEPTH_TABLE` is published."""

_DEPTH_COLUMNS = (
  ("batch_norm", True),
  ("skipinit_inverse_sqrt_depth", True),
  ("skipinit", True),
  ("skipinit_one", True),
  ("divide_by_sqrt2", True),
  ("skipinit", False),
)
# Accuracy, deviation, and the exponents of the optimal rate and of its range.
_DEPTH_ROWS: dict[int, tuple[tuple[float, float, int, int, int] | None, ...]] = {
  16: (
    (93.5, 0.1, -1, -1, -1),
    (93.0, 0.1, -2, -2, -1),
    (93.3, 0.1, -2, -2, -2),
    (93.0, 0.1, -2, -2, -1),
    (92.4, 0.1, -2, -2, -1),
    (89.8, 0.2, -3, -3, -3),
  ),
  100: (
    (94.7, 0.1, -1, -2, 0),
    (94.2, 0.1, -1, -2, -1),
    (94.2, 0.1, -2, -2, -2),
    None,
    (88.9, 0.4, -5, -5, -5),
    (91.7, 0.2, -2, -2, -2),
  ),
  1000: (
    (94.6, 0.1, -2, -3, 0),
    (94.2, 0.0, -1, -2, -1),
    (94.3, 0.2, -2, -3, -1),
    None,
    None,
    (92.1, 0.1, -2, -2, -2),
  ),
}

DEPTH_TABLE: tuple[Published, ...] = tuple(
  Published(
    dataset="cifar10",
    model="wide_resnet",
    depth=depth,
    width=2,
    method=method,
    l2=l2,
    test_accuracy=entry[0] if entry else None,
    deviation=entry[1] if entry else None,
    learning_rates=(2.0 ** entry[2], 2.0 ** entry[3], 2.0 ** entry[4])
    if entry
    else None,
  )
  for depth, entries in _DEPTH_ROWS.items()
  for (method, l2), entry in zip(_DEPTH_COLUMNS, entries, strict=True)
)


@dataclasses.dataclass(frozen=True)
class PublishedImageNet:
  """One published result on ImageNet: ResNet-50, 90 epochs, one crop.

  Attributes:
    method: a name in `skipinit_jax.methods.NAMES`.
    batch_size: examples of a step.
    top1: test accuracy in percent.
    top5: likewise, counting the label among the five largest logits.
  """

  method: str
  batch_size: int
  top1: float
  top5: float


IMAGENET_SOURCE = "De & Smith (2020), arXiv:2002.10444v1"
"""Where `IMAGENET_TABLE` is published."""

_IMAGENET_BATCH_SIZES = (256, 1024, 4096)
_IMAGENET_ROWS: dict[str, tuple[tuple[float, float], ...]] = {
  "batch_norm": ((75.0, 92.2), (74.9, 92.1), (74.9, 91.9)),
  "fixup": ((74.8, 91.8), (74.6, 91.7), (73.0, 90.6)),
  "skipinit_biases": ((74.9, 91.9), (74.6, 91.8), (70.8, 89.2)),
  "fixup_dropout": ((75.8, 92.5), (75.6, 92.5), (74.8, 91.8)),
  "regularized_skipinit": ((75.6, 92.4), (75.5, 92.5), (72.7, 90.7)),
}

IMAGENET_TABLE: tuple[PublishedImageNet, ...] = tuple(
  PublishedImageNet(method, batch_size, top1, top5)
  for method, entries in _IMAGENET_ROWS.items()
  for batch_size, (top1, top5) in zip(_IMAGENET_BATCH_SIZES, entries, strict=True)
)
